"""A Dot for an unconditional pipeline that you have, trained on a folder of images, then used.

python pipelines/train_your_own.py --model MODEL --images FOLDER --output_dir runs/dot

`accelerate launch training/train_dot.py` does the same on several GPUs, with every option.
"""

import argparse
from pathlib import Path

import torch

from morse import MorsePipeline
from morse.training.loop import TrainDotConfig, train_dot


def main(argv: list[str] | None = None) -> None:
    """Train a Dot and sample with it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="fashion-mnist", help="folder or hub id")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10_000, help="updates")
    args = parser.parse_args(argv)

    config = TrainDotConfig(
        pretrained_model_name_or_path=args.model,
        train_data_dir=args.images,
        output_dir=args.output_dir,
        max_train_steps=args.steps,
        # Pairs from pieces of sampling runs, each evaluation of Dash used several times.
        timestep_sampling="plans",
        window_steps=4,
        pairs_per_window=2,
        loss_weighting="gap",
        cache_pairs=min(10 * args.steps, 50_000),
        train_batch_size=32,
        learning_rate=1e-3,
    )
    train_dot(config)

    # Not the model's own scheduler: with one that adds noise, as DDPM's, lsd= is all Dash.
    pipe = MorsePipeline.from_pretrained(args.model, dot=args.output_dir, scheduler="ddim")
    pipe.measure_speed_ratio()
    image = pipe(lsd=10, generator=torch.Generator().manual_seed(0)).images[0]
    print(pipe.morse_summary())
    image.save(args.output_dir / "sample.png")


if __name__ == "__main__":
    main()
