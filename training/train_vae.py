"""Train a small autoencoder: `accelerate launch training/train_vae.py --help`, from a checkout."""

from morse.cli import run_command
from morse.training.vae import TrainVaeConfig, train_vae

if __name__ == "__main__":
    run_command(TrainVaeConfig, train_vae)
