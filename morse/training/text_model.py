"""The parts of a small text-to-image Dash, and the StableDiffusionPipeline that they make."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

    from morse.training.text_dash import TrainTextDashConfig

TEXT_HEAD_SIZE = 16


class TextDash(nn.Module):
    """The denoiser and its text encoder, trained as one network."""

    def __init__(self, unet: "UNet2DConditionModel", text_encoder: "CLIPTextModel") -> None:
        """Keep both."""
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, sample: Tensor, timestep: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            sample: Noisy latents, (B, C, h, w).
            timestep: (B,).
            tokens: Different prompts, (U, L).
            rows: Which of them belongs to each sample, (B,).
        """
        text = self.text_encoder(tokens)[0][rows]
        return self.unet(sample, timestep, text, return_dict=False)[0]


def tokenize(tokenizer: "CLIPTokenizer", prompts: list[str]) -> Tensor:
    """Turn prompts into token numbers as StableDiffusionPipeline does, (len(prompts), L)."""
    return tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def build_tokenizer(config: "TrainTextDashConfig", prompts: list[str]) -> "CLIPTokenizer":
    """Train a byte-pair tokenizer of CLIP's kind on the different prompts."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer().train_new_from_iterator(
        [prompts], vocab_size=config.vocabulary_size, show_progress=False
    )
    tokenizer.model_max_length = config.max_tokens
    return tokenizer


def build_model(
    config: "TrainTextDashConfig", vae: "AutoencoderKL", tokenizer: "CLIPTokenizer"
) -> TextDash:
    """Build denoiser and text encoder with seeded weights; cross-attention below the top level."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    levels, channels = config.block_out_channels, vae.config.latent_channels
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_channels,
        intermediate_size=4 * config.text_channels,
        projection_dim=config.text_channels,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_channels // TEXT_HEAD_SIZE,
        max_position_embeddings=config.max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = UNet2DConditionModel(
            sample_size=vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=levels,
            layers_per_block=config.layers_per_block,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(levels) - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (len(levels) - 1) + ("UpBlock2D",),
            cross_attention_dim=config.text_channels,
            attention_head_dim=4,
            norm_num_groups=math.gcd(32, *levels),
        )
        return TextDash(unet, CLIPTextModel(text))


def make_pipeline(
    model: TextDash,
    vae: "AutoencoderKL",
    tokenizer: "CLIPTokenizer",
    scheduler: "DDIMScheduler",
) -> "StableDiffusionPipeline":
    """Put the parts together, without a safety checker."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
