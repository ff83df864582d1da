"""From measured cells to the benchmark's figures: rows, curves, speed-ups and lossless tests."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

from torch import Tensor

from morse.evaluation.bench.methods import (
    BEST_TRAINING_FREE,
    BEST_WITH_MIXTURE,
    TRAINING_FREE,
    WITH_MIXTURE,
)
from morse.evaluation.bench.store import Cell
from morse.evaluation.fid.feature_sets import FeatureSet
from morse.evaluation.scoring import AXES, Axis, axis_names
from morse.evaluation.stats.bootstrap import Estimate, percentile_interval
from morse.evaluation.stats.curves import UNKNOWN, matched_quality_speedup
from morse.evaluation.stats.lossless import FACTORS, lossless_test
from morse.evaluation.stats.points import (
    Point,
    Statistics,
    best_so_far,
    curve_by_seed,
    errors_at,
    make_curve,
    make_points,
    of_kinds,
)

COSTS = ("lsd", "seconds")
OPTIONS = "scheduler_options"  # of a row


def summarize(
    cells: Sequence[Cell],
    real: FeatureSet | None,
    references: Mapping[int, Tensor],
    statistics: Statistics | None = None,
    titled: Mapping[str, Axis] = AXES,
    deltas: Mapping[str, float] | None = None,
) -> dict[str, object]:
    """Return "axes", "rows", "baseline_curves", "speedups" and "lossless".

    A method that did not engage has a row, and is in nothing else.

    Args:
        cells: What was measured. Repetitions of a method at a budget are averaged.
        real: The real images' features; None without, and then there is no distance to them.
        references: Features of the reference's images, (R, D), of each repetition's seed. Where D
            is 0 there are only the axes that need no features.
        statistics: How; the defaults if left out.
        titled: What axes are called (`axes_of` the extractor's titles).
        deltas: Margins of the lossless test that were given, by axis.
    """
    statistics = statistics or Statistics()
    everything = make_points(cells, real, references, statistics)
    points = [point for point in everything if all(cell.engaged for cell in point.cells)]
    num_features = max((features.shape[1] for features in references.values()), default=0)
    axes = axis_names(num_features, real is not None)
    best = {axis: best_so_far(of_kinds(points, axis, TRAINING_FREE), axis) for axis in axes}
    return {
        "axes": {name: dataclasses.asdict(titled[name]) for name in axes},
        "rows": [
            _row(point, axes) | {"against_best": _against_best(point, best)} for point in everything
        ],
        "baseline_curves": {axis: _describe(best[axis], axis) for axis in axes},
        "speedups": [entry for axis in axes for entry in _speedups(points, axis)],
        "lossless": [
            entry
            for axis in axes
            for entry in _lossless(points, best[axis], axis, (deltas or {}).get(axis))
        ],
    }


def _row(point: Point, axes: Sequence[str]) -> dict[str, object]:
    cells, first = point.cells, point.cells[0]
    fallbacks = sum((Counter(cell.fallbacks) for cell in cells), Counter())
    memory = [cell.peak_memory_mib for cell in cells if cell.peak_memory_mib is not None]
    return {
        "label": point.method.label,
        **dataclasses.asdict(point.method),
        "budget": point.budget,
        "lsd": point.lsd,
        "num_dash": mean(cell.num_dash for cell in cells),  # of adaptive peers they differ
        "num_dot": mean(cell.num_dot for cell in cells),
        "plan": first.plan,
        OPTIONS: first.scheduler_options,
        "fallbacks": dict(fallbacks),
        "engaged": all(cell.engaged for cell in cells),
        "note": "; ".join(dict.fromkeys(cell.note for cell in cells if cell.note)),
        "seconds": point.seconds,
        "batch_seconds": first.batch_seconds,
        "images_per_second": len(first.scores.features) / point.seconds,
        "peak_memory_mib": max(memory, default=None),
        "scores": {axis: _score(point.estimates.get(axis)) for axis in axes},
    }


def _score(estimate: Estimate | None) -> dict[str, object] | None:
    if estimate is None:
        return None
    return {
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "interval": estimate.interval,
        "seed_deviation": estimate.seed_deviation,
        "by_seed": {str(seed): value for seed, value in estimate.by_seed.items()},
    }


def _against_best(
    point: Point, best: Mapping[str, Sequence[tuple[float, Point]]]
) -> dict[str, dict[str, object]]:
    """Say by how much a method is better than the best training-free solver at the LSD it spent.

    Gains are in the axis' unit, positive where the method is better. Both start from the same
    noise and are resampled together, so that what they share cancels.
    """
    if point.method.is_training_free:
        return {}
    gains = {}
    for axis in point.estimates:
        bare = errors_at(best[axis], axis, point.lsd)
        if bare is not None:
            gain = bare - point.errors(axis)
            interval = percentile_interval(gain[1:]) if len(gain) > 2 else None
            gains[axis] = {"gain": float(gain[0]), "interval": interval}
    return gains


def _describe(best: Sequence[tuple[float, Point]], axis: str) -> list[dict[str, object]]:
    return [
        {
            "cost": cost,
            "value": point.estimates[axis].value,
            "label": point.method.label,
            "budget": point.budget,
        }
        for cost, point in best
    ]


def _speedups(points: Sequence[Point], axis: str) -> Iterator[dict[str, object]]:
    """Compare every method with the best training-free solver and with each, in LSD and seconds.

    The training-free solvers are compared with each other where another method was measured, and
    Morse also with the best of them and of those that a mixture begins.
    """
    asked = {point.budget for point in points if not point.method.is_training_free}
    shown = [point for point in points if point.budget in asked and axis in point.estimates]
    baselines = {BEST_TRAINING_FREE: of_kinds(points, axis, TRAINING_FREE)}
    for point in baselines[BEST_TRAINING_FREE]:
        baselines.setdefault(point.method.label, []).append(point)
    own = {name: {name} for name in baselines} | {BEST_TRAINING_FREE: set(baselines)}
    if of_kinds(points, axis, ("mixture",)):
        baselines[BEST_WITH_MIXTURE] = of_kinds(points, axis, WITH_MIXTURE)
        own[BEST_WITH_MIXTURE] = {
            point.method.label for point in points if point.method.kind != "morse"
        }
    for name, baseline in baselines.items():
        for cost in COSTS:
            curve = make_curve(best_so_far(baseline, axis, cost), axis)
            curve = curve and curve.monotone()
            for point in shown:
                if point.method.label in own[name]:
                    continue
                spent = getattr(point, cost)
                head = {"method": point.method.label, "baseline": name, "axis": axis}
                head |= {"cost": cost, "budget": point.budget, "spent": spent}
                errors = point.errors(axis)
                yield head | (matched_quality_speedup(curve, spent, errors) if curve else UNKNOWN)


def _lossless(
    points: Sequence[Point],
    best: Sequence[tuple[float, Point]],
    axis: str,
    given: float | None,
) -> Iterator[dict[str, object]]:
    """Test every method against the best training-free solver with more LSD, where measured."""
    curve = make_curve(best, axis)
    if curve is None:
        return
    by_seed, is_mean = curve_by_seed(best, axis), AXES[axis].side == "fidelity"
    for point in points:
        if point.method.is_training_free:
            continue
        head = {"method": point.method.label, "axis": axis, "budget": point.budget}
        for factor in FACTORS:
            if curve.covers(factor * point.lsd):
                errors = point.errors(axis)
                yield head | lossless_test(
                    curve, by_seed, point.lsd, errors, factor, given, is_mean
                )


def rounded(value: object, digits: int = 6) -> object:
    """Return nested lists and dictionaries with each float cut to so many significant digits.

    Options of a scheduler stay whole: they are no figures, but what a row is repeated with.
    """
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {
            key: part if key == OPTIONS else rounded(part, digits) for key, part in value.items()
        }
    return [rounded(part, digits) for part in value] if isinstance(value, (list, tuple)) else value
