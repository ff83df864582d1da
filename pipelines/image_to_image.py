"""Image to image: a pipeline that you have already, with Morse attached to it.

python pipelines/image_to_image.py --model MODEL --dot DOT --image photo.png --prompt "a boat"
"""

import argparse

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.utils import load_image

from morse import MorsePipeline


def main(argv: list[str] | None = None) -> None:
    """Redraw an image after a prompt."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a Stable Diffusion")
    parser.add_argument("--dot", required=True, help="its Dot")
    parser.add_argument("--image", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--strength", type=float, default=0.6)
    parser.add_argument("--lsd", type=float, default=8)
    parser.add_argument("--output", default="image_to_image.png")
    args = parser.parse_args(argv)

    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(args.model, use_safetensors=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe = MorsePipeline.from_pipe(pipe, args.dot, scheduler="leapfrog")
    # The budget is that of the evaluations that are made: `strength` is allowed for.
    image = pipe(
        args.prompt,
        image=load_image(args.image),
        strength=args.strength,
        lsd=args.lsd,
        generator=torch.Generator().manual_seed(0),
    ).images[0]

    print(pipe.morse_summary())
    image.save(args.output)


if __name__ == "__main__":
    main()
