"""Transformer pipelines with a weight-shared Dot, on tiny random models."""

import diffusers
import pipeline_checks
import pytest
import torch
from tiny_pipelines import picture, text_inputs, tiny_vae
from tiny_text import sd3_pipeline
from tiny_transformers import tiny_dit, tiny_flux, tiny_pixart, tiny_sd3

from morse import (
    FlowMatchLeapfrogScheduler,
    LeapfrogScheduler,
    MorsePipeline,
    disable_morse,
    enable_morse,
)
from morse.dot.fingerprint import fingerprint


def make_dot(transformer, num_down_blocks=1, **options):
    widths = (8, 16)[:num_down_blocks]
    return pipeline_checks.make_dot(
        transformer, num_down_blocks, block_out_channels=widths, **options
    )


def build(pipeline_class, transformer, scheduler, **more):
    pipe = pipeline_class(transformer=transformer, scheduler=scheduler, vae=tiny_vae(), **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe, **kwargs):
    torch.manual_seed(0)  # DiT's pipeline lets the scheduler draw from the global generator
    output_type = "pt" if isinstance(pipe, diffusers.DiTPipeline) else "latent"
    found = pipe(generator=torch.Generator().manual_seed(0), output_type=output_type, **kwargs)
    return torch.as_tensor(found.images)


def test_schedulers_of_another_noise_path_are_refused():
    pipe = sd3_pipeline()
    for scheduler in (LeapfrogScheduler(), diffusers.DDIMScheduler()):
        with pytest.raises(ValueError, match="StableDiffusion3Pipeline, whose model was"):
            MorsePipeline.from_pipe(pipe, scheduler=scheduler)
    with pytest.raises(ValueError, match="'pndm' is not for models trained by flow matching"):
        MorsePipeline.from_pipe(pipe, scheduler="pndm")
    config = pipe.scheduler.config
    for flow in (
        diffusers.FlowMatchHeunDiscreteScheduler.from_config(config),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True),
    ):
        assert MorsePipeline.from_pipe(pipe, scheduler=flow).scheduler is flow


def test_an_ip_adapter_may_be_there_before_the_dot():
    transformer = tiny_sd3()
    before = fingerprint(transformer)
    transformer.image_proj = torch.nn.Linear(3, 3)
    assert fingerprint(transformer) == before


def check_sizes(pipe, dot, inputs, *sizes):
    """Other sizes in between leave nothing behind."""
    enable_morse(pipe, dot)
    found = []
    for height, width in (*sizes, sizes[0]):
        found.append(pictures(pipe, plan="DoDo", **{**inputs, "height": height, "width": width}))
        assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (2, 2)
        assert pipe.last_run.fallbacks == {} and found[-1].isfinite().all()
    assert torch.equal(found[0], found[-1])
    return found


def check(pipe, dot, calls=1, **kwargs):
    """`calls` are those of the transformer in each step."""
    expected = pictures(pipe, num_inference_steps=5, **kwargs)
    enable_morse(pipe, dot)
    assert torch.equal(pictures(pipe, plan="DDDDD", **kwargs), expected)
    assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (5 * calls, 0)
    assert pipe.last_run.fallbacks == {}
    found = pictures(pipe, plan="DooDo", **kwargs)
    assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (2 * calls, 3 * calls)
    assert pipe.last_run.fallbacks == {}
    assert found.isfinite().all() and not torch.equal(found, expected)
    assert torch.equal(pictures(pipe, plan="DooDo", **kwargs), found)
    disable_morse(pipe)
    assert torch.equal(pictures(pipe, num_inference_steps=5, **kwargs), expected)
    return found


@pytest.mark.supports("pipeline", "DiTPipeline")
class TestDiT:
    @pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
    @pytest.mark.parametrize("scheduler", ["DDIM", "DPMSolverMultistep", "DDPM"])
    def test_counts(self, scheduler, guidance_scale):
        """DDPM adds noise, so that the base is the x_0 of the estimate, not of the variance."""
        transformer = tiny_dit()
        scheduler = getattr(diffusers, f"{scheduler}Scheduler")()
        pipe = build(diffusers.DiTPipeline, transformer, scheduler)
        check(pipe, make_dot(transformer), class_labels=[1, 2], guidance_scale=guidance_scale)

    def test_another_batch_size_in_the_next_call(self):
        transformer = tiny_dit()
        pipe = build(diffusers.DiTPipeline, transformer, diffusers.DDIMScheduler())
        enable_morse(pipe, make_dot(transformer))
        for labels in ([1], [1, 2, 3], [1]):
            assert len(pictures(pipe, plan="DoDo", class_labels=labels)) == len(labels)
            assert pipe.last_run.fallbacks == {}


