"""Pipelines whose denoiser is a prior or a decoder, mostly with a Dot of the user's own."""

import inspect
from types import MappingProxyType

import diffusers
import pytest
import torch
from pipeline_checks import check, counted, latents, make_dot, own_dot
from tiny_pipelines import TEXT_CHANNELS, picture, text_unet, tiny_vae
from torch import nn

from morse import enable_morse
from morse.saved_plans import scheduler_options


class KandinskyPrior(diffusers.KandinskyV22PriorPipeline):
    """With texts that are embedded already."""

    def _encode_prompt(self, *args):
        generator = torch.Generator().manual_seed(3)
        shapes = (4, 8), (4, 5, 8)
        embeds, hidden = (torch.randn(shape, generator=generator) for shape in shapes)
        return embeds, hidden, torch.ones(4, 5, dtype=torch.bool)

    def get_zero_embed(self, batch_size=1, device=None):
        return torch.zeros(batch_size, 8)


@pytest.mark.supports("pipeline, own Dot", "KandinskyV22PriorPipeline")
def test_kandinsky_prior():
    """Its samples are vectors, (B, C)."""
    torch.manual_seed(0)
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8, num_embeddings=5
    )
    nn.init.ones_(prior.clip_std)  # scales the result, and starts at zero
    scheduler = diffusers.UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log")
    parts = dict.fromkeys(("image_encoder", "text_encoder", "tokenizer", "image_processor"))
    pipe = KandinskyPrior(prior=prior.eval(), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    check(pipe, own_dot, 6, 6, prompt=["", ""], output_type="pt")


def cascade_unet(**options):
    torch.manual_seed(0)
    options = {
        "conditioning_dim": 8,
        "timestep_ratio_embedding_dim": 8,
        "block_out_channels": (8, 8),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "clip_text_pooled_in_channels": 8,
        "switch_level": (False,),
        "clip_seq": 1,
        **options,
    }
    unet = diffusers.models.StableCascadeUNet(**options).eval()
    with torch.no_grad():
        nn.init.normal_(unet.clf[1].weight, 0, 0.3)  # it starts at zero
    return unet


@pytest.mark.supports(
    "pipeline, own Dot", "StableCascadePriorPipeline", "StableCascadeDecoderPipeline"
)
class TestStableCascade:
    """Its scheduler has one timestep more than it makes steps and tells no number of steps."""

    @staticmethod
    def texts():
        generator = torch.Generator().manual_seed(3)
        names = ("", "_pooled")
        embeds = {
            f"{sign}prompt_embeds{name}": torch.randn(
                2, 5 if not name else 1, 8, generator=generator
            )
            for name in names
            for sign in ("", "negative_")
        }
        return embeds

    def test_prior(self):
        prior = cascade_unet(
            in_channels=4, out_channels=4, clip_text_in_channels=8, clip_image_in_channels=8
        )
        # The text encoder is asked for its dtype only: the texts are embedded already.
        parts = {"tokenizer": None, "text_encoder": tiny_vae(), "prior": prior}
        pipe = diffusers.StableCascadePriorPipeline(
            **parts, scheduler=diffusers.DDPMWuerstchenScheduler(), resolution_multiple=42.67
        )
        pipe.set_progress_bar_config(disable=True)
        options = {"height": 256, "width": 256, "guidance_scale": 4.0, "output_type": "pt"}
        check(pipe, own_dot, 6, 6, **self.texts(), **options)
        pipe.to(torch.bfloat16)  # rounds the timesteps too
        texts = {name: text.bfloat16() for name, text in self.texts().items()}
        latents(enable_morse(pipe, own_dot), plan="Dooo" * 10, **texts, **options)
        assert counted(pipe) == (10, 30) and pipe.last_run.fallbacks == {}

    def test_decoder(self):
        decoder = cascade_unet(in_channels=4, out_channels=4, effnet_in_channels=4)
        parts = {"tokenizer": None, "text_encoder": None, "vqgan": None, "decoder": decoder}
        pipe = diffusers.StableCascadeDecoderPipeline(
            **parts, scheduler=diffusers.DDPMWuerstchenScheduler(), latent_dim_scale=2.0
        )
        pipe.set_progress_bar_config(disable=True)
        image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        options = {"guidance_scale": 1.1, "image_embeddings": image}
        check(pipe, own_dot, 6, 6, **self.texts(), **options)


class OwnUNet(diffusers.UNet2DConditionModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class TestKandinsky:
    """The decoder's text is None, which its denoiser's forward method has no default for."""

    IMAGE = MappingProxyType(
        {
            "image_embeds": torch.full((1, TEXT_CHANNELS), 0.5),
            "negative_image_embeds": torch.zeros(1, TEXT_CHANNELS),
        }
    )
    SIZE = MappingProxyType({"height": 64, "width": 64})

    @pytest.fixture
    def parts(self):
        unet = text_unet(
            out_channels=8,
            encoder_hid_dim=TEXT_CHANNELS,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image",
        )
        vae = diffusers.VQModel(
            latent_channels=4,
            block_out_channels=(4, 4),
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
        scheduler = diffusers.DDIMScheduler(clip_sample=False)
        return {"unet": unet, "scheduler": scheduler, "movq": vae}

    @pytest.mark.supports("pipeline", "KandinskyV22Pipeline")
    @pytest.mark.parametrize("kind", [diffusers.UNet2DConditionModel, OwnUNet])
    def test_decoder(self, parts, kind):
        parts["unet"].__class__ = kind
        pipe = diffusers.KandinskyV22Pipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
        check(pipe, make_dot(pipe.unet), 6, 6, **self.IMAGE, **self.SIZE)

    @pytest.mark.supports("pipeline", "KandinskyV22Img2ImgCombinedPipeline")
    def test_prior_and_decoder_in_one(self, parts):
        """The decoder's pipeline cuts the timesteps, and takes the plan's scheduler."""
        kind = diffusers.KandinskyV22Img2ImgCombinedPipeline
        names = inspect.signature(kind).parameters
        pipe = kind(**parts, **{name: None for name in names if name.startswith("prior_")})
        pipe.decoder_pipe.set_progress_bar_config(disable=True)
        pipe.prior_pipe = lambda **arguments: tuple(self.IMAGE.values())
        pipe.set_progress_bar_config = lambda **options: None
        enable_morse(pipe, make_dot(pipe.unet))
        image = {"prompt": "x", "image": picture(1), "strength": 0.5}
        latents(pipe, plan="DooDo", **image, **self.SIZE)
        assert counted(pipe) == (2, 3) and pipe.last_run.fallbacks == {}
        before = pipe.scheduler
        with scheduler_options(pipe, {"timestep_spacing": "trailing"}):
            assert pipe.decoder_pipe.scheduler is pipe.scheduler is not before
            latents(pipe, plan="DooDo", **image, **self.SIZE)
        assert counted(pipe) == (2, 3) and pipe.last_run.fallbacks == {}
        assert pipe.decoder_pipe.scheduler is pipe.scheduler is before
