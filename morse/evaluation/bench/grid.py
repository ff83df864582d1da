"""The same noise sampled by each method, as strips of pixels for the report."""

import base64

import numpy as np
from torch import Tensor

from morse.evaluation.report.pictures import png_bytes, to_bytes, to_picture

COLUMNS = 12


def strip_png(images: Tensor) -> str:
    """Put the first `COLUMNS` images side by side in a PNG of 8 bits, and that into base64.

    Args:
        images: (N, C, H, W) in [0, 1], with C = 1 or 3.
    """
    row = np.concatenate(list(to_bytes(images[:COLUMNS])), axis=1)  # (H, columns * W, C)
    return base64.b64encode(png_bytes(to_picture(row))).decode("ascii")


def grid_budgets(budgets: tuple[int, ...]) -> tuple[int, ...]:
    """Choose the budgets whose images are shown: the smallest, the middle and the largest."""
    ordered = sorted(set(budgets))
    if not ordered:
        return ()
    return tuple(dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1])))
