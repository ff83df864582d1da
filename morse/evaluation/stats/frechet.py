"""Fréchet distances of many resamples at once."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gaussians:
    """R normal distributions, float64.

    Attributes:
        means: (R, D).
        covariances: (R, D, D).
    """

    means: np.ndarray
    covariances: np.ndarray

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor) -> "Gaussians":
        """Make one, of (D,) and (D, D)."""
        return cls(mean.double().numpy()[None], covariance.double().numpy()[None])

    @cached_property
    def roots(self) -> np.ndarray:
        """The covariances' symmetric square roots, (R, D, D)."""
        values, vectors = np.linalg.eigh(self.covariances)
        scaled = vectors * np.sqrt(values.clip(min=0))[..., None, :]
        return scaled @ vectors.swapaxes(-1, -2)


def frechet_distances(first: Gaussians, second: Gaussians) -> np.ndarray:
    """Return the squared Fréchet distance of each pair, (R,); see `metrics.frechet_distance`.

    The square roots of `second` are kept, so pass as `second` what others are compared with too;
    one alone is compared with each of `first`.
    """
    # tr(M^1/2) is the sum of the roots of M's eigenvalues; rounding makes some slightly negative.
    products = second.roots @ first.covariances @ second.roots
    eigenvalues = np.linalg.eigvalsh((products + products.swapaxes(-1, -2)) / 2).clip(min=0)
    traces = np.trace(first.covariances + second.covariances, axis1=-2, axis2=-1)
    shifts = np.square(first.means - second.means).sum(axis=-1)
    return (shifts + traces - 2 * np.sqrt(eigenvalues).sum(axis=-1)).clip(min=0)


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
    real: tuple[Tensor, Tensor],
    num_real: int | None,
    num_replicates: int,
    rng: np.random.Generator,
) -> Gaussians:
    """Return the real images' statistics, and what they may be for other real images as many.

    Often only their mean and covariance S are at hand, so replicates are drawn as if the features
    were normal: the mean from N(mean, S / n), the covariance from Wishart(S, n - 1) / (n - 1),
    which are independent then (Anderson 2003, Theorem 3.3.2); the Wishart by Bartlett's
    decomposition.

    Args:
        real: Mean (D,) and covariance (D, D).
        num_real: n, how many real images are behind them; more than D. None where nobody knows:
            then they are taken as exact, and the result is `real` alone.
        num_replicates: How many to draw; row 0 of the result is `real` itself.
        rng: Makes the draws.
    """
    own = Gaussians.of(*real)
    if num_real is None:
        return own
    mean, covariance, root = own.means[0], own.covariances[0], own.roots[0]
    size, freedom = len(mean), num_real - 1
    means = mean + rng.standard_normal((num_replicates, size)) @ root / np.sqrt(num_real)
    factors = np.tril(rng.standard_normal((num_replicates, size, size)), k=-1)
    diagonal = np.sqrt(rng.chisquare(freedom - np.arange(size), size=(num_replicates, size)))
    factors[:, range(size), range(size)] = diagonal
    halves = root @ factors / np.sqrt(freedom)
    return Gaussians(
        np.concatenate([mean[None], means]),
        np.concatenate([covariance[None], halves @ halves.swapaxes(-1, -2)]),
    )


class FrechetDistances:
    """The Fréchet distance to real images and to the reference's, on shared resamples."""

    def __init__(self, counts: np.ndarray, reference: Tensor, real: Gaussians | None):
        """Resample the reference.

        Args:
            counts: How often each resample holds each image, (1 + replicates, N).
            reference: Features of the reference's images, (R, D), from the noise of the first R.
            real: From `draw_real`; None leaves the distance to real images out.
        """
        self.counts, self.paired_counts, self.real = counts, counts[:, : len(reference)], real
        self.reference = resample(reference.numpy(), self.paired_counts)

    def draws(self, features: Tensor) -> dict[str, np.ndarray]:
        """Return "frechet" and "frechet_to_reference" of features (N, D), (1 + replicates,) each.

        A Fréchet distance grows as images get fewer, and a resample holds fewer different ones than
        were sampled. So the replicates are moved by a constant that makes their mean the value on
        all images: they tell how the distance of N images spreads, not what it is for fewer.
        """
        images = features.numpy()
        paired = resample(images[: self.paired_counts.shape[1]], self.paired_counts)
        draws = {"frechet_to_reference": frechet_distances(paired, self.reference)}
        if self.real is not None:
            draws["frechet"] = frechet_distances(resample(images, self.counts), self.real)
        return {axis: _centered(values).clip(min=0) for axis, values in draws.items()}


def _centered(draws: np.ndarray) -> np.ndarray:
    if len(draws) > 1:
        draws[1:] += draws[0] - draws[1:].mean()
    return draws
