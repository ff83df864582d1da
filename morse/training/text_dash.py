"""Train a small text-to-image Dash in an autoencoder's latents: a StableDiffusionPipeline.

The text encoder has CLIP's structure and learns together with the denoiser, from the captions of
the training images alone; the autoencoder is given and stays as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morse.settings import REQUIRED, option, require, require_least, require_positive
from morse.training.captions import caption_images
from morse.training.common import TrainingConfig, derive_seed
from morse.training.data import (
    ImageDataset,
    in_batches,
    open_training_images,
    to_model_range,
)
from morse.training.latents import LatentCodec
from morse.training.output import claim_output, record_run, samples_file, save_grid
from morse.training.run import LossFunction, TrainingRun
from morse.training.text_model import (
    TEXT_HEAD_SIZE,
    TextDash,
    build_model,
    build_tokenizer,
    make_pipeline,
    tokenize,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

_ENCODING_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class TrainTextDashConfig(TrainingConfig):
    """Train a small text-to-image model (Dash) and save it as a StableDiffusionPipeline."""

    vae: Path = option(REQUIRED, "folder of the AutoencoderKL in whose latents it works")
    class_names: tuple[str, ...] | None = option(
        None, "captions by class number, for images with labels"
    )
    caption_column: str | None = option(
        None, "captions: a hub dataset's column, or a name in the nearest metadata.jsonl"
    )
    block_out_channels: tuple[int, ...] = option((64, 128), "channels of the UNet's levels")
    layers_per_block: int = option(1, "residual blocks a level")
    text_channels: int = option(64, "width of the text encoder")
    text_layers: int = option(2, "layers of the text encoder")
    max_tokens: int = option(8, "tokens of a prompt, both ends included")
    vocabulary_size: int = option(1000, "most tokens of the tokenizer")
    proportion_empty_prompts: float = option(0.1, "captions left out, for classifier-free guidance")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = option(
        "linear", "noise schedule of 1,000 steps"
    )
    save_images_steps: int = option(2000, "updates between two grids of samples; 0 for none")

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        super().__post_init__()
        if (self.class_names is None) == (self.caption_column is None):
            raise ValueError(
                f"class_names is {self.class_names} and caption_column is {self.caption_column}; "
                "give exactly one of the two"
            )
        levels = self.block_out_channels
        fits = len(levels) > 1 and min(levels) > 0 and all(width % 8 == 0 for width in levels)
        require(fits, "block_out_channels", levels, "two or more multiples of 8")
        fits = self.text_channels > 0 and self.text_channels % TEXT_HEAD_SIZE == 0
        require(fits, "text_channels", self.text_channels, f"a multiple of {TEXT_HEAD_SIZE}")
        require_positive(self, ("vocabulary_size", "layers_per_block", "text_layers"))
        require_least(self, {"max_tokens": 3, "save_images_steps": 0})
        share = self.proportion_empty_prompts
        require(0 <= share <= 1, "proportion_empty_prompts", share, "in [0, 1]")


class EncodedImages:
    """Latents and prompts of all training images; a batch is the indices of its images.

    Attributes:
        latents: Modes of the posteriors, of about unit variance, (N, C, h, w).
        tokens: The different prompts, the empty one first, (U, L).
        rows: Each image's prompt, (N,).
    """

    def __init__(
        self,
        dataset: ImageDataset,
        vae: "AutoencoderKL",
        tokenizer: "CLIPTokenizer",
        prompts: list[str],
        rows: Tensor,
    ) -> None:
        """Encode all images, and the different prompts that `rows` (N,) are numbers of."""
        self.tokens = tokenize(tokenizer, ["", *prompts]).to(vae.device)
        self.rows = (rows + 1).to(vae.device)
        self.latents = _encode_images(dataset, LatentCodec(vae), vae.device)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Give the indices themselves; the loss looks them up."""
        return torch.tensor(indices)


def _encode_images(dataset: ImageDataset, codec: LatentCodec, device: torch.device) -> Tensor:
    batches = in_batches(dataset, range(len(dataset)), _ENCODING_BATCH)
    return torch.cat([codec.encode(to_model_range(images).to(device)) for images in batches])


def text_dash_loss(
    config: TrainTextDashConfig, encoded: EncodedImages, scheduler: "DDIMScheduler"
) -> LossFunction:
    """Give the denoising loss, with some of the prompts left out (Ho & Salimans 2022)."""

    def compute_loss(model: nn.Module, indices: Tensor, generator: torch.Generator) -> Tensor:
        device = encoded.latents.device
        indices = indices.to(device)
        clean = encoded.latents[indices]
        dropped = torch.rand(len(indices), generator=generator, device=device)
        rows = encoded.rows[indices] * (dropped >= config.proportion_empty_prompts)
        steps = scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (len(clean),), generator=generator, device=device)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        used, rows = rows.unique(return_inverse=True)
        return F.mse_loss(model(noisy, timesteps, encoded.tokens[used], rows).float(), noise)

    return compute_loss


def _sample_saver(
    config: TrainTextDashConfig,
    run: TrainingRun,
    pipeline: "StableDiffusionPipeline",
    prompts: list[str],
) -> Callable[[int], None]:
    """Give a function that draws a column of eight pictures for each prompt, with a step's weights.

    `pipeline` is overwritten with the weights each time.
    """
    model = TextDash(pipeline.unet, pipeline.text_encoder)
    shown = prompts[:10]

    def save_samples(step: int) -> None:
        if config.save_images_steps == 0 or step % config.save_images_steps:
            return
        run.copy_weights_to(model)
        seeds = [derive_seed(config.seed, row) for row in range(8) for _ in shown]
        images = pipeline(
            shown * 8,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            guidance_scale=3.0,
            num_inference_steps=25,
        ).images
        save_grid(images, 8, samples_file(config, step))

    return save_samples


def _load_vae(folder: Path) -> "AutoencoderKL":
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if vae.config.get(name):
            raise ValueError(
                f"vae is {folder}, whose config has {name}={vae.config[name]}, but a "
                "StableDiffusionPipeline, as which the result is saved, decodes without it; give "
                "an AutoencoderKL that has only a scaling_factor, such as train_vae's"
            )
    return vae.requires_grad_(False).eval()


def train_text_dash(config: TrainTextDashConfig) -> Path:
    """Train a text-to-image Dash and save it for `StableDiffusionPipeline.from_pretrained`."""
    from diffusers import DDIMScheduler

    accelerator = claim_output(config)
    vae = _load_vae(config.vae).to(accelerator.device)
    size = (vae.config.sample_size, vae.config.in_channels)
    dataset = open_training_images(config, *size, caption_column=config.caption_column)
    prompts, rows = caption_images(dataset, config.class_names)
    record_run(config, accelerator)
    tokenizer = build_tokenizer(config, prompts)
    scheduler = DDIMScheduler(
        beta_schedule=config.ddpm_beta_schedule,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    encoded = EncodedImages(dataset, vae, tokenizer, prompts, rows)
    model, trained = (build_model(config, vae, tokenizer) for _ in range(2))
    run = TrainingRun(
        config, accelerator, model, encoded, text_dash_loss(config, encoded, scheduler)
    )
    trained = trained.to(accelerator.device).eval()
    pipeline = make_pipeline(trained, vae, tokenizer, scheduler)
    run.train(_sample_saver(config, run, pipeline, prompts), outcome=partial(samples_file, config))
    if accelerator.is_main_process:
        run.copy_weights_to(trained)
        pipeline.save_pretrained(config.output_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return config.output_dir
