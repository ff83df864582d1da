"""Stable Diffusion's pipelines with a weight-shared Dot, on tiny random models."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.models.attention import GatedSelfAttentionDense
from pipeline_checks import check, latents, make_dot
from tiny_pipelines import (
    TEXT_CHANNELS,
    picture,
    stable_diffusion,
    text_inputs,
    text_unet,
    xl_unet,
)

from morse import enable_morse
from morse.plan import MorsePlan


@pytest.fixture(scope="module")
def unet():
    return text_unet()


@pytest.fixture(scope="module")
def dot(unet):
    return make_dot(unet)


@pytest.mark.supports("pipeline", "StableDiffusionPipeline")
class TestTextToImage:
    @pytest.mark.parametrize(
        "options", [{}, {"guidance_scale": 1.0}, {"guidance_rescale": 0.7}, {"eta": 1.0}]
    )
    def test_guidance(self, unet, dot, options):
        pipe = stable_diffusion(diffusers.StableDiffusionPipeline, unet)
        check(pipe, dot, 6, 6, **text_inputs(), **options)

    @pytest.mark.parametrize(
        ("scheduler", "steps"),
        [("DPMSolverMultistep", 6), ("EulerAncestralDiscrete", 6), ("HeunDiscrete", 4)],
    )
    def test_schedulers(self, unet, dot, scheduler, steps):
        scheduler = getattr(diffusers, f"{scheduler}Scheduler")()
        pipe = stable_diffusion(diffusers.StableDiffusionPipeline, unet, scheduler)
        check(pipe, dot, steps, 2 * steps - 1 if scheduler.order == 2 else steps, **text_inputs())

    def test_guidance_that_stops_midway_costs_one_fallback(self, unet, dot):
        """The batch is halved there, so Dash's latest estimate fits no more."""
        pipe = enable_morse(stable_diffusion(diffusers.StableDiffusionPipeline, unet), dot)

        def stop(pipe, step, timestep, tensors):
            if step == 3:
                pipe._guidance_scale = 1.0
                tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
            return tensors

        options = {
            "callback_on_step_end": stop,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        }
        found = latents(pipe, plan="DooooooD", **text_inputs(), **options)
        assert pipe.last_run.fallbacks == {"the sample changed its shape": 1}
        assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (3, 5)
        assert found.isfinite().all()
        latents(pipe, plan="DoooDooo", **text_inputs(), **options)
        assert pipe.last_run.fallbacks == {}

    def test_a_size_that_the_levels_do_not_divide(self, unet):
        pipe = stable_diffusion(diffusers.StableDiffusionPipeline, unet)
        dot = make_dot(unet, num_down_blocks=2, block_out_channels=(4, 8))
        check(pipe, dot, 4, 4, **text_inputs(), height=40, width=56)  # inside Dot 5 x 7

    def test_each_picture_sees_its_own_text(self, unet, dot):
        pipe = enable_morse(stable_diffusion(diffusers.StableDiffusionPipeline, unet), dot)
        generators = lambda: [torch.Generator().manual_seed(seed) for seed in range(2)]  # noqa: E731
        run = {"plan": "DoDo", "output_type": "latent"}
        both = pipe(**text_inputs(), **run, generator=generators()).images
        second = {name: value[1:] for name, value in text_inputs().items()}
        alone = pipe(**second, **run, generator=generators()[1:]).images
        torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strength", [0.5, 0.8])
@pytest.mark.parametrize("scheduler", ["DDIM", "HeunDiscrete", "UniPCMultistep"])
@pytest.mark.supports("pipeline", "StableDiffusionImg2ImgPipeline")
def test_image_to_image_counts_the_steps_that_are_left(unet, dot, strength, scheduler):
    scheduler = getattr(diffusers, f"{scheduler}Scheduler")()
    pipe = stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline, unet, scheduler)
    left = {0.5: 4, 0.8: 6}[strength]
    length = 2 * left - 1 if scheduler.order == 2 else left
    check(pipe, dot, 8, length, **text_inputs(), image=picture(), strength=strength)


