"""Images of a class with DiT: python pipelines/dit.py --model MODEL --dot DOT --class_label 207."""

import argparse

import torch

from morse import MorsePipeline


def main(argv: list[str] | None = None) -> None:
    """Draw one image of a class."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a DiTPipeline")
    parser.add_argument("--dot", help="its Dot; the one saved with the model if not given")
    parser.add_argument("--class_label", type=int, default=207)
    parser.add_argument("--lsd", type=float, default=10)
    parser.add_argument("--scheduler", default="leapfrog", help="the one of its saved plans")
    parser.add_argument("--output", default="dit.png")
    args = parser.parse_args(argv)

    pipe = MorsePipeline.from_pretrained(args.model, dot=args.dot, scheduler=args.scheduler)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    image = pipe(
        [args.class_label], lsd=args.lsd, generator=torch.Generator().manual_seed(0)
    ).images[0]

    print(pipe.morse_summary())
    image.save(args.output)


if __name__ == "__main__":
    main()
