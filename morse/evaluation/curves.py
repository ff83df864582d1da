"""Quality against cost, and how much more a baseline pays for the same quality."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class SpeedUp:
    """What a baseline pays for the quality of one measured point, relative to that point.

    Attributes:
        cost: What the point cost, in LSD (or seconds).
        value: Baseline cost / `cost`.
        bound: None inside the baseline's measured range. "at least": the baseline never got as
            good, and `value` takes its most expensive point. "at most": the baseline was never so
            bad, and `value` takes its cheapest point.
    """

    cost: float
    value: float
    bound: Literal["at least", "at most"] | None = None

    def __str__(self) -> str:
        """Return for example "2.10x" or ">= 3.33x"."""
        sign = {None: "", "at least": ">= ", "at most": "<= "}[self.bound]
        return f"{sign}{self.value:.2f}x"


@dataclass(frozen=True)
class MeanSpeedUp:
    """The mean over the points of one method; bounds enter with their values and are counted.

    Attributes:
        value: Mean of the points' values.
        num_points: How many points; none is left out.
        num_at_least: How many of them are lower bounds (they make the mean too low).
        num_at_most: How many of them are upper bounds (they make the mean too high).
    """

    value: float
    num_points: int
    num_at_least: int
    num_at_most: int

    def __str__(self) -> str:
        """Return the mean with its direction: "2.10x", ">= 2.10x", "<= 2.10x" or "~ 2.10x"."""
        signs = {(False, False): "", (True, False): ">= ", (False, True): "<= "}
        sign = signs.get((self.num_at_least > 0, self.num_at_most > 0), "~ ")
        return f"{sign}{self.value:.2f}x"


def cost_of_quality(
    costs: Sequence[float], qualities: Sequence[float], quality: float, better: Better
) -> tuple[float, Literal["at least", "at most"] | None]:
    """Return what a baseline must pay to reach `quality` (linear between measured points).

    Where its curve is not monotone, the cheapest place that reaches `quality` counts, which favours
    the baseline.

    Args:
        costs: The baseline's costs, strictly increasing, positive.
        qualities: Its quality at each.
        quality: The quality to reach.
        better: Whether a "lower" (Fréchet distance) or "higher" (PSNR) value is better.

    Returns:
        The cost, and None or on which side of the measured range the true one lies.

    Raises:
        ValueError: If there are fewer than two points, or `costs` does not increase.
    """
    if len(costs) != len(qualities) or len(costs) < 2:
        raise ValueError(
            f"costs has {len(costs)} values and qualities {len(qualities)}; a curve needs equally "
            "many, and at least two: measure the baseline at more budgets"
        )
    if any(right <= left for left, right in pairwise(costs)):
        raise ValueError(f"costs is {list(costs)}, but must increase strictly: sort the points")
    sign = 1.0 if better == "lower" else -1.0
    errors, target = [sign * value for value in qualities], sign * quality
    if errors[0] <= target:
        return costs[0], None if errors[0] == target else "at most"
    for i in range(1, len(costs)):
        if errors[i] <= target:
            share = (errors[i - 1] - target) / (errors[i - 1] - errors[i])
            return costs[i - 1] + share * (costs[i] - costs[i - 1]), None
    return costs[-1], "at least"


def matched_quality_speedups(
    baseline: Sequence[tuple[float, float]],
    method: Sequence[tuple[float, float]],
    better: Better,
) -> list[SpeedUp]:
    """Return the matched-quality speed-up at each of a method's points.

    The speed-up at latency l is n / l, where the baseline needs latency n for the quality that the
    method has at l (Li et al. 2025, Section 4; both curves interpolated linearly, here only the
    baseline's, because the method is asked for where it was measured).

    Args:
        baseline: Its (cost, quality) points in any order, each cost once.
        method: The method's (cost, quality) points.
        better: Whether a "lower" or "higher" quality is better.
    """
    costs, qualities = zip(*sorted(baseline), strict=True) if baseline else ((), ())
    speedups = []
    for cost, quality in method:
        needed, bound = cost_of_quality(costs, qualities, quality, better)
        speedups.append(SpeedUp(cost, needed / cost, bound))
    return speedups


def mean_speedup(speedups: Sequence[SpeedUp]) -> MeanSpeedUp:
    """Average speed-ups; points outside the baseline's range count as their bounds.

    Raises:
        ValueError: If there is no point.
    """
    if not speedups:
        raise ValueError("speedups is empty; measure the method at one budget or more")
    return MeanSpeedUp(
        sum(point.value for point in speedups) / len(speedups),
        len(speedups),
        sum(point.bound == "at least" for point in speedups),
        sum(point.bound == "at most" for point in speedups),
    )


def best_of(
    curves: Sequence[Sequence[tuple[float, float]]], better: Better
) -> list[tuple[float, float]]:
    """Return the curve of whichever method is best at each cost measured for all of them.

    Args:
        curves: One list of (cost, quality) points a method.
        better: Whether a "lower" or "higher" quality is better.
    """
    pick = min if better == "lower" else max
    tables = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    return [(cost, pick(table[cost] for table in tables)) for cost in common]
