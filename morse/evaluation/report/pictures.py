"""Sampled images as pictures, and a result's: a strip a method, one noise a column."""

import base64
import binascii
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from morse.evaluation.report.data import Result
from morse.evaluation.report.html import Picture

Strips = Sequence[tuple[str, Image.Image]]  # (label, its images side by side)
SCALE = 2  # CSS pixels that a pixel is wide on the page


def read_strips(result: Result) -> Strips:
    """Decode the strips of result["grid"]; without a grid there are none.

    Raises:
        ValueError: If one is no PNG in base64.
    """
    rows = (result.get("grid") or {}).get("rows") or []
    return [(row["label"], _decode(row["png_base64"], row["label"])) for row in rows]


def strip_pictures(result: Result, strips: Strips) -> list[Picture]:
    """Return the strips for the HTML page, magnified by `SCALE` if they fit.

    Args:
        result: Says which seeds they come from.
        strips: From `read_strips`.
    """
    seeds = ", ".join(str(seed) for seed in (result.get("grid") or {}).get("seeds", ()))
    return [
        Picture(
            "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode(),
            f"{label}: images of seeds {seeds}",
            label,
            SCALE * image.width,
        )
        for label, image in strips
    ]


def to_bytes(images: Tensor) -> np.ndarray:
    """Return images (N, C, H, W) in [0, 1] as 8-bit pixels, (N, H, W, C)."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def to_picture(pixels: np.ndarray) -> Image.Image:
    """Return 8-bit pixels (H, W, C) with C = 1 or 3 as a picture, grey or in colour."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def join_strips(strips: Strips, gap: int = 2) -> Image.Image:
    """Put labelled pictures below each other, each with its label to the left.

    Args:
        strips: One a row.
        gap: White pixels below each.
    """
    font = ImageFont.load_default(size=max(12, strips[0][1].height // 4))
    left = 16 + round(max(font.getlength(label) for label, _ in strips))
    size = left + max(image.width for _, image in strips), sum(i.height + gap for _, i in strips)
    joined = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(joined), 0
    for label, image in strips:
        draw.text((8, top + image.height // 2), label, fill="black", font=font, anchor="lm")
        joined.paste(image, (left, top))
        top += image.height + gap
    return joined


def png_bytes(image: Image.Image) -> bytes:
    """Return a PNG file's content."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _decode(png_base64: str, label: str) -> Image.Image:
    try:
        content = base64.b64decode(png_base64, validate=True)
        image = Image.open(io.BytesIO(content), formats=("PNG",))
        image.load()
    except (binascii.Error, UnidentifiedImageError, OSError) as error:
        raise ValueError(
            f"png_base64 of the grid's row {label!r} is no PNG in base64 ({error}); measure again, "
            "or take that row out of the JSON"
        ) from error
    return image