@pytest.mark.supports("pipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline")
class TestPixArt:
    @pytest.fixture
    def inputs(self):
        masks = torch.tensor([[1, 1, 1, 1, 0]] * 2), torch.tensor([[1, 1, 0, 0, 0]] * 2)
        return {
            **text_inputs(),
            "negative_prompt": None,
            "prompt_attention_mask": masks[0],
            "negative_prompt_attention_mask": masks[1],
            "use_resolution_binning": False,
        }

    @pytest.fixture
    def pipe(self):
        return self.build("PixArtSigmaPipeline", tiny_pixart())

    def build(self, name, transformer):
        scheduler = diffusers.DPMSolverMultistepScheduler()
        missing = {"tokenizer": None, "text_encoder": None}
        return build(getattr(diffusers, name), transformer, scheduler, **missing)

    @pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
    def test_counts(self, pipe, inputs, guidance_scale):
        check(pipe, make_dot(pipe.transformer), **inputs, guidance_scale=guidance_scale)

    def test_alpha_with_size_conditions(self, inputs):
        transformer = tiny_pixart(sample_size=128)  # for which the pipeline gives them
        pipe = self.build("PixArtAlphaPipeline", transformer)
        check(pipe, make_dot(transformer), **inputs, height=32, width=32)

    def test_another_size_in_the_next_call(self, pipe, inputs):
        dot = make_dot(pipe.transformer, num_down_blocks=2)
        check_sizes(pipe, dot, inputs, (32, 32), (16, 40))  # 4 x 10 tokens, padded to 4 x 12


@pytest.mark.supports("pipeline", "StableDiffusion3Pipeline")
class TestStableDiffusion3:
    @pytest.fixture
    def pipe(self):
        missing = {
            f"{kind}{number}": None
            for kind in ("tokenizer", "text_encoder")
            for number in ("", "_2", "_3")
        }
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        return build(diffusers.StableDiffusion3Pipeline, tiny_sd3(), scheduler, **missing)

    @pytest.fixture
    def inputs(self):
        return {**text_inputs(pooled=True), "height": 32, "width": 32}

    @pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
    def test_counts(self, pipe, inputs, guidance_scale):
        check(pipe, make_dot(pipe.transformer), **inputs, guidance_scale=guidance_scale)

    def test_base_of_clean_samples(self, pipe, inputs):
        found = [
            check(pipe, make_dot(pipe.transformer, base_space=space), **inputs)
            for space in ("raw", "x0")
        ]
        assert not torch.equal(*found)

    def test_guidance_by_skipping_layers_through_the_whole_run(self, pipe, inputs):
        """A second branch: the same step once more, without some layers and without guidance."""
        skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -1.0}
        skipping["skip_layer_guidance_stop"] = 2.0
        dot = make_dot(pipe.transformer)
        found = check(pipe, dot, calls=2, **inputs, **skipping)
        assert not torch.equal(found, pictures(enable_morse(pipe, dot), plan="DooDo", **inputs))

    def test_guidance_by_skipping_layers_that_starts_on_the_way(self, pipe, inputs):
        """By default from the second step on, whose first branch alone has a Dash before it."""
        enable_morse(pipe, make_dot(pipe.transformer))
        pictures(pipe, plan="DDooDoo" + "ooo", **inputs, skip_guidance_layers=[1])
        # The branch lives in steps 1 of 10, and stops before 0.2 * 10.
        assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (3 + 1, 7)
        assert pipe.last_run.fallbacks == {}
        pictures(pipe, plan="DooDoooooo", **inputs, skip_guidance_layers=[1])
        # The extra call is of one branch, the others of both at once.
        assert pipe.last_run.fallbacks == {"the sample changed its shape": 1}
        assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (2 + 1, 8)

    def test_another_size_in_the_next_call(self, pipe, inputs):
        dot = make_dot(pipe.transformer, num_down_blocks=2)
        found = check_sizes(pipe, dot, inputs, (32, 32), (24, 40))  # 6 x 10 tokens: 8 x 12
        assert found[1].shape[-2:] == (12, 20)


