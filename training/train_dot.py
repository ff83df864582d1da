"""Train a Dot for a Dash: `accelerate launch training/train_dot.py --help`, from a checkout."""

from morse.cli import run_command
from morse.training.loop import TrainDotConfig, train_dot

if __name__ == "__main__":
    run_command(TrainDotConfig, train_dot)
