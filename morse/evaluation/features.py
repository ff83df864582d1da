"""A small Fashion-MNIST classifier whose features the Fréchet distance is measured in."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from morse.evaluation.digests import file_sha256
from morse.files import atomic_save_file, write_json

EMBEDDED = Path(__file__).parent.parent / "assets" / "fashion_mnist" / "features"
REFERENCE_SPLITS = ("train", "test")


class FashionFeatures(nn.Module):
    """Classify Fashion-MNIST images; the layer before the logits gives the features.

    Four 3x3 convolutions in three stages (32, 16 and 8 pixels wide), global average pooling, a
    32-dimensional GELU layer, ten logits. About 100,000 parameters.
    """

    def __init__(
        self, channels: tuple[int, int, int, int] = (32, 48, 64, 96), feature_dim: int = 32
    ):
        """Build the network.

        Args:
            channels: Output channels of the four convolutions.
            feature_dim: Length of a feature vector.
        """
        super().__init__()
        self.config = {"channels": list(channels), "feature_dim": feature_dim}
        self.stages = nn.Sequential(
            _conv(1, channels[0]),
            nn.MaxPool2d(2),
            _conv(channels[0], channels[1]),
            _conv(channels[1], channels[2]),
            nn.MaxPool2d(2),
            _conv(channels[2], channels[3]),
        )
        self.embed = nn.Linear(channels[3], feature_dim)
        self.classify = nn.Linear(feature_dim, 10)

    def features(self, images: Tensor) -> Tensor:
        """Return the features of a batch of images.

        Args:
            images: (B, 1, 32, 32) in [0, 1]: 28x28 Fashion-MNIST padded with two black pixels.

        Returns:
            Feature vectors, (B, feature_dim).

        Raises:
            ValueError: If the images have another shape.
        """
        hidden = self.stages(self._scaled(images)).mean(dim=(2, 3))
        return nn.functional.gelu(self.embed(hidden))

    def layers(self, images: Tensor) -> list[Tensor]:
        """Return what every convolution's stage gives, (B, C, H, W), and the pooled last, (B, C).

        Args:
            images: As for `features`, like what is raised.
        """
        hidden, found = self._scaled(images), []
        for stage in self.stages:
            hidden = stage(hidden)
            if isinstance(stage, nn.Sequential):
                found.append(hidden)
        return [*found, hidden.mean(dim=(2, 3))]

    def _scaled(self, images: Tensor) -> Tensor:
        """Check the shape and give the images in [-1, 1]."""
        if images.ndim != 4 or images.shape[1:] != (1, 32, 32):
            raise ValueError(
                f"images has shape {tuple(images.shape)}, but the Fashion-MNIST features are "
                "defined for (B, 1, 32, 32) in [0, 1]: pad 28x28 images with 2 black pixels"
            )
        return images * 2 - 1

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits, (B, 10), of images (B, 1, 32, 32) in [0, 1]."""
        return self.classify(self.features(images))


def _conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


@torch.no_grad()
def extract_features(model: FashionFeatures, images: Tensor, batch_size: int = 500) -> Tensor:
    """Return the features of many images, batch by batch.

    Args:
        model: The extractor, on any device, in evaluation mode.
        images: (N, 1, 32, 32) in [0, 1] on any device, or uint8 in [0, 255].
        batch_size: Images at a time.

    Returns:
        Features on the CPU, (N, feature_dim), float32.
    """
    device = next(model.parameters()).device
    parts = []
    for batch in images.split(batch_size):
        batch = batch.to(device)
        batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
        parts.append(model.features(batch).cpu())
    return torch.cat(parts)


def save_features(
    model: FashionFeatures, statistics: dict[str, Tensor], facts: dict[str, object], folder: Path
) -> None:
    """Write config.json, model.safetensors and reference.safetensors into `folder`.

    Args:
        model: The trained classifier.
        statistics: "train_mean" (D,), "train_cov" (D, D), "test_mean" and "test_cov".
        facts: What config.json should tell beside the architecture, such as the accuracy.
        folder: Where to; made if missing. config.json, which loading starts from, comes last.
    """
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    atomic_save_file(state, folder / "model.safetensors")
    notes = {
        "reference": "train: the 60,000 training images are the Fréchet reference; test is a check",
        "images": "Fashion-MNIST in [0, 1], padded from 28x28 to 32x32 with zeros",
    }
    atomic_save_file(statistics, folder / "reference.safetensors", notes)
    config = {"model": type(model).__name__, **model.config, **facts}
    write_json(folder / "config.json", config)


def load_features(path: str | Path | None = None) -> FashionFeatures:
    """Load a classifier saved by `save_features`, in evaluation mode.

    Args:
        path: Its folder; None for the one shipped with the package.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or does not fit.
    """
    folder = Path(path) if path is not None else EMBEDDED
    config = read_features_config(folder)
    try:
        model = FashionFeatures(tuple(config["channels"]), config["feature_dim"])
        model.load_state_dict(load_file(_existing(folder / "model.safetensors")))
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'model.safetensors'} is damaged or does not fit config.json ({error}); "
            "train it again with `morse train-features`"
        ) from error
    return model.eval().requires_grad_(False)


def load_reference(path: str | Path | None = None, split: str = "train") -> tuple[Tensor, Tensor]:
    """Load the feature statistics of the real images.

    Args:
        path: A folder written by `save_features`; None for the one shipped with the package.
        split: "train" (60,000 images, the reference everywhere) or "test" (10,000).

    Returns:
        Mean (D,) and covariance (D, D), float64.
    """
    if split not in REFERENCE_SPLITS:
        raise ValueError(f"split is {split!r}, choose one of {REFERENCE_SPLITS}")
    file = _existing((Path(path) if path is not None else EMBEDDED) / "reference.safetensors")
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(f"{split}_mean"), tensors.get_tensor(f"{split}_cov")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged ({error}); make it again with `morse train-features`"
        ) from error


def read_features_config(path: str | Path | None = None) -> dict[str, object]:
    """Return config.json of a features folder (architecture, accuracy, how it was trained)."""
    file = _existing((Path(path) if path is not None else EMBEDDED) / "config.json")
    return json.loads(file.read_text())


def features_sha256() -> str:
    """Return the SHA-256 of the shipped classifier's weights, to be printed beside every figure."""
    return file_sha256(_existing(EMBEDDED / "model.safetensors"))


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; `morse train-features --output_dir {file.parent}` makes it"
        )
    return file