def test_a_budget_counts_the_steps_that_are_left(unet, dot):
    pipe = enable_morse(stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline, unet), dot)
    pipe.speed_ratio = 4.0
    latents(pipe, lsd=4, strength=0.6, **text_inputs(), image=picture())
    assert pipe.last_run.plan == MorsePlan.from_budget(4, 4.0) and pipe.last_run.lsd == 4
    assert pipe.last_run.fallbacks == {} and pipe.last_run.num_dot > 0


@pytest.mark.supports("pipeline", "StableDiffusionInpaintPipeline")
class TestInpainting:
    @pytest.mark.parametrize("channels", [4, 9])
    def test_both_kinds_of_denoiser(self, unet, dot, channels):
        """One puts the known part back at each step, the other gets mask and image as input."""
        if channels == 9:
            unet = text_unet(in_channels=9)
            dot = make_dot(unet)
            assert (dot.conv_in.in_channels, dot.conv_out.out_channels) == (9 + 9 + 4, 4)
        pipe = stable_diffusion(diffusers.StableDiffusionInpaintPipeline, unet)
        inputs = {"image": picture(), "mask_image": picture(channels=1).round()}
        check(pipe, dot, 6, 6, **text_inputs(), **inputs)
        check(pipe, dot, 8, 4, **text_inputs(), **inputs, strength=0.5)


@pytest.mark.supports("pipeline", "StableDiffusionInstructPix2PixPipeline")
def test_instructions_on_an_image():
    """InstructPix2Pix: 8 channels in, three branches in one batch."""
    unet = text_unet(in_channels=8)
    pipe = stable_diffusion(diffusers.StableDiffusionInstructPix2PixPipeline, unet)
    check(pipe, make_dot(unet), 6, 6, **text_inputs(), image=picture())


@pytest.mark.supports("pipeline", "StableDiffusionGLIGENPipeline")
def test_grounding_ends_for_dot_too(monkeypatch):
    """GLIGEN switches its layers off midway, here between two evaluations of Dot."""
    unet, enabled = text_unet(attention_type="gated"), []
    pipe = stable_diffusion(diffusers.StableDiffusionGLIGENPipeline, unet)
    fuser = next(each for each in unet.modules() if isinstance(each, GatedSelfAttentionDense))
    forward = type(fuser).forward
    monkeypatch.setattr(
        type(fuser), "forward", lambda self, *x: enabled.append(self.enabled) or forward(self, *x)
    )
    pipe.tokenizer = lambda *phrases, **options: SimpleNamespace(to=lambda device: {})
    pipe.text_encoder = lambda: SimpleNamespace(pooler_output=torch.ones(1, TEXT_CHANNELS))
    pipe.text_encoder.dtype = torch.float32
    enable_morse(pipe, make_dot(unet))
    boxes = {"gligen_phrases": ["x"], "gligen_boxes": [[0.0, 0.0, 0.5, 0.5]]}
    kwargs = {**text_inputs(1), **boxes, "gligen_scheduled_sampling_beta": 0.5}
    latents(pipe, plan="DoooDo", height=32, width=32, **kwargs)
    assert enabled == [True] * 12 + [False] * 12


@pytest.mark.supports("pipeline", "LatentConsistencyModelPipeline")
def test_latent_consistency():
    """The guidance scale is an input, through the time embedding."""
    unet = text_unet(time_cond_proj_dim=256)
    pipe = stable_diffusion(
        diffusers.LatentConsistencyModelPipeline, unet, diffusers.LCMScheduler()
    )
    inputs = {"prompt_embeds": text_inputs()["prompt_embeds"]}
    dot = make_dot(unet)
    check(pipe, dot, 4, 4, **inputs)
    found = [
        latents(enable_morse(pipe, dot), plan="Do", **inputs, guidance_scale=s) for s in (2, 9)
    ]
    assert not torch.equal(*found)


