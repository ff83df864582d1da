"""Compare Dots with one method of the toolbox each, on the same windows and seeds.

python -m eval.ablate --methods all --seeds 3 --output_dir runs/ablation \
    --train_data_dir /usr/share/datasets/fashion-mnist
"""

from morse.cli import run_command
from morse.evaluation.ablation.command import run_ablation
from morse.evaluation.ablation.config import AblationConfig

if __name__ == "__main__":
    run_command(AblationConfig, run_ablation)
