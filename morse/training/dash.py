"""Train a small Dash: an ordinary unconditional diffusion model, saved as a diffusers pipeline."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morse.settings import option, require, require_least, require_positive
from morse.training.common import TrainingConfig, derive_seed
from morse.training.data import open_training_images, to_model_range
from morse.training.output import begin_run, samples_file, save_grid
from morse.training.run import LossFunction, TrainingRun

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel


@dataclass(frozen=True, kw_only=True)
class TrainDashConfig(TrainingConfig):
    """Train a small unconditional diffusion model (Dash) and save it as a DDPMPipeline."""

    resolution: int = option(32, "height and width of the images")
    channels: Literal[1, 3] = option(1, "1 for grey, 3 for colour")
    block_out_channels: tuple[int, ...] = option((32, 64, 64), "channels of the UNet's levels")
    layers_per_block: int = option(1, "residual blocks a level")
    horizontal_flip: bool = option(False, "mirror half of the images")
    ddpm_num_steps: int = option(1000, "steps of the noise schedule")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = option(
        "linear", "noise schedule"
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = option(
        "epsilon", "what the model predicts"
    )
    save_images_steps: int = option(1000, "updates between two grids of samples; 0 for none")

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        super().__post_init__()
        levels = self.block_out_channels
        require(len(levels) > 0 and min(levels) > 0, "block_out_channels", levels, "positive")
        require_positive(self, ("layers_per_block", "ddpm_num_steps", "resolution"))
        require_least(self, {"save_images_steps": 0})
        halvings = len(levels) - 1
        factor = 2**halvings
        require(
            self.resolution % factor == 0,
            "resolution",
            self.resolution,
            f"a multiple of {factor}, because {len(levels)} levels halve it {halvings} times",
        )
        require(levels[-1] % 8 == 0, "block_out_channels", levels, "a multiple of 8 at the end")


def build_unet(config: TrainDashConfig) -> "UNet2DModel":
    """Build the UNet with seeded weights; self-attention only at its lowest resolution."""
    from diffusers import UNet2DModel

    levels = config.block_out_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return UNet2DModel(
            sample_size=config.resolution,
            in_channels=config.channels,
            out_channels=config.channels,
            block_out_channels=levels,
            layers_per_block=config.layers_per_block,
            down_block_types=("DownBlock2D",) * (len(levels) - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (len(levels) - 1),
            norm_num_groups=math.gcd(32, *levels),
        )


def dash_loss(config: TrainDashConfig, scheduler: "DDPMScheduler") -> LossFunction:
    """Give the denoising loss (Ho et al. 2020, Equation 14) for `scheduler`'s noise schedule."""

    def compute_loss(model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
        clean, device = to_model_range(images), images.device
        if config.horizontal_flip:
            flip = torch.rand(len(clean), 1, 1, 1, generator=generator, device=device) < 0.5
            clean = torch.where(flip, clean.flip(-1), clean)
        timesteps = torch.randint(
            config.ddpm_num_steps, (len(clean),), generator=generator, device=device
        )
        noise = torch.randn(clean.shape, generator=generator, device=device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        if device.type == "cuda":
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        target = noise
        if config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(clean, noise, timesteps)
        elif config.prediction_type == "sample":
            target = clean
        return F.mse_loss(model(noisy, timesteps).sample.float(), target)

    return compute_loss


def _sample_saver(
    config: TrainDashConfig, run: TrainingRun, scheduler: "DDPMScheduler"
) -> Callable[[int], None]:
    """Give a function that draws the same 16 pictures with the weights of a step."""
    from diffusers import DDIMPipeline, DDIMScheduler

    unet = build_unet(config).to(run.accelerator.device).eval()
    pipeline = DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config))
    pipeline.set_progress_bar_config(disable=True)

    def save_samples(step: int) -> None:
        if config.save_images_steps == 0 or step % config.save_images_steps:
            return
        run.copy_weights_to(unet)
        generators = [torch.Generator().manual_seed(derive_seed(config.seed, i)) for i in range(16)]
        images = pipeline(16, generator=generators, num_inference_steps=25).images
        save_grid(images, 4, samples_file(config, step))

    return save_samples


def train_dash(config: TrainDashConfig) -> Path:
    """Train a Dash and save it into `config.output_dir` for `DDPMPipeline.from_pretrained`."""
    from diffusers import DDPMPipeline, DDPMScheduler

    dataset = open_training_images(config, config.resolution, config.channels)
    scheduler = DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    accelerator = begin_run(config)
    run = TrainingRun(
        config, accelerator, build_unet(config), dataset, dash_loss(config, scheduler)
    )
    run.train(_sample_saver(config, run, scheduler), outcome=partial(samples_file, config))
    if accelerator.is_main_process:
        unet = build_unet(config)
        run.copy_weights_to(unet)
        DDPMPipeline(unet, scheduler).save_pretrained(config.output_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return config.output_dir
