"""LPIPS (Zhang et al. 2018) with torchmetrics, from weights that the user brings.

torchmetrics has the metric and its linear layers. The network below them is AlexNet, which it would
take from torchvision, and its weights are a download; here a safetensors file holds them.
"""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from morse.evaluation.fid.extractors import conversion
from morse.evaluation.torch_fidelity_loader import torchmetrics_module

Lpips = Callable[[Tensor, Tensor], Tensor]
LPIPS_FILE = "alexnet-owt-7be5be79.pth"
LPIPS_LEAST = 31  # height and width, below which AlexNet's pooling has nothing left
CONVERT = conversion(LPIPS_FILE, "alexnet.safetensors")


def check_lpips_weights(weights: Path | None) -> None:
    """Raise what `load_lpips` would raise for a missing file, before anything is sampled.

    Raises:
        ValueError: If there is no file.
        FileNotFoundError: If the file does not exist.
    """
    if weights is None:
        raise ValueError(
            f"lpips needs --lpips_weights: download {LPIPS_FILE} from "
            f"https://download.pytorch.org/models/{LPIPS_FILE}, convert it once by {CONVERT} and "
            "give --lpips_weights alexnet.safetensors"
        )
    if not weights.is_file():
        raise FileNotFoundError(f"lpips_weights is {weights}, which is no file")


def load_lpips(weights: Path | None, device: torch.device | str = "cpu") -> Lpips:
    """Return a function of images and references, both (B, 3, H, W) in [0, 1], H and W >= 31.

    It returns one distance an image, (B,).

    Args:
        weights: A safetensors file with torchvision's AlexNet, "features.0.weight" and so on.
        device: Where images and references will be.

    Raises:
        ValueError: If no file is given, or it holds something else.
        FileNotFoundError: If there is no such file.
    """
    check_lpips_weights(weights)
    features = alexnet_features()
    try:
        state = load_file(weights)
        prefix = "features."
        kept = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        features.load_state_dict(kept)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"lpips_weights is {weights}, which does not hold the tensors of {LPIPS_FILE} as "
            f"safetensors ({str(error)[:200]}); convert it by {CONVERT}"
        ) from error
    module = torchmetrics_module("functional.image.lpips")

    # torchmetrics asks torchvision for the network; it is handed this one instead.
    with mock.patch.object(module, "_get_tv_model_features", lambda *_: features):
        network = module._NoTrainLpips(net="alex").to(device)
    return lambda images, references: network(images, references, normalize=True).reshape(-1)


def alexnet_features() -> nn.Sequential:
    """Build AlexNet's convolutions (Krizhevsky 2014, arXiv 1404.5997), as torchvision has them."""

    def conv(channels: int, out_channels: int, size: int, stride: int, padding: int) -> list:
        return [nn.Conv2d(channels, out_channels, size, stride, padding), nn.ReLU()]

    pool = [nn.MaxPool2d(3, 2)]
    return nn.Sequential(
        *conv(3, 64, 11, 4, 2), *pool,
        *conv(64, 192, 5, 1, 2), *pool,
        *conv(192, 384, 3, 1, 1),
        *conv(384, 256, 3, 1, 1),
        *conv(256, 256, 3, 1, 1), *pool,
    )  # fmt: skip
