"""Scores of one method's images, each with bootstrap replicates that other methods share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from morse.evaluation.features import FashionFeatures, extract_features
from morse.evaluation.metrics import feature_statistics, frechet_distance, psnr

# axis -> which direction is better
AXES = {"frechet": "lower", "psnr": "higher", "frechet_to_reference": "lower"}
# Axes on which the reference is perfect by definition, so that its own point says nothing.
FIDELITY_AXES = ("psnr", "frechet_to_reference")


@dataclass(frozen=True)
class Score:
    """One axis: the value on all images, and its values on resampled images.

    Replicate b of any two methods draws the same images, so that differences and speed-ups have
    their own replicates.
    """

    value: float
    replicates: tuple[float, ...]


class Scorer:
    """Scores images against the real data and against the reference sampler's images."""

    def __init__(
        self,
        classifier: FashionFeatures,
        real: tuple[Tensor, Tensor],
        reference: Tensor,
        num_replicates: int,
        seed: int,
    ):
        """Prepare the reference.

        Args:
            classifier: Gives the features.
            real: Mean (D,) and covariance (D, D) of the real images' features.
            reference: The reference sampler's images, (N, 1, 32, 32) in [0, 1].
            num_replicates: Bootstrap replicates; 0 for none.
            seed: Seed of the draws; equal seeds and N give equal draws.
        """
        self.classifier, self.real, self.reference = classifier, real, reference
        self.reference_features = extract_features(classifier, reference)
        generator = torch.Generator().manual_seed(seed)
        count = len(reference)
        self.draws = [
            torch.randint(count, (count,), generator=generator) for _ in range(num_replicates)
        ]

    def score(self, images: Tensor) -> dict[str, Score]:
        """Return a `Score` for each of `AXES`; `images` come from the reference's noise."""
        features = extract_features(self.classifier, images)
        ratios = psnr(images, self.reference)  # (N,)
        everything = torch.arange(len(images))
        per_draw = [self._values(features, ratios, draw) for draw in (everything, *self.draws)]
        return {
            axis: Score(per_draw[0][axis], tuple(values[axis] for values in per_draw[1:]))
            for axis in AXES
        }

    def _values(self, features: Tensor, ratios: Tensor, draw: Tensor) -> dict[str, float]:
        statistics = feature_statistics(features[draw])
        target = feature_statistics(self.reference_features[draw])
        return {
            "frechet": frechet_distance(*statistics, *self.real),
            "psnr": float(ratios[draw].mean()),
            "frechet_to_reference": frechet_distance(*statistics, *target),
        }


def standard_error(replicates: tuple[float, ...]) -> float | None:
    """Return the standard deviation of bootstrap replicates; None for fewer than two."""
    if len(replicates) < 2:
        return None
    return float(torch.tensor(replicates, dtype=torch.float64).std())