@pytest.mark.supports("pipeline", "FluxPipeline")
class TestFlux:
    def build(self, guidance_embeds=False, kind="FluxPipeline", in_channels=16, **scheduler):
        missing = dict.fromkeys(
            ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"), None
        )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**scheduler)
        options = {"guidance_embeds": guidance_embeds, "in_channels": in_channels}
        transformer = tiny_flux(out_channels=16, **options)
        return build(getattr(diffusers, kind), transformer, scheduler, **missing)

    @pytest.fixture
    def inputs(self):
        names = ("prompt_embeds", "pooled_prompt_embeds")
        given = text_inputs(pooled=True)
        return {**{name: given[name] for name in names}, "height": 32, "width": 32}

    @pytest.fixture
    def negative(self):
        return {k: v for k, v in text_inputs(pooled=True).items() if k.startswith("negative")}

    @pytest.mark.parametrize("guidance_embeds", [True, False])
    @pytest.mark.parametrize("dynamic", [True, False])
    def test_counts(self, inputs, guidance_embeds, dynamic):
        pipe = self.build(guidance_embeds, use_dynamic_shifting=dynamic)
        check(pipe, make_dot(pipe.transformer), **inputs, guidance_scale=3.5)

    @pytest.mark.parametrize("guidance_embeds", [True, False])
    def test_true_guidance_is_a_second_branch(self, inputs, negative, guidance_embeds):
        pipe = self.build(guidance_embeds)
        dot = make_dot(pipe.transformer)
        found = check(pipe, dot, calls=2, **inputs, **negative, true_cfg_scale=4.0)
        assert not torch.equal(found, pictures(enable_morse(pipe, dot), plan="DooDo", **inputs))

    def test_another_size_in_the_next_call(self, inputs):
        pipe = self.build()
        dot = make_dot(pipe.transformer, num_down_blocks=2)
        found = check_sizes(pipe, dot, inputs, (32, 32), (24, 40), (40, 24))
        assert not torch.equal(found[1], found[2])

    def test_base_of_clean_samples(self, inputs):
        pipe = self.build()
        found = [
            check(pipe, make_dot(pipe.transformer, base_space=space), **inputs)
            for space in ("raw", "x0")
        ]
        assert not torch.equal(*found)

    @pytest.mark.supports("pipeline", "FluxControlPipeline")
    def test_base_of_clean_samples_before_a_control_picture(self, inputs):
        """The sample is the first of the transformer's input channels; noise asks for this base."""
        pipe = self.build(kind="FluxControlPipeline", in_channels=32, stochastic_sampling=True)
        pipe.vae.register_to_config(shift_factor=0.1)
        check(pipe, make_dot(pipe.transformer), **inputs, control_image=picture())

    @pytest.mark.parametrize("dynamic", [True, False])
    def test_leapfrog(self, inputs, dynamic):
        """Its pipelines give sigmas of their own, and a dynamic shift."""
        pipe = self.build(use_dynamic_shifting=dynamic)
        MorsePipeline.from_pipe(pipe, scheduler="leapfrog")
        check(disable_morse(pipe), make_dot(pipe.transformer), **inputs)
        rows = [[999, 0.4, 0, 0], [500, 0.5, 0, 0.3], [99.5, 1, 0.2, 0]]
        enable_morse(pipe, make_dot(pipe.transformer))
        plain = pictures(pipe, plan="DoD", **inputs)
        pipe.scheduler = FlowMatchLeapfrogScheduler.from_config(
            pipe.scheduler.config, fitted_steps=rows
        )
        assert not torch.equal(pictures(pipe, plan="DoD", **inputs), plain)

    def test_a_budget(self, inputs):
        pipe = self.build()
        enable_morse(pipe, make_dot(pipe.transformer, speed_ratio=4.0))
        pictures(pipe, lsd=4, **inputs)
        assert pipe.last_run.lsd <= 4 and pipe.last_run.num_dot > 0
        assert pipe.last_run.fallbacks == {}
