"""What is measured of each image, and the axes that the benchmark's figures are given on."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from morse.evaluation.fid.feature_sets import FeatureSet
from morse.evaluation.metrics import FRECHET_LABEL, feature_statistics, frechet_distance, psnr
from morse.evaluation.torch_fidelity_loader import torchmetrics_module

Distance = Literal["frechet", "kernel"]
# Beyond, Fréchet distances of 1,000 resamples take gigabytes and a minute for each set of images.
MAX_FRECHET_DIM = 128
SSIM_PIXELS = 2**20  # values of images at a time, of which torchmetrics makes some twenty copies


@dataclass(frozen=True)
class Axis:
    """One kind of quality.

    Attributes:
        title: What to print above a column or along a plot's axis.
        unit: Its unit; "" for none.
        better: Whether a "lower" or a "higher" value is better.
        side: "distribution": the set of images is judged; "fidelity": each image against what the
            reference sampler makes of the same noise.
    """

    title: str
    unit: str
    better: Literal["lower", "higher"]
    side: Literal["distribution", "fidelity"]

    @property
    def sign(self) -> float:
        """What to multiply a value by so that lower is better."""
        return 1.0 if self.better == "lower" else -1.0


def axes_of(titles: Mapping[str, str]) -> dict[str, Axis]:
    """Return every axis there may be, in the order of reports.

    Args:
        titles: What "frechet" and "kernel_distance" are called (`Extractor.titles`).
    """
    found = {}
    for distance, title in (("frechet", "frechet"), ("kernel", "kernel_distance")):
        for suffix, target in (("", "real images"), ("_to_reference", "the reference's images")):
            words = f"{titles[title]} to {target}"
            found[f"{distance}{suffix}"] = Axis(words, "", "lower", "distribution")
    return found | {
        "psnr": Axis("Same-noise PSNR to the reference", "dB", "higher", "fidelity"),
        "ssim": Axis("Same-noise SSIM to the reference", "", "higher", "fidelity"),
    }


# By the embedded classifier's features; those of another extractor differ in their titles alone.
AXES = axes_of(
    {"frechet": FRECHET_LABEL, "kernel_distance": FRECHET_LABEL.replace("Fréchet", "Kernel")}
)
# Axes on which the reference is perfect by definition, so that its own point says nothing.
REFERENCE_AXES = ("frechet_to_reference", "kernel_to_reference", "psnr", "ssim")


def distance_for(num_features: int) -> Distance:
    """Return the distance between sets of images that is affordable with so many features.

    The kernel distance (Bińkowski et al. 2018) also has no bias where images are few.
    """
    return "frechet" if num_features <= MAX_FRECHET_DIM else "kernel"


def axis_names(num_features: int, has_real: bool) -> list[str]:
    """Return the axes that images of so many features, 0 for none, are measured on."""
    names = ["psnr", "ssim"]
    if num_features:
        distance = distance_for(num_features)
        names = [f"{distance}_to_reference", *names]
        names = [distance, *names] if has_real else names
    return names


@dataclass(frozen=True, eq=False)
class ImageScores:
    """What one method's images are like, image by image; everything else is computed from it.

    Attributes:
        features: (N, D), float32; D = 0 where there are none.
        psnr: Against the reference's image from the same noise, in dB, float32, (R,): of the first
            R images, for which there is a reference.
        ssim: Likewise, in [-1, 1], (R,), float32.
    """

    features: Tensor
    psnr: Tensor
    ssim: Tensor


class Scorer:
    """Scores images against the real data and against the reference sampler's images."""

    def __init__(
        self,
        extract: Callable[[Tensor], Tensor] | None,
        real: FeatureSet | None,
        reference: Tensor,
    ):
        """Prepare the reference.

        Args:
            extract: Gives the features (N, D) of images (N, C, H, W) in [0, 1]; None for none.
            real: The real images' features, or their statistics; None without.
            reference: The reference sampler's images, (R, C, H, W) in [0, 1]; R may be less than
                the number of images to score, because each costs as much as many of those.
        """
        self.extract, self.real, self.reference = extract, real, reference

    @cached_property
    def reference_features(self) -> Tensor:
        """Features of the reference's images, (R, D)."""
        return self._features(self.reference)

    def score(self, images: Tensor) -> ImageScores:
        """Score images (N, C, H, W), the first of which start from the reference's noise."""
        paired = images[: len(self.reference)]
        return ImageScores(
            self._features(images),
            psnr(paired, self.reference).float(),
            structural_similarity(paired, self.reference),
        )

    def summary(self, scores: ImageScores) -> str:
        """Return the scores' means in a line, for progress; kernels take too long for that."""
        parts = [f"PSNR {float(scores.psnr.mean()):.2f} dB"]
        if self.real is not None and distance_for(scores.features.shape[1]) == "frechet":
            statistics = feature_statistics(scores.features)
            distance = frechet_distance(*statistics, self.real.mean, self.real.covariance)
            parts.insert(0, f"Fréchet {distance:.3f}")
        return ", ".join(parts)

    def _features(self, images: Tensor) -> Tensor:
        return torch.empty(len(images), 0) if self.extract is None else self.extract(images)


def is_fashion_like(images: Tensor) -> bool:
    """Tell whether images (N, C, H, W) have the shape of Fashion-MNIST's, padded: grey, 32x32."""
    return images.shape[1:] == (1, 32, 32)


def structural_similarity(images: Tensor, reference: Tensor) -> Tensor:
    """Return each image's mean structural similarity (Wang et al. 2004, Equation 13).

    Args:
        images: (N, C, H, W) in [0, 1], H and W at least 6.
        reference: What they should be; the same shape.

    Returns:
        One value an image, (N,), float32; 1 for equal images.
    """
    batch_size = max(1, SSIM_PIXELS // math.prod(images.shape[1:]))
    measure = torchmetrics_module("functional.image").structural_similarity_index_measure
    parts = [
        measure(*pair, data_range=1.0, reduction="none").reshape(-1)
        for pair in zip(images.split(batch_size), reference.split(batch_size), strict=True)
    ]
    return torch.cat(parts).float()
