"""Train a small Dash: `accelerate launch training/train_dash.py --help`, from a checkout."""

from morse.cli import run_command
from morse.training.dash import TrainDashConfig, train_dash

if __name__ == "__main__":
    run_command(TrainDashConfig, train_dash)
