"""SDXL with a latent consistency model as the Dash; Dot has one down block there (Morse, 3.3).

`train_dot` does not train a Dot for consistency models yet, so this takes one of your own making.

python pipelines/sdxl_lcm.py --model SDXL --unet LCM_UNET --dot DOT --prompt "a boat"
"""

import argparse

import torch
from diffusers import UNet2DConditionModel

from morse import MorsePipeline


def main(argv: list[str] | None = None) -> None:
    """Draw one image with few steps."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of SDXL")
    parser.add_argument("--unet", required=True, help="that of the distilled denoiser")
    parser.add_argument("--dot", required=True, help="the Dot trained for it")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--lsd", type=float, default=4)
    parser.add_argument("--output", default="sdxl_lcm.png")
    args = parser.parse_args(argv)

    unet = UNet2DConditionModel.from_pretrained(args.unet, use_safetensors=True)
    pipe = MorsePipeline.from_pretrained(args.model, unet=unet, dot=args.dot, scheduler="lcm")
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    # LCM adds noise at each step, where lsd= is all Dash unless Dot's config says otherwise.
    ratios = {"stochastic": 2.0, **(pipe.dot.config.plan_ratio or {})}
    pipe.dot.register_to_config(plan_ratio=ratios)
    image = pipe(
        args.prompt,
        lsd=args.lsd,
        guidance_scale=8.0,  # goes into the network, which is evaluated once a step
        generator=torch.Generator().manual_seed(0),
    ).images[0]

    print(pipe.morse_summary())
    image.save(args.output)


if __name__ == "__main__":
    main()
