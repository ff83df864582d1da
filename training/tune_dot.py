"""Tune a Dot on whole runs: `accelerate launch training/tune_dot.py --help`, from a checkout."""

from morse.cli import run_command
from morse.tuning.command import TuneDotConfig, tune_dot

if __name__ == "__main__":
    run_command(TuneDotConfig, tune_dot)
