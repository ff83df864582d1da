"""How the layouts of skeletons multiply nodes by a matrix."""

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
