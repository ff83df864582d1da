"""ControlNets, one or several: evaluated where Dash is, and steering Dot too."""

import diffusers
import pytest
import torch
from pipeline_checks import check, counted, latents, make_dot, own_dot
from tiny_pipelines import (
    TEXT_CHANNELS,
    picture,
    stable_diffusion,
    text_inputs,
    text_unet,
    tiny_vae,
    xl_unet,
)
from torch import nn

from morse import enable_morse
from morse.controlnet import LatestFeatures
from morse.denoisers import Call, Denoiser
from morse.plan import MorsePlan
from morse.summary import MorseRun
from morse.switch import Dispatcher


@pytest.fixture
def unet():
    return text_unet()


@pytest.fixture
def dot(unet):
    return make_dot(unet)


def controlnet(unet, seed=0):
    torch.manual_seed(seed)
    made = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    with torch.no_grad():
        for block in (*made.controlnet_down_blocks, made.controlnet_mid_block):
            block.weight.normal_(0, 0.1)  # they start at zero
    return made.eval()


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda module, given: calls.append(1))
    return calls


@pytest.mark.supports("interplay", "several ControlNets")
class TestSeveralControlNets:
    @pytest.fixture
    def pipe(self, unet):
        nets = [controlnet(unet, seed) for seed in range(2)]
        return stable_diffusion(diffusers.StableDiffusionControlNetPipeline, unet, controlnet=nets)

    @pytest.fixture
    def inputs(self):
        return {**text_inputs(), "image": [picture(), 1 - picture()]}

    def test_attached(self, pipe, dot, inputs):
        check(pipe, dot, 6, 6, **inputs, controlnet_conditioning_scale=[1.0, 0.5])
        assert vars(pipe.controlnet)["_compiled_call_impl"] is None

    def test_none_is_evaluated_where_dot_is(self, pipe, dot, inputs):
        calls = [count_calls(net) for net in pipe.controlnet.nets]
        latents(pipe, num_inference_steps=18, **inputs)
        assert [len(each) for each in calls] == [18, 18]
        enable_morse(pipe, dot)
        latents(pipe, plan="Doo" * 6, **inputs)
        assert [len(each) for each in calls] == [18 + 6, 18 + 6]
        assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (6, 12)

    def test_one_that_starts_or_ends_within_the_run_is_not_taken_from_before(
        self, pipe, dot, inputs
    ):
        """The strengths change there, so that features are computed anew, once."""
        enable_morse(pipe, dot)
        calls = count_calls(pipe.controlnet)
        bounds = {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [1.0, 1.0]}
        found = latents(pipe, plan="Dooooo", **inputs, **bounds)
        assert len(calls) == 2 and pipe.last_run.fallbacks == {}
        assert not torch.equal(latents(pipe, plan="Dooooo", **inputs), found)
        calls.clear()
        bounds = {"control_guidance_start": 0.0, "control_guidance_end": [0.5, 1.0]}
        latents(pipe, plan="DooDoo", **inputs, **bounds)
        assert len(calls) == 2  # it ends where Dash is next

    def test_both_reach_dot(self, pipe, inputs):
        seen = []

        def own(sample, timestep, jump, mid_block_additional_residual, **conditions):
            seen.append(mid_block_additional_residual)
            return torch.zeros_like(sample)

        enable_morse(pipe, own)
        for scale in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]):
            latents(pipe, plan="Do", **inputs, controlnet_conditioning_scale=scale)
        torch.testing.assert_close(seen[0] + seen[1], seen[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pipeline", "more"),
    [
        ("StableDiffusionControlNetImg2ImgPipeline", {"control_image": picture(), "strength": 0.8}),
        (
            "StableDiffusionControlNetInpaintPipeline",
            {"control_image": picture(), "mask_image": picture(channels=1).round()},
        ),
    ],
)
@pytest.mark.supports(
    "pipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
)
def test_controlnet_on_pictures(unet, dot, pipeline, more):
    pipe = stable_diffusion(getattr(diffusers, pipeline), unet, controlnet=controlnet(unet))
    calls = count_calls(pipe.controlnet)
    inputs = {**text_inputs(), "image": picture(), **more}
    check(pipe, dot, 5, 4 if "strength" in more else 5, **inputs)
    calls.clear()
    enable_morse(pipe, dot)
    latents(pipe, num_dash_steps=2, num_dot_steps=2, **inputs)
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{}, {"guess_mode": True}, {"control_guidance_start": 0.5}])
@pytest.mark.supports("pipeline", "StableDiffusionXLControlNetPipeline")
def test_controlnet_for_xl(options):
    unet = xl_unet()
    pipe = stable_diffusion(
        diffusers.StableDiffusionXLControlNetPipeline, unet, xl=True, controlnet=controlnet(unet)
    )
    calls = count_calls(pipe.controlnet)
    dot, inputs = make_dot(unet), {**text_inputs(pooled=True), "image": picture(), **options}
    check(pipe, dot, 6, 6, **inputs)
    calls.clear()
    latents(enable_morse(pipe, dot), plan="DooDoo", **inputs)
    assert len(calls) == 2


