"""Paired comparisons over a few seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

Verdict = Literal["better", "worse", "within noise", "one seed", "not finite"]


def student_probability(t: float, degrees: int) -> float:
    """Return P(|T| < t) of Student's t distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    if degrees == 1:
        return 2 * angle / math.pi
    term = total = math.cos(angle) if odd else 1.0
    for index in range(2 + odd, degrees - 1, 2):
        term *= (index - 1) / index * math.cos(angle) ** 2
        total += term
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series


def student_quantile(confidence: float, degrees: int) -> float:
    """Return the t with P(|T| < t) = confidence, by bisection.

    Args:
        confidence: In (0, 1), such as 0.95.
        degrees: Of freedom, 1 or more.
    """
    low, high = 0.0, 1.0
    while student_probability(high, degrees) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if student_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@dataclass(frozen=True)
class Difference:
    """A mean of differences between runs of the same seeds.

    Attributes:
        mean: Negative where the first is lower; NaN where a run diverged.
        low: Lower end of its 95 % interval; None for one seed, or where a run diverged.
        high: Upper end.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> Verdict:
        """Say what the interval says of errors: lower ones are better."""
        if math.isnan(self.mean):
            return "not finite"
        if self.low is None:
            return "one seed"
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "within noise"


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return the mean of first - second with Student's 95 % interval for pairs.

    Args:
        first: A figure of each seed.
        second: The same of what it is compared with, seed by seed.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if not all(map(math.isfinite, differences)):
        return Difference(math.nan, None, None)
    mean, count = fmean(differences), len(differences)
    if count == 1:
        return Difference(mean, None, None)
    half = student_quantile(0.95, count - 1) * stdev(differences) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half)
