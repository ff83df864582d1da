"""Image files: which names they have, and their pixels as 8-bit grey or colour."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises


def is_image(path: Path) -> bool:
    """Tell images by their names; hidden files, as the `._a.png` of macOS's archives, are none."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def has_alpha(image: Image.Image) -> bool:
    """Tell whether an image may be transparent somewhere."""
    return "A" in image.getbands() or "transparency" in image.info


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert to grey (1 channel) or RGB (3), 8 bits each; transparency shows white.

    Raises:
        ValueError: If the image has more bits.
    """
    if image.mode.startswith(("I", "F")):  # Pillow would clip them at 255
        raise ValueError(f"its mode is {image.mode}, but 8 bits a channel are needed")
    if has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def to_bytes(image: Image.Image) -> Tensor:
    """Give the pixels of a grey or RGB image, (C, H, W) uint8."""
    array = np.array(image, dtype=np.uint8).reshape(image.height, image.width, -1)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def read_files(files: list[Path], resolution: int, channels: int, indices: list[int]) -> Tensor:
    """Read those of the files that `indices` names, (len(indices), C, resolution, resolution).

    Raises:
        ValueError: If one cannot be read; the message names it.
    """
    images = []
    for path in (files[index] for index in indices):
        with _naming(path), Image.open(path) as image:
            images.append(fit_image(image, resolution, channels))
    return torch.stack(images)


def read_rows(
    rows: "Dataset", column: str, resolution: int, channels: int, indices: list[int]
) -> Tensor:
    """Read the images in a column of a hub data set likewise."""
    images = []
    for index in indices:
        with _naming(f"row {index} (of its part) in image_column {column!r}"):
            images.append(fit_image(rows[index][column], resolution, channels))
    return torch.stack(images)


@contextmanager
def _naming(name: object) -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise ValueError(f"{name} cannot be read as an image: {error}; remove it") from error


def fit_image(image: Image.Image, resolution: int, channels: int) -> Tensor:
    """Crop the centre square and resize it, (C, resolution, resolution) uint8."""
    image = to_channels(ImageOps.exif_transpose(image), channels)
    return to_bytes(ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS))
