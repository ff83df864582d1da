"""ControlNet: it is not evaluated where Dot runs, which is most of what Morse saves here.

python pipelines/controlnet.py --model MODEL --controlnet CONTROLNET --dot DOT \
    --image edges.png --prompt "a boat"
"""

import argparse

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.utils import load_image

from morse import MorsePipeline


def main(argv: list[str] | None = None) -> None:
    """Draw one image from a prompt and a control image."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a Stable Diffusion")
    parser.add_argument("--controlnet", required=True, help="that of the ControlNet")
    parser.add_argument("--dot", required=True, help="the model's Dot")
    parser.add_argument("--image", required=True, help="what the ControlNet follows")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--lsd", type=float, default=10)
    parser.add_argument("--output", default="controlnet.png")
    args = parser.parse_args(argv)

    controlnet = ControlNetModel.from_pretrained(args.controlnet, use_safetensors=True)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        args.model, controlnet=controlnet, use_safetensors=True
    )
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe = MorsePipeline.from_pipe(pipe, args.dot, scheduler="leapfrog")
    image = pipe(
        args.prompt,
        image=load_image(args.image),
        lsd=args.lsd,
        generator=torch.Generator().manual_seed(0),
    ).images[0]

    print(pipe.morse_summary())
    image.save(args.output)


if __name__ == "__main__":
    main()
