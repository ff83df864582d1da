"""Unconditional images: python pipelines/unconditional.py --lsd 10."""

import argparse

import torch
from diffusers.utils import make_image_grid

from morse import MorsePipeline


def main(argv: list[str] | None = None) -> None:
    """Sample 16 images and save them as a grid."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="fashion-mnist", help="folder or hub id")
    parser.add_argument("--dot", help="its Dot; the one saved with the model if not given")
    parser.add_argument("--lsd", type=float, default=10)
    parser.add_argument("--output", default="unconditional.png")
    args = parser.parse_args(argv)

    pipe = MorsePipeline.from_pretrained(args.model, dot=args.dot, scheduler="leapfrog")
    generators = [torch.Generator().manual_seed(seed) for seed in range(16)]
    images = pipe(batch_size=16, lsd=args.lsd, generator=generators).images

    print(pipe.morse_summary())
    make_image_grid(images, rows=2, cols=8).save(args.output)


if __name__ == "__main__":
    main()
