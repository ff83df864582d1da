"""A method at a budget with its bootstrap, and the curves of training-free solvers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from torch import Tensor

from morse.evaluation.bench.methods import Kind, Method
from morse.evaluation.bench.store import Cell
from morse.evaluation.fid.feature_sets import FeatureSet
from morse.evaluation.scoring import AXES, REFERENCE_AXES
from morse.evaluation.stats.bootstrap import Estimate, SeedBootstrap, resample_real
from morse.evaluation.stats.curves import Curve
from morse.settings import require_least

Draws = dict[str, np.ndarray]  # axis -> (1 + replicates,)
SEED = 0  # of the draws, combined with each repetition's first image seed


@dataclass(frozen=True)
class Statistics:
    """How figures are made from cells; none of it needs a new measurement.

    Attributes:
        num_replicates: Bootstrap replicates; 0 leaves out errors and intervals.
        device: Where kernels are computed, in float64.
    """

    num_replicates: int = 1000
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check the range."""
        require_least(self, {"num_replicates": 0})


@dataclass(frozen=True, eq=False)
class Point:
    """A method at a budget: its cells, one a repetition, and its estimate on each axis.

    An axis on which the point is the reference itself has no estimate.
    """

    method: Method
    budget: int
    cells: tuple[Cell, ...]
    estimates: dict[str, Estimate]

    @property
    def lsd(self) -> float:
        """LSD spent an image, the mean of the repetitions, of which an adaptive peer's differ."""
        return fmean(cell.lsd for cell in self.cells)

    @property
    def seconds(self) -> float:
        """Wall time for one repetition's images, the mean."""
        return fmean(cell.seconds for cell in self.cells)

    def errors(self, axis: str) -> np.ndarray:
        """The axis' draws with the sign that makes lower better, (1 + replicates,)."""
        return AXES[axis].sign * self.estimates[axis].draws


def make_points(
    cells: Sequence[Cell],
    real: FeatureSet | None,
    references: Mapping[int, Tensor],
    statistics: Statistics,
) -> list[Point]:
    """Resample each repetition and average the repetitions of each method at each budget.

    Args:
        cells: What was measured.
        real: The real images' features; None without them, and unused where images have none.
        references: Features of the reference's images, (R, D), of each repetition's seed.
        statistics: How to resample.

    Raises:
        ValueError: If a seed has no reference, or another number of images than it, or if not all
            images have as many features.
    """
    draws = _draw(cells, real, references, statistics)
    groups: dict[tuple[Method, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.budget), []).append(cell)
    return [
        Point(method, budget, tuple(group), _estimates(method, budget, group, draws))
        for (method, budget), group in groups.items()
    ]


def _draw(
    cells: Sequence[Cell],
    real: FeatureSet | None,
    references: Mapping[int, Tensor],
    statistics: Statistics,
) -> dict[Cell, Draws]:
    """Return each cell's draws; one repetition's resamples are in memory at a time."""
    number, draws = statistics.num_replicates, {}
    if missing := {cell.seed for cell in cells} - set(references):
        raise ValueError(
            f"references lacks seed {min(missing)}, but cells were measured from it: give the "
            "features of the reference's images from the same seeds"
        )
    num_features = _num_features(cells, real, references)
    rng, reals = np.random.default_rng([SEED]), None
    if real is not None and num_features:
        reals = resample_real(real, number, rng, statistics.device)
    for seed in dict.fromkeys(cell.seed for cell in cells):
        # numpy pads seeds with zeros, so that [s, 0] would repeat the stream of [s]: hence + 1.
        rng = np.random.default_rng([SEED, seed + 1])
        own = [cell for cell in cells if cell.seed == seed]
        num_images = len(own[0].scores.features)
        bootstrap = SeedBootstrap(
            num_images, references[seed], reals, number, rng, statistics.device
        )
        draws |= {cell: bootstrap.draws(cell.scores) for cell in own}
    return draws


def _num_features(
    cells: Sequence[Cell], real: FeatureSet | None, references: Mapping[int, Tensor]
) -> int:
    """Return how many features an image has, which must be as many everywhere."""
    found = {features.shape[1] for features in references.values()}
    found |= {cell.scores.features.shape[1] for cell in cells}
    if real is not None and found - {0}:
        found.add(len(real.mean))
    if len(found) > 1:
        raise ValueError(
            f"images have {' or '.join(map(str, sorted(found)))} features, so they, or the real "
            "ones, were measured by different extractors; measure again in another output_dir"
        )
    return max(found, default=0)


def _estimates(
    method: Method, budget: int, group: Sequence[Cell], draws: Mapping[Cell, Draws]
) -> dict[str, Estimate]:
    known = REFERENCE_AXES if method.is_reference(budget) else ()
    return {
        axis: Estimate(
            np.mean([draws[cell][axis] for cell in group], axis=0),
            {cell.seed: float(draws[cell][axis][0]) for cell in group},
        )
        for axis in AXES
        if axis not in known and axis in draws[group[0]]
    }


def of_kinds(points: Sequence[Point], axis: str, kinds: Sequence[Kind]) -> list[Point]:
    """Return the points of methods of some kinds that have an estimate on an axis."""
    return [p for p in points if p.method.kind in kinds and axis in p.estimates]


def best_so_far(points: Sequence[Point], axis: str, cost: str = "lsd") -> list[tuple[float, Point]]:
    """Return the costs, rising, at which a point is better than all that cost less, and the last.

    What is dearer and no better is left out, for nobody has to pay for it: neither does it make the
    curve worse, nor does it say that nothing better was to be had there, where a better solver may
    not have been measured. Decided on all images; a point's replicates come with it. At the last
    cost that was measured stands the best of all.

    Args:
        points: Of one solver, or of several: then the best of them all.
        axis: A key of `AXES`.
        cost: "lsd" or "seconds".
    """
    best: dict[float, Point] = {}
    latest: Point | None = None
    ordered = sorted(points, key=lambda point: getattr(point, cost))
    for point in ordered:
        if latest is None or point.errors(axis)[0] < latest.errors(axis)[0]:
            latest = best[getattr(point, cost)] = point
    if latest is not None:
        best[getattr(ordered[-1], cost)] = latest
    return list(best.items())


def make_curve(best: Sequence[tuple[float, Point]], axis: str) -> Curve | None:
    """Return a curve through what `best_so_far` gave, or None for fewer than two costs.

    It is to be read by cost. Replicates are those of the points that are best on all images, even
    where another is better in one of them: the least of several would be biased downwards.
    """
    if len(best) < 2:
        return None
    errors = np.stack([point.errors(axis) for _, point in best], axis=1)
    return Curve(np.array([cost for cost, _ in best]), errors)


def curve_by_seed(best: Sequence[tuple[float, Point]], axis: str) -> Curve | None:
    """Return such a curve with a row a repetition; None where not two have all points."""
    values = [point.estimates[axis].by_seed for _, point in best]
    seeds = sorted(set.intersection(*map(set, values))) if len(values) > 1 else []
    if len(seeds) < 2:
        return None
    errors = AXES[axis].sign * np.array([[value[seed] for value in values] for seed in seeds])
    return Curve(np.array([cost for cost, _ in best]), errors)


def errors_at(best: Sequence[tuple[float, Point]], axis: str, cost: float) -> np.ndarray | None:
    """Return what `best_so_far` has for a cost, (R,), at the least that was measured if for less.

    None for more than was measured: who knows what the baseline would have there.
    """
    if not best or cost > best[-1][0]:
        return None
    curve = make_curve(best, axis)
    return best[0][1].errors(axis) if curve is None else curve.error_at(max(cost, curve.costs[0]))