class TestUnderGuidance:
    """It runs where Dash runs in the place of a Dot of guided estimates."""

    def test_where_one_pass_is_never_made(self):
        unet = xl_unet()
        parts = {"xl": True, "controlnet": controlnet(unet)}
        pipe = stable_diffusion(diffusers.StableDiffusionXLControlNetPipeline, unet, **parts)
        inputs = {**text_inputs(pooled=True), "image": picture()}
        expected = latents(pipe, num_inference_steps=4, **inputs)
        calls = count_calls(pipe.controlnet)
        enable_morse(pipe, make_dot(unet, guidance="guided"))
        with pytest.warns(UserWarning, match="made none"):
            found = latents(pipe, plan="DooD", **inputs)
        assert torch.equal(found, expected) and len(calls) == counted(pipe)[0] == 4

    def test_where_the_scale_changes(self, unet):
        net = controlnet(unet)
        pipe = stable_diffusion(diffusers.StableDiffusionControlNetPipeline, unet, controlnet=net)
        calls = count_calls(net)
        enable_morse(pipe, make_dot(unet, guidance="guided"))

        def change(pipe, step, timestep, tensors):
            pipe._guidance_scale = 3.3 if step else 5.0
            return tensors

        options = {"guidance_scale": 5.0, "callback_on_step_end": change}
        latents(pipe, plan="DoooDo", image=picture(), **text_inputs(), **options)
        assert pipe.last_run.fallbacks == {"the guidance scale changed": 1}
        assert len(calls) == 3 and counted(pipe) == (3, 3)


class Plain(nn.Module):
    """Stands for a denoiser or a ControlNet."""

    def forward(self, sample, timestep):
        raise AssertionError("the test says what it computes")


@pytest.mark.parametrize("branches", [1, 2])
def test_a_second_pass_over_the_timesteps_has_features_of_its_own(branches):
    run, computed, sample = MorseRun(MorsePlan.from_string("Do"), 4.0), [], torch.zeros(1, 1, 2, 2)
    unet, controlnet, scheduler = Plain(), Plain(), diffusers.DDIMScheduler()
    denoisers = [Denoiser("unet", unet, own_dot)]
    dispatcher = Dispatcher(run, denoisers, scheduler, lambda: 1.0, controlnet)
    scheduler.set_timesteps(2)
    for index in torch.arange(2).repeat_interleave(branches).repeat(2):
        arguments = (sample, scheduler.timesteps[index]), {}
        dispatcher.answer(controlnet, lambda *_: (computed.append(1), sample)[1:], *arguments)
        dispatcher.answer(unet, lambda *_: (sample,), *arguments)
    assert len(computed) == run.num_dash == run.num_dot == 2 * branches


@pytest.mark.parametrize(
    "make",
    [
        lambda tensor: tensor,
        lambda tensor: (tensor,),
        lambda tensor: [tensor, None],
        lambda tensor: {"mid": tensor, "down": (tensor, tensor)},
    ],
)
def test_features_outlive_the_buffers_they_are_computed_in(make):
    """Compiled models compute the next ones in the same place."""
    latest, buffer = LatestFeatures(), torch.zeros(2)
    call = Call(torch.zeros(1), 9, {})
    computed = latest.answer(0, "dash", call, lambda: make(buffer))
    assert type(computed) is type(make(buffer))
    buffer.add_(1)
    torch.testing.assert_close(latest.answer(1, "dot", call, None), make(torch.zeros(2)))


@pytest.mark.supports("pipeline, own Dot", "FluxControlNetPipeline")
def test_controlnet_for_a_transformer():
    """Flux: scaled timesteps, and features for one of the two kinds of blocks only."""
    shape = {
        "in_channels": 16,
        "attention_head_dim": 12,
        "num_attention_heads": 1,
        "joint_attention_dim": TEXT_CHANNELS,
        "pooled_projection_dim": TEXT_CHANNELS,
        "axes_dims_rope": (4, 4, 4),
    }
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(**shape, num_layers=1, num_single_layers=1)
    net = diffusers.FluxControlNetModel(**shape, num_layers=1, num_single_layers=0)
    with torch.no_grad():
        net.controlnet_blocks[0].weight.normal_(0, 0.3)
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.0)
    pipe = diffusers.FluxControlNetPipeline(
        **dict.fromkeys(parts),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=transformer.eval(),
        controlnet=net.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    texts = text_inputs(pooled=True)
    inputs = {name: texts[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    inputs |= {"control_image": picture(), "height": 32, "width": 32}
    check(pipe, own_dot, 6, 6, **inputs)
    calls = count_calls(net)
    latents(enable_morse(pipe, own_dot), plan="DooDoo", **inputs)
    assert len(calls) == 2 and counted(pipe) == (2, 4)
