"""Text to image: python pipelines/stable_diffusion.py --model MODEL --dot DOT --prompt "a boat"."""

import argparse

import torch

from morse import MorsePipeline


def main(argv: list[str] | None = None) -> None:
    """Draw one image from a prompt."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a Stable Diffusion")
    parser.add_argument("--dot", help="its Dot; the one saved with the model if not given")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--lsd", type=float, default=10)
    parser.add_argument("--scheduler", default="leapfrog", help="the one of its saved plans")
    parser.add_argument("--output", default="stable_diffusion.png")
    args = parser.parse_args(argv)

    pipe = MorsePipeline.from_pretrained(args.model, dot=args.dot, scheduler=args.scheduler)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    image = pipe(
        args.prompt,
        lsd=args.lsd,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(0),
    ).images[0]

    print(pipe.morse_summary())
    image.save(args.output)


if __name__ == "__main__":
    main()
