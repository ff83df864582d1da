"""Kernel distances (KID's, Bińkowski et al. 2018) of many resamples at once.

The squared maximum mean discrepancy of two sets, by the kernel k(x, y) = (x.y / D + 1)^3:
    mean k(x, x') + mean k(y, y') - 2 mean k(x, y).
A resample is a weight for each image, so every kernel is computed once for all resamples. Means
over pairs leave out an image with itself and, in a resample, with its copies (`mean_apart`): these
would add a constant to each replicate, as if the sets were further apart.

Where two sets hardly differ, the distance is a degenerate U-statistic, whose bootstrap spreads more
than it does itself (Arcones and Giné 1992): intervals are too wide there, never too narrow.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

BLOCK = 1000  # rows of the kernel matrix in memory at a time


@dataclass(frozen=True, eq=False)
class Resampled:
    """Features and how often each resample holds them, float64, on one device.

    Attributes:
        features: (N, D).
        counts: (R, N), no row with fewer than two different images.
    """

    features: Tensor
    counts: Tensor

    @classmethod
    def make(cls, features: Tensor, counts: np.ndarray, device: torch.device | str) -> "Resampled":
        """Move both to `device`; kernels of CLIP's features are all near 1, hence float64."""
        weights = torch.from_numpy(np.ascontiguousarray(counts))
        return cls(features.to(device, torch.float64), weights.to(device, torch.float64))

    @cached_property
    def within(self) -> Tensor:
        """The mean kernel of two different images of each resample, (R,)."""
        return mean_apart(self.features, self)


def polynomial_kernel(first: Tensor, second: Tensor) -> Tensor:
    """Return (x.y / D + 1)^3 of each pair, (N, M), of features (N, D) and (M, D)."""
    return (first @ second.T / first.shape[1] + 1) ** 3


def mean_between(first: Resampled, second: Resampled) -> Tensor:
    """Return the mean kernel of pairs from two sets that share no noise, (R,)."""
    totals = first.counts.sum(dim=1) * second.counts.sum(dim=1)
    return _weighted_sums(first.features, second.features, first.counts, second.counts) / totals


def mean_apart(features: Tensor, others: Resampled) -> Tensor:
    """Return the mean kernel of pairs from two sets, or from one, that differ in noise, (R,).

    With K_ij = k(features_i, others_j), and c_i copies of noise i in a resample, this is
        sum_(i != j) c_i c_j K_ij / sum_(i != j) c_i c_j
            = (c'Kc - sum_i c_i^2 K_ii) / ((sum_i c_i)^2 - sum_i c_i^2).
    For multinomial c, E c_i c_j is the same for all i != j, so replicates centre on the value of
    all images. Pairs of one noise are left out also between two methods' images: they are no
    independent draws (Gretton et al. 2012, Equation 4 instead of 3), and so equal sets are at
    distance 0 exactly.

    Args:
        features: (N, D).
        others: Of the same noises, in the same order.
    """
    counts, squares = others.counts, others.counts.square()
    diagonal = ((features * others.features).mean(dim=1) + 1) ** 3
    sums = _weighted_sums(features, others.features, counts, counts) - squares @ diagonal
    return sums / (counts.sum(dim=1).square() - squares.sum(dim=1))


def _weighted_sums(first: Tensor, second: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows' K columns of each resample, (R,), block by block of the kernel matrix K."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=first.device)
    for start in range(0, len(first), BLOCK):
        kernel = polynomial_kernel(first[start : start + BLOCK], second)
        total += ((rows[:, start : start + BLOCK] @ kernel) * columns).sum(dim=1)
    return total


class KernelDistances:
    """The kernel distance to real images and to the reference's, on shared resamples."""

    def __init__(
        self,
        counts: np.ndarray,
        reference: Tensor,
        real: Resampled | None,
        device: torch.device | str = "cpu",
    ):
        """Resample the reference.

        Args:
            counts: How often each resample holds each image, (1 + replicates, N).
            reference: Features of the reference's images, (R, D), from the noise of the first R.
            real: With resamples of its own; None leaves the distance to real images out.
            device: Where to compute; it must know float64.
        """
        self.counts, self.real, self.device = counts, real, device
        self.reference = Resampled.make(reference, counts[:, : len(reference)], device)

    def draws(self, features: Tensor) -> dict[str, np.ndarray]:
        """Return "kernel" and "kernel_to_reference" of features (N, D), (1 + replicates,) each.

        Both are unbiased, and so may be slightly negative.
        """
        images = paired = Resampled.make(features, self.counts, self.device)
        number = len(self.reference.features)
        if number < len(features):
            paired = Resampled(images.features[:number], self.reference.counts)
        between = mean_apart(paired.features, self.reference)
        draws = {"kernel_to_reference": paired.within + self.reference.within - 2 * between}
        if self.real is not None:
            draws["kernel"] = images.within + self.real.within - 2 * mean_between(images, self.real)
        return {axis: values.cpu().numpy() for axis, values in draws.items()}
