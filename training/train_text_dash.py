"""Train a small text-to-image Dash: `accelerate launch training/train_text_dash.py --help`."""

from morse.cli import run_command
from morse.training.text_dash import TrainTextDashConfig, train_text_dash

if __name__ == "__main__":
    run_command(TrainTextDashConfig, train_text_dash)
