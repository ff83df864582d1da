"""The same noise sampled by each method, as strips of pixels for the report."""

import base64
import io

import numpy as np
from PIL import Image
from torch import Tensor

COLUMNS = 12


def strip_png(images: Tensor) -> str:
    """Put the first `COLUMNS` images side by side in a PNG of 8 bits, and that into base64.

    Args:
        images: (N, C, H, W) in [0, 1], with C = 1 or 3.
    """
    pixels = (images[:COLUMNS].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    row = np.concatenate(list(pixels), axis=1)  # (H, columns * W, C)
    file = io.BytesIO()
    Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def grid_budgets(budgets: tuple[int, ...]) -> tuple[int, ...]:
    """Choose the budgets whose images are shown: the smallest, the middle and the largest."""
    ordered = sorted(set(budgets))
    if not ordered:
        return ()
    return tuple(dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1])))
