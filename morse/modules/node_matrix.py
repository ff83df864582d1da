"""What the layouts of skeletons share: products of a matrix with nodes, and sizes of grids."""

import torch
from torch import Tensor


def multiply(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply (out, in) with (in, C) or (B, in, C), in the dtype of the latter.

    Coordinates are copied or averaged, which autocast must not round. Whether gradients are wanted
    changes no bit, so that a nested grid keeps the old one when that is frozen.
    """
    with torch.autocast(x.device.type, enabled=False):
        matrix = matrix.to(x.dtype)
        return matrix @ x if x.dim() == 2 else torch.bmm(matrix.expand(len(x), -1, -1), x)


def checked_grid(grid_shape: tuple[int, int]) -> tuple[int, int]:
    """Return the grid's height and width as a tuple; ValueError unless both are at least 1."""
    shape = tuple(grid_shape)
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"grid_shape must be a height and a width of at least 1, got {grid_shape}")
    return shape
