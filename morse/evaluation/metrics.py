"""Fréchet distance between feature sets, and same-noise PSNR."""

import math

import torch
from torch import Tensor

from morse.evaluation.stats.frechet import Gaussians, frechet_distances

FRECHET_LABEL = "Fréchet distance (Fashion-MNIST classifier features)"


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the unbiased covariance (D, D) of features (N, D), in float64.

    Raises:
        ValueError: If there are fewer than two vectors or `features` is not a matrix.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"features has shape {tuple(features.shape)}, but a covariance needs (N, D) with "
            "N >= 2: sample more images"
        )
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Return the squared Fréchet distance of two Gaussians (Dowson and Landau 1982, Equation 4).

    |mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_b^1/2 cov_a cov_b^1/2)^1/2). This is
    Heusel et al. 2017, Equation 6; it is called FID only when Inception-v3 gives the features, and
    here it does not. Everything is float64 and symmetric, so that singular covariances (few
    samples) are no trouble.

    Args:
        mean_a: (D,).
        cov_a: (D, D), symmetric, positive semi-definite.
        mean_b: Like `mean_a`.
        cov_b: Like `cov_a`.

    Returns:
        The distance, at least 0; the unit is that of the features, squared.
    """
    first, second = Gaussians.of(mean_a, cov_a), Gaussians.of(mean_b, cov_b)
    return frechet_distances(first, second).item()


def psnr(images: Tensor, reference: Tensor, max_psnr: float = 100.0) -> Tensor:
    """Return the peak signal-to-noise ratio of each image, -10 log10(mean squared error).

    Args:
        images: (B, C, H, W) in [0, 1].
        reference: What they should be; the same shape.
        max_psnr: Returned for equal images, in dB; keeps means finite.

    Returns:
        One ratio an image in dB, (B,), float64.

    Raises:
        ValueError: If the shapes differ.
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"images has shape {tuple(images.shape)} and reference {tuple(reference.shape)}; "
            "same-noise PSNR compares image by image, so both must come from the same seeds"
        )
    # Some images at a time: thousands of large ones in float64 would not fit into memory.
    error = torch.cat(
        [
            (some.double() - others.double()).square().flatten(1).mean(dim=1)
            for some, others in zip(images.split(64), reference.split(64), strict=True)
        ]
    )
    return -10 * torch.log10(error.clamp(min=math.pow(10, -max_psnr / 10)))
