"""Guidance in every form: Dot never gets another branch's estimate."""

import diffusers
import pytest
import torch
from pipeline_checks import check, counted, latents, make_dot, own_dot
from tiny_pipelines import TEXT_CHANNELS, stable_diffusion, text_inputs, text_unet

from morse import enable_morse
from morse.branches import Branches
from morse.denoisers import Call


class SeparateGuidance(diffusers.DiffusionPipeline):
    """Guidance by two calls a step, the empty text first, in some of the steps only."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds,
        negative_prompt_embeds,
        generator=None,
        num_inference_steps=6,
        guided=(0, 6),
        copy_texts=False,
        **options,
    ):
        self.scheduler.set_timesteps(num_inference_steps)
        sample = torch.randn(2, 4, 16, 16, generator=generator)
        for step, timestep in enumerate(self.scheduler.timesteps):

            def predict(text, timestep=timestep, sample=sample):
                text = text.clone() if copy_texts else text
                return self.unet(sample, timestep, text, return_dict=False)[0]

            if guided[0] <= step < guided[1]:
                without, with_text = predict(negative_prompt_embeds), predict(prompt_embeds)
                noise_pred = without + 3 * (with_text - without)
            else:
                noise_pred = predict(prompt_embeds)
            sample = self.scheduler.step(noise_pred, timestep, sample).prev_sample
        return (sample,)


class CheckingDot:
    """A Dot that insists on Dash's latest estimate for the very same text."""

    def __init__(self, unet):
        self.unet = unet

    def __call__(self, sample, timestep, jump, encoder_hidden_states, **conditions):
        plain = self.unet._call_impl
        dash = plain(jump.sample, jump.timestep, encoder_hidden_states, return_dict=False)[0]
        assert torch.equal(jump.model_output, dash)
        return own_dot(sample, timestep, jump)


@pytest.fixture(scope="module")
def unet():
    return text_unet()


@pytest.mark.supports("interplay", "guidance in separate calls")
class TestSeparateCalls:
    @pytest.fixture
    def pipe(self, unet):
        return SeparateGuidance(unet, diffusers.DDIMScheduler(clip_sample=False))

    def test_weight_shared_dot(self, pipe, unet):
        check(pipe, make_dot(unet), 6, 6, **text_inputs(), branches=2)

    # Dash's and Dot's calls for the empty text, and fallbacks; the text itself has 2 and 4.
    @pytest.mark.parametrize("copy_texts", [False, True])
    @pytest.mark.parametrize(
        ("guided", "dash", "dot", "fallbacks"),
        [
            ((0, 6), 2, 4, 0),
            ((0, 2), 1, 1, 0),  # ends: the only call left is the second one of before
            ((1, 6), 2, 3, 1),  # sets in where Dot is planned
            ((1, 2), 1, 0, 1),
            ((3, 6), 1, 2, 0),  # sets in with Dash
            ((2, 5), 2, 1, 1),
        ],
    )
    def test_in_a_part_of_the_steps(self, pipe, guided, dash, dot, fallbacks, copy_texts):
        enable_morse(pipe, CheckingDot(pipe.unet))
        options = {"guided": guided, "copy_texts": copy_texts}
        latents(pipe, plan="DooDoo", **text_inputs(), **options)
        assert counted(pipe) == (2 + dash, 4 + dot)
        reason = "no earlier Dash evaluation with these conditions"
        assert pipe.last_run.fallbacks == ({reason: fallbacks} if fallbacks else {})

    def test_the_same_text_twice(self, pipe):
        text = text_inputs()["prompt_embeds"]
        texts = {"prompt_embeds": text, "negative_prompt_embeds": text}
        expected = latents(pipe, **texts)
        enable_morse(pipe, own_dot)
        assert torch.equal(latents(pipe, plan="DDDDDD", **texts), expected)
        latents(pipe, plan="DooDoo", **texts)
        assert counted(pipe, branches=2) == (2, 4) and pipe.last_run.fallbacks == {}

    def test_two_denoisers_in_each_step(self, unet):
        """As Ideogram 4 has: one with text, one without."""

        class TwoModels(SeparateGuidance):
            def __init__(self, transformer, unconditional_transformer, scheduler):
                diffusers.DiffusionPipeline.__init__(self)
                parts = {"unconditional_transformer": unconditional_transformer}
                self.register_modules(transformer=transformer, scheduler=scheduler, **parts)
                self.set_progress_bar_config(disable=True)

            def unet(self, sample, timestep, text, **options):
                with_text = text is texts["prompt_embeds"]
                model = self.transformer if with_text else self.unconditional_transformer
                return model(sample, timestep, text, **options)

        texts = text_inputs()
        other = text_unet()
        with torch.no_grad():
            other.conv_in.weight.mul_(0.5)
        pipe = TwoModels(unet, other, diffusers.DDIMScheduler(clip_sample=False))
        check(pipe, own_dot, 6, 6, **texts, branches=2)
        latents(enable_morse(pipe, make_dot(unet)), plan="DooDoo", **texts)
        assert counted(pipe) == (2 + 6, 4)
        assert pipe.last_run.fallbacks == {"unconditional_transformer: it has no Dot": 4}


