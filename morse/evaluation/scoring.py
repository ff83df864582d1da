"""What is measured of each image, and the axes that the benchmark's figures are given on."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from morse.evaluation.features import FashionFeatures, extract_features
from morse.evaluation.metrics import FRECHET_LABEL, feature_statistics, frechet_distance, psnr
from morse.evaluation.torch_fidelity_loader import torchmetrics_module


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


AXES = {
    "frechet": Axis(f"{FRECHET_LABEL} to real images", "", "lower", "distribution"),
    "frechet_to_reference": Axis(
        f"{FRECHET_LABEL} to the reference's images", "", "lower", "distribution"
    ),
    "psnr": Axis("Same-noise PSNR to the reference", "dB", "higher", "fidelity"),
    "ssim": Axis("Same-noise SSIM to the reference", "", "higher", "fidelity"),
}
FEATURE_AXES = ("frechet", "frechet_to_reference")  # axes that need features
# Axes on which the reference is perfect by definition, so that its own point says nothing.
REFERENCE_AXES = ("frechet_to_reference", "psnr", "ssim")


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
        classifier: FashionFeatures | None,
        real: tuple[Tensor, Tensor] | None,
        reference: Tensor,
    ):
        """Prepare the reference.

        Args:
            classifier: Gives the features, of grey images of 32x32; None for none.
            real: Mean (D,) and covariance (D, D) of the real images' features; None without.
            reference: The reference sampler's images, (R, C, H, W) in [0, 1]; R may be less than
                the number of images to score, because each costs as much as many of those.
        """
        self.classifier, self.real, self.reference = classifier, real, reference
        self.reference_features = self._features(reference)

    def score(self, images: Tensor) -> ImageScores:
        """Score images (N, C, H, W), the first of which start from the reference's noise."""
        paired = images[: len(self.reference)]
        return ImageScores(
            self._features(images),
            psnr(paired, self.reference).float(),
            structural_similarity(paired, self.reference),
        )

    def summary(self, scores: ImageScores) -> str:
        """Return the scores' means in a line, for progress."""
        parts = [f"PSNR {float(scores.psnr.mean()):.2f} dB"]
        if self.real is not None:
            distance = frechet_distance(*feature_statistics(scores.features), *self.real)
            parts.insert(0, f"Fréchet {distance:.3f}")
        return ", ".join(parts)

    def _features(self, images: Tensor) -> Tensor:
        if self.classifier is None:
            return torch.empty(len(images), 0)
        return extract_features(self.classifier, images.mean(dim=1, keepdim=True))


def is_fashion_like(images: Tensor) -> bool:
    """Tell whether images (N, C, H, W) have the shape of Fashion-MNIST's, padded: grey, 32x32."""
    return images.shape[1:] == (1, 32, 32)


def structural_similarity(images: Tensor, reference: Tensor, batch_size: int = 500) -> Tensor:
    """Return each image's mean structural similarity (Wang et al. 2004, Equation 13).

    Args:
        images: (N, C, H, W) in [0, 1], H and W at least 6.
        reference: What they should be; the same shape.
        batch_size: Images at a time.

    Returns:
        One value an image, (N,), float32; 1 for equal images.
    """
    measure = torchmetrics_module("functional.image").structural_similarity_index_measure
    parts = [
        measure(*pair, data_range=1.0, reduction="none").reshape(-1)
        for pair in zip(images.split(batch_size), reference.split(batch_size), strict=True)
    ]
    return torch.cat(parts).float()
