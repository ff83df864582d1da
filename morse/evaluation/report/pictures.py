"""The result's sample pictures: a strip a method, the same noise in every column."""

import base64
import binascii
import io
from typing import TYPE_CHECKING

from morse.evaluation.report.data import Result
from morse.evaluation.report.html import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

Strips = list[tuple[str, "Image"]]  # (label, its images side by side)


def read_strips(result: Result) -> Strips:
    """Decode the strips of result["grid"]; without a grid there are none.

    Raises:
        ValueError: If one is no PNG in base64.
    """
    rows = (result.get("grid") or {}).get("rows") or []
    return [(row["label"], _decode(row["png_base64"], row["label"])) for row in rows]


def strip_pictures(result: Result, strips: Strips, scale: int = 2) -> list[Picture]:
    """Return the strips for the HTML page, in which a pixel is `scale` CSS pixels wide if it fits.

    Args:
        result: Says which seeds they come from.
        strips: From `read_strips`.
        scale: Whole-number magnification.
    """
    seeds = ", ".join(str(seed) for seed in (result.get("grid") or {}).get("seeds", ()))
    return [
        Picture(
            "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode(),
            f"{label}: images of seeds {seeds}",
            label,
            scale * image.width,
        )
        for label, image in strips
    ]


def png_bytes(image: "Image") -> bytes:
    """Return a PNG file's content."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _decode(png_base64: str, label: str) -> "Image":
    from PIL import Image, UnidentifiedImageError

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
