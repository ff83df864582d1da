"""ControlNets, IP-Adapters and T2I-Adapters beside a weight-shared Dot, on tiny random models."""

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
from torch.nn import functional

from morse import MorseDot, disable_morse, enable_morse

IMAGE_CHANNELS = 6


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


def ip_adapter_weights(unet, seed=5):
    generator = torch.Generator().manual_seed(seed)
    projection = {
        "proj.weight": torch.randn(4 * TEXT_CHANNELS, IMAGE_CHANNELS, generator=generator),
        "proj.bias": torch.zeros(4 * TEXT_CHANNELS),
        "norm.weight": torch.ones(TEXT_CHANNELS),
        "norm.bias": torch.zeros(TEXT_CHANNELS),
    }
    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    attention = {}
    for index, name in enumerate(layers):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for key in ("to_k_ip", "to_v_ip"):
            weight = torch.randn(width, TEXT_CHANNELS, generator=generator)
            attention[f"{2 * index + 1}.{key}.weight"] = weight
    return {"image_proj": projection, "ip_adapter": attention}


def load_ip_adapter(pipe):
    weights = ip_adapter_weights(pipe.unet)
    pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)


class TestIPAdapter:
    @pytest.fixture
    def pipe(self, unet):
        return stable_diffusion(diffusers.StableDiffusionPipeline, unet)

    @pytest.fixture
    def inputs(self):
        embeds = torch.randn(4, 1, IMAGE_CHANNELS, generator=torch.Generator().manual_seed(6))
        return {**text_inputs(), "ip_adapter_image_embeds": [embeds]}

    @pytest.mark.parametrize("merge_lora", [True, False])
    def test_loaded_before_or_after_dot_is_attached(self, pipe, dot, inputs, merge_lora):
        text = text_inputs()
        enable_morse(pipe, dot, merge_lora=merge_lora)
        plain = latents(pipe, plan="DoDo", **text)
        load_ip_adapter(pipe)
        after = latents(pipe, plan="DoDo", **inputs)
        assert pipe.last_run.num_dot == 2 and pipe.last_run.fallbacks == {}
        disable_morse(pipe)
        enable_morse(pipe, dot, merge_lora=merge_lora)
        assert torch.equal(latents(pipe, plan="DoDo", **inputs), after)
        pipe.unload_ip_adapter()
        assert torch.equal(latents(pipe, plan="DoDo", **text), plain)

    def test_attached(self, pipe, dot, inputs):
        load_ip_adapter(pipe)
        check(pipe, dot, 6, 6, **inputs)

    def test_dot_itself_sees_it_and_its_scale(self, pipe, inputs):
        """Not only through Dash's estimate: this Dot looks at sample and conditions alone."""
        dot, calls = make_dot(pipe.unet, independent=True), []
        enable_morse(pipe, dot)
        load_ip_adapter(pipe)
        hook = dot.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
        latents(pipe, plan="Do", **inputs)
        hook.remove()
        [(_, args, kwargs, full)] = calls
        embeds = kwargs["added_cond_kwargs"]["image_embeds"]

        @torch.no_grad()
        def output(scale, embeds=embeds):
            pipe.set_ip_adapter_scale(scale)
            return dot(*args, **kwargs | {"added_cond_kwargs": {"image_embeds": embeds}})

        none = output(0.0)
        assert torch.equal(output(1.0), full) and not torch.allclose(full, none)
        assert not torch.allclose(output(1.0, [-embeds[0]]), full)
        assert torch.equal(output(0.0, [-embeds[0]]), none)

    def test_a_dot_is_the_same_whether_made_with_it_or_without(self, pipe, dot, tmp_path):
        load_ip_adapter(pipe)
        made = MorseDot.from_dash(pipe.unet, 1, lora_rank=2)
        assert made.config.dash_fingerprint == dot.config.dash_fingerprint
        assert made.config.lora_specs == dot.config.lora_specs
        dot.save_pretrained(tmp_path)
        enable_morse(pipe, MorseDot.from_pretrained(tmp_path))


def t2i_adapter():
    torch.manual_seed(0)
    return diffusers.T2IAdapter(
        channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    ).eval()


def attention_first(unet):
    """The order of blocks that T2I-Adapters are made for, as in Stable Diffusion's UNets."""
    torch.manual_seed(0)
    order = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    blocks = dict(zip(("down_block_types", "up_block_types"), order, strict=True))
    return type(unet).from_config({**unet.config, **blocks}).eval()


class TestT2IAdapter:
    @pytest.fixture
    def unet(self):
        return attention_first(text_unet())

    @pytest.fixture
    def pipe(self, unet):
        pipeline = diffusers.StableDiffusionAdapterPipeline
        return stable_diffusion(pipeline, unet, adapter=t2i_adapter())

    def test_attached(self, pipe, dot):
        inputs = {**text_inputs(), "image": picture()}
        check(pipe, dot, 6, 6, **inputs, adapter_conditioning_scale=0.8)

    def test_its_features_are_pooled_for_dot(self, pipe, dot):
        """Inside Dot, Dash's blocks get averages of what they get in Dash."""
        given = []
        block_class = type(pipe.unet.down_blocks[0])
        forward = block_class.forward

        def listening(self, *args, **kwargs):
            given.append(kwargs["additional_residuals"].clone())
            return forward(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_class, "forward", listening)
            latents(enable_morse(pipe, dot), plan="Do", **text_inputs(), image=picture())
        dash, small = given
        assert torch.equal(functional.avg_pool2d(dash, 2), small) and small.abs().max() > 0

    @pytest.mark.parametrize("factor", [1.0, 0.5])
    def test_for_xl(self, factor):
        """Also where its features end within the run, which takes nothing from Dot."""
        unet = attention_first(xl_unet())
        pipeline = diffusers.StableDiffusionXLAdapterPipeline
        pipe = stable_diffusion(pipeline, unet, xl=True, adapter=t2i_adapter())
        inputs = {**text_inputs(pooled=True), "image": picture(), "height": 32, "width": 32}
        check(pipe, make_dot(unet), 6, 6, **inputs, adapter_conditioning_factor=factor)
