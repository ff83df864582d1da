"""Train a small autoencoder (AutoencoderKL) for latent diffusion on small images."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morse.files import write_json
from morse.settings import option, require, require_least, require_positive
from morse.training.common import TrainingConfig
from morse.training.data import (
    ImageDataset,
    in_batches,
    open_training_images,
    to_model_range,
)
from morse.training.output import claim_output, record_run
from morse.training.run import LossFunction, TrainingRun

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_STATISTICS_IMAGES = 10_000
_BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class TrainVaeConfig(TrainingConfig):
    """Train a small AutoencoderKL and save it for a latent diffusion pipeline."""

    resolution: int = option(32, "height and width of the images")
    channels: Literal[1, 3] = option(1, "1 for grey, 3 for colour")
    block_out_channels: tuple[int, ...] = option(
        (32, 64), "channels of the levels; each but one halves the size"
    )
    latent_channels: int = option(4, "channels of the latents")
    kl_weight: float = option(1e-4, "weight of the divergence from a standard normal")

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        super().__post_init__()
        levels = self.block_out_channels
        require(len(levels) > 0 and min(levels) > 0, "block_out_channels", levels, "positive")
        require_positive(self, ("latent_channels",))
        require_least(self, {"kl_weight": 0})
        factor = 2 ** (len(levels) - 1)
        fits = self.resolution > 0 and self.resolution % factor == 0
        require(fits, "resolution", self.resolution, f"a positive multiple of {factor}")


class Autoencoding(nn.Module):
    """Encodes, draws latents, decodes: all of the autoencoder that training needs in one call."""

    def __init__(self, vae: "AutoencoderKL") -> None:
        """Keep the autoencoder."""
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstructions and each image's divergence from a standard normal in nats, (B,).

        Args:
            images: (B, C, H, W) in [-1, 1].
            noise: Standard normal, of the latents' shape.
        """
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, posterior.kl()


def build_vae(config: TrainVaeConfig) -> "AutoencoderKL":
    """Build the autoencoder with seeded weights, without self-attention."""
    from diffusers import AutoencoderKL

    levels = config.block_out_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return AutoencoderKL(
            in_channels=config.channels,
            out_channels=config.channels,
            block_out_channels=levels,
            down_block_types=("DownEncoderBlock2D",) * len(levels),
            up_block_types=("UpDecoderBlock2D",) * len(levels),
            latent_channels=config.latent_channels,
            norm_num_groups=math.gcd(32, *levels),
            sample_size=config.resolution,
            mid_block_add_attention=False,
            force_upcast=False,
        )


def vae_loss(config: TrainVaeConfig) -> LossFunction:
    """Give mean absolute error plus weighted divergence, both per pixel (Rombach et al. 2022)."""
    size = config.resolution // 2 ** (len(config.block_out_channels) - 1)

    def compute_loss(model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
        clean = to_model_range(images)
        shape = (len(clean), config.latent_channels, size, size)
        noise = torch.randn(shape, generator=generator, device=clean.device)
        restored, divergence = model(clean, noise)
        pixels = clean[0].numel()
        return F.l1_loss(restored.float(), clean) + config.kl_weight * divergence.mean() / pixels

    return compute_loss


def _batches(dataset: ImageDataset, count: int, device: torch.device) -> Iterator[Tensor]:
    for images in in_batches(dataset, range(min(count, len(dataset))), _BATCH_SIZE):
        yield to_model_range(images).to(device)


@torch.no_grad()
def measure_scale(vae: "AutoencoderKL", dataset: ImageDataset, device: torch.device) -> float:
    """Give the factor that brings latents to unit variance (Rombach et al. 2022, section G)."""
    latents = [
        vae.encode(images).latent_dist.mean
        for images in _batches(dataset, _STATISTICS_IMAGES, device)
    ]
    return float(1 / torch.cat(latents).std())


@torch.no_grad()
def measure_psnr(vae: "AutoencoderKL", dataset: ImageDataset, device: torch.device) -> float:
    """Give the PSNR of reconstructions over a dataset, in dB, for pixels in [0, 1]."""
    errors = []
    for images in _batches(dataset, _STATISTICS_IMAGES, device):
        restored = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        errors.append(((restored - images) / 2).square().flatten(1).mean(1))
    return float(-10 * torch.cat(errors).mean().log10())


def train_vae(config: TrainVaeConfig) -> Path:
    """Train an autoencoder and save it into `config.output_dir` for `AutoencoderKL`."""
    accelerator = claim_output(config)
    train, test = (
        open_training_images(config, config.resolution, config.channels, split)
        for split in ("train", "test")
    )
    record_run(config, accelerator)
    run = TrainingRun(config, accelerator, Autoencoding(build_vae(config)), train, vae_loss(config))
    run.train()
    if accelerator.is_main_process:
        trained = Autoencoding(build_vae(config)).to(accelerator.device).eval()
        run.copy_weights_to(trained)
        vae = trained.vae
        vae.register_to_config(scaling_factor=measure_scale(vae, train, accelerator.device))
        psnr = measure_psnr(vae, test, accelerator.device)
        accelerator.print(f"reconstruction on held-out images: {psnr:.2f} dB")
        vae.save_pretrained(config.output_dir)
        write_json(config.output_dir / "validation.json", {"psnr": psnr})
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return config.output_dir
