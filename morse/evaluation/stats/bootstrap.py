"""The bootstrap over images: every figure's value on many resamples that all methods share.

An image is resampled as its noise: replicate b draws the same noise indices for each method and for
the reference, so that differences and speed-ups have replicates of their own, from pairs.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from morse.evaluation.scoring import ImageScores

NUM_REAL = 60_000  # Fashion-MNIST's training images, behind the real images' mean and covariance


@dataclass(frozen=True, eq=False)
class Gaussians:
    """R normal distributions, float64.

    Attributes:
        means: (R, D).
        covariances: (R, D, D).
    """

    means: np.ndarray
    covariances: np.ndarray

    @cached_property
    def roots(self) -> np.ndarray:
        """The covariances' symmetric square roots, (R, D, D)."""
        values, vectors = np.linalg.eigh(self.covariances)
        scaled = vectors * np.sqrt(values.clip(min=0))[..., None, :]
        return scaled @ vectors.swapaxes(-1, -2)


def frechet_distances(first: Gaussians, second: Gaussians) -> np.ndarray:
    """Return the squared Fréchet distance of each pair, (R,); see `metrics.frechet_distance`.

    The square roots of `second` are kept, so pass as `second` what others are compared with too.
    """
    products = second.roots @ first.covariances @ second.roots
    eigenvalues = np.linalg.eigvalsh((products + products.swapaxes(-1, -2)) / 2).clip(min=0)
    traces = np.trace(first.covariances + second.covariances, axis1=-2, axis2=-1)
    shifts = np.square(first.means - second.means).sum(axis=-1)
    return (shifts + traces - 2 * np.sqrt(eigenvalues).sum(axis=-1)).clip(min=0)


def draw_counts(
    num_images: int, num_replicates: int, rng: np.random.Generator, num_paired: int | None = None
) -> np.ndarray:
    """Return how often each resample holds each image, (1 + num_replicates, num_images), float64.

    Row 0 is the images as they are, once each; each other row is a draw with replacement. Draws
    with fewer than two of the first `num_paired`, which have no spread, are made anew.
    """
    num_paired = num_images if num_paired is None else num_paired
    counts = np.ones((1 + num_replicates, num_images))
    for row in counts[1:]:
        row[:] = 0
        while row[:num_paired].sum() < min(2, num_paired):
            row[:] = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
    return counts


def resample(features: np.ndarray, counts: np.ndarray) -> Gaussians:
    """Return the mean and the unbiased covariance of each resample's features.

    The products of all pairs of features are formed once and weighted by matrix multiplication;
    made for feature vectors of a few dozen numbers.

    Args:
        features: (N, D).
        counts: (R, N), no row without two images.
    """
    size, totals = features.shape[1], counts.sum(axis=1, keepdims=True)
    center = features.mean(axis=0, dtype=np.float64)
    centered = features - center  # keeps the second moments small, and so exact
    rows, columns = np.triu_indices(size)
    products = centered[:, rows] * centered[:, columns]  # (N, D (D + 1) / 2)
    means = counts @ centered / totals
    moments = counts @ products / totals - means[:, rows] * means[:, columns]
    covariances = np.empty((len(counts), size, size))
    covariances[:, rows, columns] = moments * (totals / (totals - 1))
    covariances[:, columns, rows] = covariances[:, rows, columns]
    return Gaussians(center + means, covariances)


def draw_real(
    real: tuple[Tensor, Tensor], num_real: int, num_replicates: int, rng: np.random.Generator
) -> Gaussians:
    """Return the real images' statistics, and what they may be for other real images as many.

    Only their mean and covariance S are at hand, so replicates are drawn as if the features were
    normal: the mean from N(mean, S / n), the covariance from Wishart(S, n - 1) / (n - 1), which are
    independent then (Anderson 2003, Theorem 3.3.2); the Wishart by Bartlett's decomposition.

    Args:
        real: Mean (D,) and covariance (D, D).
        num_real: n, how many real images are behind them; more than D.
        num_replicates: How many to draw; row 0 of the result is `real` itself.
        rng: Makes the draws.
    """
    mean, covariance = (part.double().numpy() for part in real)
    size, freedom = len(mean), num_real - 1
    root = Gaussians(mean[None], covariance[None]).roots[0]
    means = mean + rng.standard_normal((num_replicates, size)) @ root / np.sqrt(num_real)
    factors = np.tril(rng.standard_normal((num_replicates, size, size)), k=-1)
    diagonal = np.sqrt(rng.chisquare(freedom - np.arange(size), size=(num_replicates, size)))
    factors[:, range(size), range(size)] = diagonal
    halves = root @ factors / np.sqrt(freedom)
    return Gaussians(
        np.concatenate([mean[None], means]),
        np.concatenate([covariance[None], halves @ halves.swapaxes(-1, -2)]),
    )


class SeedBootstrap:
    """The resamples of one repetition's images (those of one first seed)."""

    def __init__(
        self,
        num_images: int,
        reference_features: Tensor,
        real: Gaussians | None,
        num_replicates: int,
        rng: np.random.Generator,
    ):
        """Draw the resamples.

        Args:
            num_images: N, images of each method.
            reference_features: Of the reference sampler's images, the first R <= N, (R, D).
            real: From `draw_real`, with as many replicates; shared by all repetitions, because
                there is only one real set. None where images have no features.
            num_replicates: How many resamples.
            rng: Makes the draws; another stream for each repetition.
        """
        self.real = real
        self.counts = draw_counts(num_images, num_replicates, rng, len(reference_features))
        self.paired_counts = self.counts[:, : len(reference_features)]
        self.reference = None
        if real is not None:
            self.reference = resample(reference_features.numpy(), self.paired_counts)

    def draws(self, scores: ImageScores) -> dict[str, np.ndarray]:
        """Return each axis' value on all images, then on each resample, (1 + replicates,).

        Without real images there are only the axes that need no features.

        A Fréchet distance grows as images get fewer, and a resample holds fewer different ones than
        were sampled. So the replicates are moved by a constant that makes their mean the value on
        all images: they tell how the distance of N images spreads, not what it is for fewer.

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
        return draws if self.real is None else self._frechet_draws(scores) | draws

    def _frechet_draws(self, scores: ImageScores) -> dict[str, np.ndarray]:
        features = scores.features.numpy()
        paired = resample(features[: self.paired_counts.shape[1]], self.paired_counts)
        draws = {
            "frechet": frechet_distances(resample(features, self.counts), self.real),
            "frechet_to_reference": frechet_distances(paired, self.reference),
        }
        return {axis: _centered(values).clip(min=0) for axis, values in draws.items()}


def _centered(draws: np.ndarray) -> np.ndarray:
    if len(draws) > 1:
        draws[1:] += draws[0] - draws[1:].mean()
    return draws


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
