"""From measured cells to the benchmark's figures: means, standard errors and speed-ups."""

import dataclasses
from collections.abc import Sequence

from morse.evaluation.curves import SpeedUp, best_of, matched_quality_speedups, mean_speedup
from morse.evaluation.runs import Method
from morse.evaluation.scoring import AXES, FIDELITY_AXES, standard_error
from morse.evaluation.store import Cell

BEST = "best baseline"
Curve = dict[int, tuple[float, float]]  # budget -> (cost, quality)
Groups = dict[tuple[Method, int], list[Cell]]


def summarize(cells: Sequence[Cell]) -> dict[str, object]:
    """Return "rows" (a method at a budget, averaged over seeds) and "speedups".

    Standard errors are those of bootstrap replicates over images, the same draws for every method.
    """
    groups: Groups = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.budget), []).append(cell)
    return {
        "rows": [_row(group) for group in groups.values()],
        "speedups": [
            entry
            for axis in AXES
            for cost in ("lsd", "seconds")
            for entry in _speedups(groups, axis, cost)
        ],
    }


def _row(group: list[Cell]) -> dict[str, object]:
    first = group[0]
    row: dict[str, object] = {
        "label": first.method.label,
        **dataclasses.asdict(first.method),
        "budget": first.budget,
        "lsd": first.lsd,
        "num_dash": first.num_dash,
        "num_dot": first.num_dot,
        "plan": first.plan,
        "seconds": sum(cell.seconds for cell in group) / len(group),
        "fallbacks": first.fallbacks,
    }
    for axis in AXES:
        if axis in FIDELITY_AXES and first.method.is_reference(first.budget):
            row |= {axis: None, f"{axis}_standard_error": None, f"{axis}_by_seed": {}}
            continue
        row[axis] = _mean(group, axis)
        row[f"{axis}_standard_error"] = standard_error(_replicates(group, axis))
        row[f"{axis}_by_seed"] = {str(cell.seed): cell.scores[axis].value for cell in group}
    return row


def _mean(group: list[Cell], axis: str) -> float:
    return sum(cell.scores[axis].value for cell in group) / len(group)


def _replicates(group: list[Cell], axis: str) -> tuple[float, ...]:
    """Average replicate b over the seeds, which drew independently."""
    columns = zip(*(cell.scores[axis].replicates for cell in group), strict=True)
    return tuple(sum(column) / len(group) for column in columns)


def _speedups(groups: Groups, axis: str, cost: str) -> list[dict[str, object]]:
    """Compare every method with every bare solver, and with the best of them, on one axis.

    The bare solvers are compared with each other where Morse was measured.
    """
    asked = [budget for method, budget in groups if method.kind != "baseline"]
    methods = list(dict.fromkeys(method for method, _ in groups))
    baselines = [method for method in methods if method.kind == "baseline"]
    curves = _curves(groups, axis, cost)
    targets = {
        solver.label: [list(curve.get(solver, {}).values()) for curve in curves]
        for solver in baselines
    }
    if len(baselines) > 1 and cost == "lsd":
        targets[BEST] = [
            best_of([list(curve.get(solver, {}).values()) for solver in baselines], AXES[axis])
            for curve in curves
        ]
    entries = []
    for name, target in targets.items():
        for method in methods:
            budgets = [budget for budget in curves[0].get(method, {}) if budget in asked]
            own = method.label == name or (name == BEST and method.kind == "baseline")
            if own or not budgets or len(target[0]) < 2:
                continue
            results = [
                matched_quality_speedups(points, [curve[method][n] for n in budgets], AXES[axis])
                for points, curve in zip(target, curves, strict=True)
            ]
            entry = {"method": method.label, "baseline": name, "axis": axis, "cost": cost}
            entries.append({**entry, **_describe(budgets, results)})
    return entries


def _curves(groups: Groups, axis: str, cost: str) -> list[dict[Method, Curve]]:
    """Return each method's points: on all images, then on each replicate."""
    curves: list[dict[Method, Curve]] = []
    for (method, budget), group in groups.items():
        if axis in FIDELITY_AXES and method.is_reference(budget):
            continue
        spent = sum(getattr(cell, cost) for cell in group) / len(group)
        for b, quality in enumerate((_mean(group, axis), *_replicates(group, axis))):
            if b == len(curves):
                curves.append({})
            curves[b].setdefault(method, {})[budget] = (spent, quality)
    return curves


def _describe(budgets: list[int], results: list[list[SpeedUp]]) -> dict[str, object]:
    """Describe the points on all images (`results[0]`), their mean, and its standard error."""
    means = [mean_speedup(points) for points in results]
    return {
        "points": [
            {"budget": budget, **dataclasses.asdict(point), "text": str(point)}
            for budget, point in zip(budgets, results[0], strict=True)
        ],
        "mean": {**dataclasses.asdict(means[0]), "text": str(means[0])},
        "mean_standard_error": standard_error(tuple(mean.value for mean in means[1:])),
    }


def rounded(value: object, digits: int = 6) -> object:
    """Return nested lists and dictionaries with each float cut to so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(part, digits) for key, part in value.items()}
    return [rounded(part, digits) for part in value] if isinstance(value, (list, tuple)) else value
