"""Training the classifier behind the Fréchet distance, and the statistics of the real images."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from morse.evaluation.environment import command_line
from morse.evaluation.features import FashionFeatures, extract_features, save_features
from morse.evaluation.metrics import feature_statistics
from morse.settings import REQUIRED, MixedPrecision, option, require_places, require_positive


@dataclass(frozen=True)
class TrainFeaturesConfig:
    """Train the Fashion-MNIST classifier whose features the Fréchet distance uses."""

    train_data_dir: Path = option(
        REQUIRED, "folder with the four Fashion-MNIST IDX files, plain or .gz"
    )
    output_dir: Path = option(
        REQUIRED, "new or empty folder for the classifier and the reference statistics"
    )
    num_train_epochs: int = option(8, "passes over the data")
    train_batch_size: int = option(128, "images a step and process")
    learning_rate: float = option(4e-3, "peak of AdamW's one-cycle schedule")
    mixed_precision: MixedPrecision = option("no", "autocast in training; statistics stay float32")
    seed: int = option(0, "seed of weights, order and augmentation")

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_positive(self, ("num_train_epochs", "train_batch_size", "learning_rate"))
        require_places(self, ["output_dir"])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images and shift each by up to two pixels.

    No noise and no blur: the features are there to notice them.

    Args:
        images: (B, 1, 32, 32), any type; zero outside the inner 28x28.
        generator: On the CPU.
    """
    flipped = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    shifts = torch.randint(-2, 3, (len(images), 2), generator=generator)
    rows = (torch.arange(32)[None] - shifts[:, :1]) % 32  # (B, 32); what wraps round is padding
    columns = (torch.arange(32)[None] - shifts[:, 1:]) % 32
    images = images.gather(2, rows[:, None, :, None].expand(images.shape))
    return images.gather(3, columns[:, None, None, :].expand(images.shape))


def train_features(config: TrainFeaturesConfig) -> float:
    """Train, measure test accuracy, write the folder that `load_features` reads.

    Works under `accelerate launch`: each process takes its share of every epoch.

    Returns:
        Accuracy on the test images, in [0, 1].

    Raises:
        FileExistsError: If `output_dir` holds files already.
        ValueError: If the images have no labels, or are fewer than a batch.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from morse.training.common import has_cpu_only
    from morse.training.data import open_images

    if config.output_dir.exists() and any(config.output_dir.iterdir()):
        raise FileExistsError(
            f"output_dir {config.output_dir} is not empty; name a new folder or empty this one"
        )
    splits = {
        split: open_images(config.train_data_dir, 32, 1, split=split) for split in ("train", "test")
    }
    if any(data.labels is None for data in splits.values()):
        raise ValueError(
            f"train_data_dir is {str(config.train_data_dir)!r}, whose images have no labels; "
            "give a folder with IDX files of images and labels, as Fashion-MNIST's"
        )
    accelerator = Accelerator(cpu=has_cpu_only(), mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    start = time.perf_counter()
    model = _fit(config, accelerator, splits["train"])
    if not accelerator.is_main_process:
        return float("nan")
    accuracy, statistics = _measure(model, splits)
    facts = {
        "test_accuracy": round(accuracy, 4),
        "training_seconds": round(time.perf_counter() - start),
        "command": command_line(),
    }
    save_features(model, statistics, facts, config.output_dir)
    print(f"test accuracy {accuracy:.2%}; wrote {config.output_dir}")
    return accuracy


def _fit(config: TrainFeaturesConfig, accelerator: object, data: object) -> FashionFeatures:
    """Train on `data` with one-cycle AdamW and return the bare model in evaluation mode."""
    from accelerate.utils import tqdm

    model = FashionFeatures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.05)
    batch = config.train_batch_size * accelerator.num_processes
    if len(data) < batch:
        raise ValueError(
            f"train_batch_size is {config.train_batch_size}, {batch} in all processes, but there "
            f"are only {len(data)} training images; give a smaller one"
        )
    steps = config.num_train_epochs * (len(data) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, steps)
    prepared, optimizer = accelerator.prepare(model.train(), optimizer)
    order = torch.Generator().manual_seed(config.seed)  # the same in every process
    noise = torch.Generator().manual_seed(config.seed + 1 + accelerator.process_index)
    progress = tqdm(total=steps, desc="classifier", disable=not accelerator.is_main_process)
    for _ in range(config.num_train_epochs):
        for chunk in torch.randperm(len(data), generator=order).split(batch):
            if len(chunk) < batch:
                continue
            mine = chunk[accelerator.process_index :: accelerator.num_processes]
            images = (
                augment(data.__getitems__(mine.tolist()), noise).to(accelerator.device).float()
                / 255
            )
            labels = data.labels[mine].to(accelerator.device)
            with accelerator.autocast():
                logits = prepared(images)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.05)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    progress.close()
    return accelerator.unwrap_model(prepared, keep_fp32_wrapper=False).eval()


def _measure(model: FashionFeatures, splits: dict[str, object]) -> tuple[float, dict[str, Tensor]]:
    """Return the test accuracy, and mean and covariance of the features of both splits."""
    statistics = {}
    for split, data in splits.items():
        images = torch.cat(
            [data.__getitems__(part.tolist()) for part in torch.arange(len(data)).split(1000)]
        )  # (N, 1, 32, 32), uint8
        features = extract_features(model, images)
        statistics[f"{split}_mean"], statistics[f"{split}_cov"] = feature_statistics(features)
    # The loop ends with the test images.
    with torch.no_grad():
        device = model.classify.weight.device
        predicted = model.classify(features.to(device)).argmax(dim=1).cpu()
    return float((predicted == data.labels).float().mean()), statistics
