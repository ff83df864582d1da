"""A baseline's quality against cost, and how much more it pays for a method's quality.

All qualities here are errors (lower is better; negate a PSNR), in arrays (R, ...): row 0 is
measured on all images, and each further row on one bootstrap replicate.
"""

from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from morse.evaluation.stats.bootstrap import percentile_interval

# Where more replicates than this lie outside the baseline's range, a 95 % interval has no end.
MAX_OUTSIDE = 0.025


class Place(IntEnum):
    """Where an error lies on a baseline's curve."""

    INSIDE = 0
    BETTER = 1
    FLAT = 2
    WORSE = 3


# place -> status of a speed-up, and what it means
STATUS = {
    Place.INSIDE: ("measured", ""),
    Place.BETTER: ("saturated", "at least as good as the baseline at its largest budget"),
    Place.FLAT: ("saturated", "where more budget does not make the baseline better"),
    Place.WORSE: ("out of range", "worse than the baseline at its smallest budget"),
}
# The speed-up over a baseline that has no curve.
UNKNOWN = {
    "status": "out of range",
    "value": None,
    "interval": None,
    "median": None,
    "replicates_outside": 0,
    "cheaper": None,
    "note": "the baseline was measured at fewer than two budgets",
}


@dataclass(frozen=True, eq=False)
class Curve:
    """A baseline's error at each cost, linear in log cost between points.

    Attributes:
        costs: (K,), increasing, positive.
        errors: (R, K); for `cost_of` no row may increase, as `monotone` makes them.
    """

    costs: np.ndarray
    errors: np.ndarray

    def monotone(self) -> "Curve":
        """Return the curve with, in each row and at each cost, the best error that costs no more.

        Pooling neighbours (isotonic regression) would make a good point worse than it was
        measured where a dearer one is worse; nobody has to pay for that one.
        """
        return replace(self, errors=np.minimum.accumulate(self.errors, axis=1))

    def covers(self, cost: float) -> bool:
        """Tell whether the baseline was measured at costs on both sides."""
        return bool(self.costs[0] <= cost <= self.costs[-1])

    def error_at(self, cost: float) -> np.ndarray:
        """Return each row's error at a cost, (R,).

        Raises:
            ValueError: If the curve does not cover `cost`.
        """
        if not self.covers(cost):
            raise ValueError(
                f"cost is {cost:g}, but the baseline was measured from {self.costs[0]:g} to "
                f"{self.costs[-1]:g}: measure it there, or ask for a cost between"
            )
        position = np.interp(np.log(cost), np.log(self.costs), np.arange(len(self.costs)))
        left = min(int(position), len(self.costs) - 2)
        share = position - left
        return (1 - share) * self.errors[:, left] + share * self.errors[:, left + 1]

    def cost_of(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what each row pays for an error.

        Args:
            targets: One error a row, (R,).

        Returns:
            Costs (R,), and a `Place` for each, (R,). Outside of the range where the curve improves
            the cost is infinite (better, flat) or 0 (worse).
        """
        rows, last = np.arange(len(targets)), len(self.costs) - 1
        right = (self.errors > targets[:, None]).sum(axis=1)  # the first as good as the target
        at_right = self.errors[rows, right.clip(max=last)]
        after_right = self.errors[rows, (right + 1).clip(max=last)]
        left = (right - 1).clip(min=0)
        at_left = self.errors[rows, left]
        places = np.full(len(targets), Place.INSIDE)
        places[(at_right == targets) & (after_right == targets)] = Place.FLAT
        places[targets <= self.errors[:, -1]] = Place.BETTER
        places[targets > self.errors[:, 0]] = Place.WORSE
        steps = np.where(at_left > at_right, at_left - at_right, 1.0)  # 1: not used, or no step
        share = ((at_left - targets) / steps).clip(0, 1)
        logs = np.log(self.costs)
        costs = np.exp((1 - share) * logs[left] + share * logs[right.clip(max=last)])
        costs = np.where(places == Place.WORSE, 0.0, costs)
        return np.where((places == Place.BETTER) | (places == Place.FLAT), np.inf, costs), places


def matched_quality_speedup(curve: Curve, cost: float, errors: np.ndarray) -> dict[str, object]:
    """Return how many times a method's cost the baseline pays for the method's quality.

    This is Li et al. 2025, Section 4, with the baseline's curve monotone and linear in log cost.
    The interval is the bootstrap's; the cost itself is taken as exact.

    Args:
        curve: The baseline's, with R rows.
        cost: What the method pays.
        errors: The method's error in each row, (R,).

    Returns:
        "status", "value", "interval", "median", "replicates_outside" (how many have no speed-up),
        "cheaper" (in which share of the replicates the method pays less than the baseline would
        have to, or did at the most; None without any) and "note": why value, interval or median is
        None, where one does not exist.
    """
    needed, places = curve.cost_of(errors)
    status, note = STATUS[Place(places[0])]
    speedups, outside = needed[1:] / cost, int((places[1:] != Place.INSIDE).sum())
    entry = {**UNKNOWN, "status": status, "replicates_outside": outside}
    if len(speedups):
        entry["cheaper"] = float(_is_cheaper(curve, cost, errors, needed, places)[1:].mean())
    if status == "measured":
        entry["value"] = float(needed[0] / cost)
        if outside > MAX_OUTSIDE * len(speedups):
            share = outside / len(speedups)
            note = f"no interval: {share:.1%} of the replicates lie outside the baseline's range"
        elif len(speedups) > 1:
            entry["interval"] = percentile_interval(speedups)
            entry["median"] = float(np.median(speedups))
    return {**entry, "note": note}


def _is_cheaper(
    curve: Curve, cost: float, errors: np.ndarray, needed: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """Tell in which rows a method surely costs less than the baseline would, (R,) of bool.

    Where a level stretch or the end of the curve leaves that open, the cheapest point as good as
    the method counts, and where none is, the dearest, which it has to beat in quality alone.
    """
    first = (curve.errors > errors[:, None]).sum(axis=1)
    at_least = curve.costs[first.clip(max=len(curve.costs) - 1)]
    beyond = np.where(first == len(curve.costs), at_least >= cost, at_least > cost)
    return np.where(places == Place.INSIDE, needed > cost, beyond) & (places != Place.WORSE)
