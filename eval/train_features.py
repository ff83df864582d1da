"""Train the classifier whose features the Fréchet distance uses; same as `morse train-features`.

python eval/train_features.py --train_data_dir /usr/share/datasets/fashion-mnist --output_dir DIR
"""

from morse.cli import run_command
from morse.evaluation.train_features import TrainFeaturesConfig, train_features

if __name__ == "__main__":
    run_command(TrainFeaturesConfig, train_features)
