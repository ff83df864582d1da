"""Image files: which names they have, and their pixels as 8-bit grey or colour."""

import os
import reprlib
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


def find_images(folder: Path) -> list[Path]:
    """List the images in a folder and those below it, through links to folders too.

    Hidden folders are passed over, and each folder is looked through once, by its own path before
    that of a link.
    """
    found, seen, tops = [], set(), [str(folder)]
    for top in tops:  # which grows
        for place, folders, names in os.walk(top):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links = (os.path.join(place, name) for name in folders)
            tops += [link for link in links if os.path.islink(link)]
            found += [path for name in names if is_image(path := Path(place, name))]
    return found


def as_image(value: object) -> Image.Image:
    """Give what is in a column of images.

    Raises:
        ValueError: If it is no image.
    """
    if isinstance(value, Image.Image):
        return value
    raise ValueError(f"it is {reprlib.repr(value)}, no image")


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
    """Read the images in a column of a hub data set.

    Raises:
        ValueError: If one is missing or cannot be read; the message names its row.
    """
    images = []
    for index in indices:
        row = f"row {index} (of its part) in image_column {column!r}"
        with _naming(row, "give another --image_column, or a data set without it"):
            images.append(fit_image(as_image(rows[index][column]), resolution, channels))
    return torch.stack(images)


@contextmanager
def _naming(name: object, remedy: str = "remove it") -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise ValueError(f"{name} cannot be read as an image: {error}; {remedy}") from error


def fit_image(image: Image.Image, resolution: int, channels: int) -> Tensor:
    """Crop the centre square and resize it, (C, resolution, resolution) uint8."""
    image = to_channels(ImageOps.exif_transpose(image), channels)
    return to_bytes(ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS))
