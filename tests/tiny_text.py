"""Tiny random text-to-image pipelines with tokenizers and text encoders."""

import string

import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tiny_pipelines import TEXT_CHANNELS, text_unet, tiny_vae
from tiny_transformers import tiny_flux
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

TOKENS = 8
LONG = 512  # what Flux fills its second text up to


def tokenizer():
    """Every letter is a token."""
    letters = list(string.ascii_lowercase)
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def text_encoder(projected=False, half=False, tokens=TOKENS):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=TEXT_CHANNELS // 2 if half else TEXT_CHANNELS,
        intermediate_size=8,
        projection_dim=TEXT_CHANNELS,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def grey_vae():
    """8x8 grey pictures have 4x4 latents."""
    options = {"in_channels": 1, "out_channels": 1, "mid_block_add_attention": False}
    return tiny_vae(4, norm_num_groups=2, sample_size=8, **options)


def scheduler(**options):
    return DDIMScheduler(clip_sample=False, timestep_spacing="trailing", steps_offset=1, **options)


def text_pipeline(unet=None, **options):
    """StableDiffusionPipeline for 8x8 grey pictures."""
    unet = unet or text_unet()
    unet.register_to_config(sample_size=4)
    pipe = StableDiffusionPipeline(
        vae=grey_vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler(**options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def xl_pipeline(unet):
    unet.register_to_config(sample_size=4)
    pipe = StableDiffusionXLPipeline(
        vae=grey_vae(),
        text_encoder=text_encoder(half=True),
        text_encoder_2=text_encoder(projected=True, half=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit_pipeline():
    """DiTPipeline with a learned variance, whose null class is its 1000th."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        norm_num_groups=4,
    ).eval()
    pipe = DiTPipeline(transformer, grey_vae(), scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3_pipeline(shift=3.0):
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=8,
        pooled_projection_dim=16,
        pos_embed_max_size=4,
    ).eval()
    vae = grey_vae()
    vae.register_to_config(shift_factor=0.06)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=text_encoder(projected=True),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(projected=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_pipeline():
    """FluxPipeline for 8x8 grey pictures; CLIP stands for T5, of which only states are read."""
    vae = grey_vae()
    vae.register_to_config(shift_factor=0.06)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(tokens=LONG),
        tokenizer_2=tokenizer(),
        transformer=tiny_flux(),
    )
    pipe.default_sample_size = 4
    pipe.set_progress_bar_config(disable=True)
    return pipe
