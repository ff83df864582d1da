"""The bootstrap over images: every figure's value on many resamples that all methods share.

An image is resampled as its noise: replicate b draws the same noise indices for each method and for
the reference, so that differences and speed-ups have replicates of their own, from pairs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from morse.evaluation.fid.feature_sets import FeatureSet
from morse.evaluation.scoring import ImageScores, distance_for
from morse.evaluation.stats.frechet import FrechetDistances, Gaussians, draw_real
from morse.evaluation.stats.kernel import KernelDistances, Resampled


def draw_counts(
    num_images: int,
    num_replicates: int,
    rng: np.random.Generator,
    num_paired: int | None = None,
    distinct: bool = False,
) -> np.ndarray:
    """Return how often each resample holds each image, (1 + num_replicates, num_images), float64.

    Row 0 is the images as they are, once each; each other row is a draw with replacement. Draws
    with fewer than two of the first `num_paired`, which have no spread, are made anew; if
    `distinct`, also those where the two are one image twice, which leave no pair to compare.
    """
    num_paired = num_images if num_paired is None else num_paired
    size = np.count_nonzero if distinct else np.sum
    counts = np.ones((1 + num_replicates, num_images))
    for row in counts[1:]:
        row[:] = 0
        while size(row[:num_paired]) < min(2, num_paired):
            row[:] = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
    return counts


def resample_real(
    real: FeatureSet,
    num_replicates: int,
    rng: np.random.Generator,
    device: torch.device | str = "cpu",
) -> Gaussians | Resampled:
    """Return the real images as they are, and what they may be for other real images as many.

    Args:
        real: For a kernel distance with the features themselves.
        num_replicates: How many to draw.
        rng: Makes the draws.
        device: Where kernels are computed.
    """
    if distance_for(len(real.mean)) == "frechet":
        return draw_real((real.mean, real.covariance), real.num_images, num_replicates, rng)
    counts = draw_counts(len(real.features), num_replicates, rng, distinct=True)
    return Resampled.make(real.features, counts, device)


class SeedBootstrap:
    """The resamples of one repetition's images (those of one first seed)."""

    def __init__(
        self,
        num_images: int,
        reference_features: Tensor,
        real: Gaussians | Resampled | None,
        num_replicates: int,
        rng: np.random.Generator,
        device: torch.device | str = "cpu",
    ):
        """Draw the resamples.

        Args:
            num_images: N, images of each method.
            reference_features: Of the reference sampler's images, the first R <= N, (R, D); D is 0
                where images have no features.
            real: From `resample_real`, with as many replicates; shared by all repetitions, because
                there is only one real set. None without real images.
            num_replicates: How many resamples.
            rng: Makes the draws; another stream for each repetition.
            device: Where kernels are computed.
        """
        num_paired, num_features = reference_features.shape
        by_kernel = distance_for(num_features) == "kernel"
        self.counts = draw_counts(num_images, num_replicates, rng, num_paired, by_kernel)
        self.paired_counts = self.counts[:, :num_paired]
        shared = (self.counts, reference_features, real)
        self.distances: FrechetDistances | KernelDistances | None = None
        if by_kernel:
            self.distances = KernelDistances(*shared, device)
        elif num_features:
            self.distances = FrechetDistances(*shared)

    def draws(self, scores: ImageScores) -> dict[str, np.ndarray]:
        """Return each axis' value on all images, then on each resample, (1 + replicates,).

        Without features there are only the axes that need none, and without real images no distance
        to them.

        Raises:
            ValueError: If `scores` are of other numbers of images.
        """
        expected = self.counts.shape[1], self.paired_counts.shape[1]
        found = (len(scores.features), len(scores.psnr))
        if found != expected:
            raise ValueError(
                f"scores are of {found[0]} images, {found[1]} of them paired with the reference's, "
                f"but {expected[0]} and {expected[1]} are needed; measure the method again"
            )
        weights = self.paired_counts / self.paired_counts.sum(axis=1, keepdims=True)
        draws = {
            "psnr": weights @ scores.psnr.double().numpy(),
            "ssim": weights @ scores.ssim.double().numpy(),
        }
        return draws if self.distances is None else self.distances.draws(scores.features) | draws


@dataclass(frozen=True, eq=False)
class Estimate:
    """One axis of a method at a budget, averaged over repetitions.

    Attributes:
        draws: The value on all images, then its bootstrap replicates, (1 + replicates,). Replicate
            b averages replicate b of the repetitions, which resample independently.
        by_seed: The value of each repetition.
    """

    draws: np.ndarray
    by_seed: dict[int, float]

    @property
    def value(self) -> float:
        """The value on all images."""
        return float(self.draws[0])

    @property
    def standard_error(self) -> float | None:
        """The replicates' standard deviation; None for fewer than two."""
        return float(self.draws[1:].std(ddof=1)) if len(self.draws) > 2 else None

    @property
    def interval(self) -> list[float] | None:
        """The 95 % percentile interval; None for fewer than two replicates."""
        return percentile_interval(self.draws[1:]) if len(self.draws) > 2 else None

    @property
    def seed_deviation(self) -> float | None:
        """The standard deviation between repetitions; None for fewer than two."""
        return float(np.std(list(self.by_seed.values()), ddof=1)) if len(self.by_seed) > 1 else None


def percentile_interval(replicates: np.ndarray) -> list[float]:
    """Return the 2.5th and 97.5th percentile of replicates (R,).

    Both are replicates, not values between two, so that up to 2.5 % of them may be infinite.
    """
    low = np.quantile(replicates, 0.025, method="higher")
    high = np.quantile(replicates, 0.975, method="lower")
    return [float(low), float(high)]
