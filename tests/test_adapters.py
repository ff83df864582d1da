"""IP-Adapters and T2I-Adapters beside a weight-shared Dot, on tiny random models."""

import diffusers
import pytest
import torch
from pipeline_checks import check, latents, make_dot
from tiny_pipelines import TEXT_CHANNELS, picture, stable_diffusion, text_inputs, text_unet, xl_unet
from torch.nn import functional

from morse import MorseDot, disable_morse, enable_morse

IMAGE_CHANNELS = 6


@pytest.fixture
def unet():
    return text_unet()


@pytest.fixture
def dot(unet):
    return make_dot(unet)


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


@pytest.mark.supports("interplay", "IP-Adapter")
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


@pytest.mark.supports(
    "pipeline", "StableDiffusionAdapterPipeline", "StableDiffusionXLAdapterPipeline"
)
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
