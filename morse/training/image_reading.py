"""Image files: which names they have, and their pixels as 8-bit grey or colour."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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