@pytest.mark.supports("pipeline", "StableDiffusionPAGPipeline")
class TestPerturbedAttention:
    """PAG: a third branch, whose attention processors are set while the pipeline runs."""

    @pytest.fixture
    def pipe(self, unet):
        return stable_diffusion(
            diffusers.StableDiffusionPAGPipeline, unet, pag_applied_layers=["down", "mid"]
        )

    @pytest.mark.parametrize("merge_lora", [True, False])
    def test_dot_perturbs_what_dash_does(self, pipe, unet, merge_lora):
        dot, outputs = make_dot(unet, independent=True), []
        dot.register_forward_hook(lambda dot, given, output: outputs.append(output))
        enable_morse(pipe, dot, merge_lora)
        latents(pipe, plan="Do", **text_inputs())
        without, with_text, perturbed = outputs.pop().chunk(3)
        assert not torch.allclose(with_text, without)
        assert not torch.allclose(with_text, perturbed)
        latents(pipe, plan="Do", **text_inputs(), pag_scale=0.0)
        assert len(outputs.pop()) == 4

    @pytest.mark.parametrize("options", [{}, {"pag_adaptive_scale": 0.5}, {"guidance_scale": 1.0}])
    def test_attached(self, pipe, unet, options):
        processors = dict(unet.attn_processors)
        check(pipe, make_dot(unet), 6, 6, **text_inputs(), **options)
        assert unet.attn_processors == processors


class TestBranches:
    @staticmethod
    def call(**conditions):
        return Call(torch.zeros(2, 4), 5, conditions)

    def test_the_very_object_goes_before_an_equal_one(self):
        one, other = torch.ones(2, TEXT_CHANNELS), torch.ones(2, TEXT_CHANNELS)
        branches = Branches()
        branches.start_step(forget=True)
        branches.keep("owner", self.call(text=one), "first")
        branches.keep("owner", self.call(text=other), "second")
        branches.start_step(forget=False)
        assert branches.find("owner", self.call(text=other)) == "second"
        assert branches.find("owner", self.call(text=other)) == "first"
        assert branches.find("owner", self.call(text=other)) is None

    @pytest.mark.parametrize(
        "other",
        [
            {},
            {"text": torch.zeros(3)},
            {"text": torch.ones(3, dtype=torch.float64)},
            {"text": torch.ones(3), "skip_layers": [1]},
            {"added": {"text": torch.zeros(3)}},
            {"text": [torch.ones(3)]},
            {"text": object()},
        ],
    )
    def test_other_conditions(self, other):
        branches = Branches()
        branches.keep("owner", self.call(text=torch.ones(3)), "kept")
        branches.start_step(forget=False)
        assert branches.find("owner", self.call(**other)) is None
        assert "with these conditions" in branches.why_missing("owner", self.call(**other))
        assert branches.find("someone", self.call(text=torch.ones(3))) is None
        assert branches.find("owner", self.call(text=torch.ones(3))) == "kept"

    def test_nested_and_plain_conditions(self):
        branches = Branches()
        given = {"added": {"ids": [torch.ones(2), None], "size": (16, 16.0)}, "mode": "a"}
        same = {"added": {"ids": [torch.ones(2), None], "size": (16, 16.0)}, "mode": "a"}
        branches.keep("owner", self.call(**given), "kept")
        branches.start_step(forget=False)
        assert branches.find("owner", self.call(**{**same, "mode": "b"})) is None
        assert branches.find("owner", self.call(**same)) == "kept"
        branches.start_step(forget=True)
        assert branches.find("owner", self.call(**same)) is None