@pytest.mark.supports("pipeline", "LatentConsistencyModelImg2ImgPipeline")
def test_latent_consistency_image_to_image():
    unet = text_unet(time_cond_proj_dim=256)
    pipe = stable_diffusion(
        diffusers.LatentConsistencyModelImg2ImgPipeline, unet, diffusers.LCMScheduler()
    )
    inputs = {"prompt_embeds": text_inputs()["prompt_embeds"], "image": picture()}
    check(pipe, make_dot(unet), 4, 4, **inputs, strength=0.5)


@pytest.mark.supports("pipeline", "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
class TestXL:
    @pytest.fixture(scope="class")
    def unet(self):
        return xl_unet()

    @pytest.fixture(scope="class")
    def dot(self, unet):
        return make_dot(unet)

    def test_base(self, unet, dot):
        pipe = stable_diffusion(diffusers.StableDiffusionXLPipeline, unet, xl=True)
        check(pipe, dot, 6, 6, **text_inputs(pooled=True), height=32, width=32)

    def test_base_stops_early_and_refiner_starts_late(self, unet, dot):
        inputs = text_inputs(pooled=True)
        base = stable_diffusion(diffusers.StableDiffusionXLPipeline, unet, xl=True)
        cut = {"height": 32, "width": 32, "denoising_end": 0.7}
        check(base, dot, 10, 7, **inputs, **cut, state_steps=True)
        enable_morse(base, dot)(**inputs, **cut, plan="DooDooo", output_type="latent")
        assert base.last_run.num_dot == 5  # with 9 steps
        refiner = stable_diffusion(diffusers.StableDiffusionXLImg2ImgPipeline, unet, xl=True)
        halfway = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
        late = {"image": halfway, "denoising_start": 0.7}
        check(refiner, dot, 10, 3, **inputs, **late, state_steps=True)
        check(refiner, dot, 10, 3, **inputs, image=picture(), strength=0.3)


@pytest.mark.supports("pipeline", "StableDiffusionControlNetPipeline")
class TestControlNet:
    """It steers Dash and Dot, and is evaluated for Dash only."""

    @pytest.fixture
    def pipe(self, unet):
        torch.manual_seed(0)
        controlnet = diffusers.ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(4, 8)
        )
        with torch.no_grad():
            for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
                block.weight.normal_(0, 0.1)  # they start at zero
        return stable_diffusion(
            diffusers.StableDiffusionControlNetPipeline, unet, controlnet=controlnet.eval()
        )

    @pytest.fixture
    def calls(self, pipe):
        """The size of ControlNet's input at each of its evaluations."""
        sizes = []
        pipe.controlnet.register_forward_pre_hook(lambda net, given: sizes.append(len(given[0])))
        return sizes

    def test_counts(self, pipe, dot, calls):
        inputs = {**text_inputs(), "image": picture()}
        check(pipe, dot, 6, 6, **inputs)
        assert vars(pipe.controlnet)["_compiled_call_impl"] is None
        calls.clear()
        latents(enable_morse(pipe, dot), plan="DoDooo", **inputs)
        assert calls == [4, 4]
        calls.clear()
        latents(pipe, plan="DoDooo", **inputs, guess_mode=True, guidance_scale=2.0)
        assert calls == [2, 2]  # for the text alone, not for the empty one

    def test_its_end_reaches_dot(self, pipe, dot, calls):
        enable_morse(pipe, dot)
        inputs = {**text_inputs(), "image": picture()}
        found = [latents(pipe, plan="Do", **inputs, control_guidance_end=end) for end in (1.0, 0.5)]
        assert calls == [4, 4, 4] and not torch.equal(*found)

    def test_dot_sees_the_features_of_the_latest_dash(self, pipe):
        seen = []

        def own(sample, timestep, jump, down_block_additional_residuals, **conditions):
            seen.append(down_block_additional_residuals[0])
            return torch.zeros_like(sample)

        latents(enable_morse(pipe, own), plan="DooDo", **text_inputs(), image=picture())
        assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
