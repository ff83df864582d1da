"""Compare Dots with one method of the toolbox each, on the same windows and seeds.

python -m eval.ablate --methods odconv --seeds 3 --train_data_dir /usr/share/datasets/fashion-mnist \
    --output_dir runs/ablation
"""

from morse.cli import run_command
from morse.evaluation.ablation.command import run_ablation
from morse.evaluation.ablation.config import AblationConfig

if __name__ == "__main__":
    run_command(AblationConfig, run_ablation)
