"""Dash and Dot in a loop of one's own, without a pipeline: python pipelines/own_loop.py."""

import argparse

import torch
from diffusers import DDPMPipeline, SchedulerMixin
from diffusers.utils import make_image_grid
from torch import Tensor, nn

from morse import MorseDot, MorsePipeline, MorsePlan, estimate


@torch.no_grad()
def sample(
    unet: nn.Module, dot: MorseDot, scheduler: SchedulerMixin, plan: MorsePlan, latents: Tensor
) -> Tensor:
    """Sample from noise (B, C, H, W), each evaluation by the network that the plan says.

    The scheduler has to be deterministic and to evaluate once a step (DDIM, DPM-Solver++, UniPC,
    Euler, leapfrog, ...). What a pipeline does besides is not done here: guidance (call Dot with a
    jump of each branch), Dots with `history`, of guided estimates or of a `base_space` other than
    "raw", and their mixture.
    """
    scheduler.set_timesteps(len(plan), device=latents.device)
    latents, jump = latents * scheduler.init_noise_sigma, None

    def dash(latents: Tensor, timestep: Tensor) -> Tensor:
        return unet(latents, timestep).sample

    for model, timestep in zip(plan, scheduler.timesteps, strict=True):
        scaled = scheduler.scale_model_input(latents, timestep)
        model_output, jump = estimate(model, scaled, timestep, jump, dash, dot)
        latents = scheduler.step(model_output, timestep, latents).prev_sample
    return latents


def main(argv: list[str] | None = None) -> None:
    """Sample 16 images and save them as a grid."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--lsd", type=float, default=10)
    parser.add_argument("--speed_ratio", type=float, default=6, help="N")
    parser.add_argument("--output", default="own_loop.png")
    args = parser.parse_args(argv)

    pipe = MorsePipeline.from_pretrained("fashion-mnist", scheduler="dpmsolver++")
    unet, dot, scheduler = pipe.unet, pipe.dot, pipe.scheduler
    # With networks of your own:
    # dot = MorseDot.from_pretrained("path/to/dot").to(unet.device, unet.dtype).bind(unet)
    # dot.merge_lora()
    plan = MorsePlan.from_budget(args.lsd, args.speed_ratio, ratio=1.75)
    print(f"{plan}: {plan.cost(args.speed_ratio):.1f} LSD")
    noise = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    images = sample(unet, dot, scheduler, plan, noise) / 2 + 0.5
    images = DDPMPipeline.numpy_to_pil(images.clamp(0, 1).permute(0, 2, 3, 1).numpy())
    make_image_grid(images, rows=2, cols=8).save(args.output)


if __name__ == "__main__":
    main()
