"""Measures of quality, values on them with their uncertainty, and how two values compare."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from morse.evaluation import scoring

Verdict = Literal["better", "within noise", "worse"]
Z_95 = 1.96  # a normal variable lies within so many standard deviations in 95 % of cases


@dataclass(frozen=True)
class Axis(scoring.Axis):
    """A measure of quality that knows its key in the JSON, `name`."""

    name: str

    @property
    def short_title(self) -> str:
        """The title without what it says in brackets."""
        before, bracket, rest = self.title.partition(" (")
        return before + rest.partition(")")[2] if bracket else self.title

    @property
    def name_alone(self) -> str:
        """The short title without what is compared with, such as "Same-noise PSNR"."""
        return self.short_title.partition(" to ")[0]

    def is_distance(self, distance: str) -> bool:
        """Tell whether this is the distance "frechet" or "kernel", to whichever images."""
        return self.name in (distance, f"{distance}_to_reference")

    @property
    def direction(self) -> str:
        """Such as "dB, higher is better"."""
        return ", ".join(filter(None, (self.unit, f"{self.better} is better")))


@dataclass(frozen=True)
class Score:
    """A value on an axis; its uncertainty is None where the JSON has none."""

    value: float
    standard_error: float | None = None
    interval: tuple[float, float] | None = None

    def text(self, decimals: int) -> str:
        """Such as "0.95 ± 0.06"."""
        text = f"{self.value:.{decimals}f}"
        error = self.standard_error
        return text if error is None else f"{text} ± {error:.{decimals}f}"


def compare(score: Score, other: Score, axis: Axis) -> Verdict:
    """Say how `score` stands against `other`.

    Within noise: closer than 1.96 standard errors of the difference, taken as independent. Both
    start from the same noise, which makes their difference less noisy than that, so this calls too
    many differences noise rather than too few. Where either has no error, only equal is noise.
    """
    gain = axis.sign * (other.value - score.value)
    errors = score.standard_error, other.standard_error
    noise = 0.0 if None in errors else Z_95 * math.hypot(*errors)
    if abs(gain) <= noise:
        return "within noise"
    return "better" if gain > 0 else "worse"


def decimals_of(scores: Iterable[Score | None], most: int = 4) -> int:
    """Return how many decimals a table needs, 0 to `most`.

    Its smallest error keeps one digit, or two if the first is 1 or 2; without errors, its smallest
    value keeps three.
    """
    kept = [score for score in scores if score is not None]
    errors = [score.standard_error / 3 for score in kept if score.standard_error]
    values = [abs(score.value) / 100 for score in kept if score.value]
    last = min(errors or values, default=0.01)
    return min(max(-math.floor(math.log10(last)), 0), most)
