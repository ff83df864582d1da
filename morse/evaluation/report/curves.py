"""The report's curves, from the benchmark's JSON."""

from morse.evaluation.report.data import (
    Measured,
    Result,
    best_row,
    elsewhere,
    engaged_rows,
    headline_axes,
    milliseconds_an_image,
    read_score,
    split_budgets,
)
from morse.evaluation.report.plots import FRAMING, LSD_LABEL, Curve, Panel, Point
from morse.evaluation.report.scores import Axis

MILLISECONDS_LABEL = "wall time, ms an image"
MAX_CURVES = 10  # with more, only the best method of each kind of control or peer is drawn


def quality_panels(result: Result) -> list[Panel]:
    """Return the headline axes against LSD, then against wall time where it was measured.

    Wall times of rows that come from another device are left out.
    """
    panels = []
    for x_label in (LSD_LABEL, MILLISECONDS_LABEL):
        panels += [_panel(result, axis, x_label) for axis in headline_axes(result)]
    return [panel for panel in panels if panel.curves]


def _panel(result: Result, axis: Axis, x_label: str) -> Panel:
    """Return an axis' panel; in LSD the budgets of what is drawn are its ticks."""
    in_lsd = x_label == LSD_LABEL
    groups: dict[str, list[tuple[Measured, Point]]] = {}
    for row in _drawn_rows(result):
        point = _point(result, row, axis, in_lsd)
        if point is not None:
            groups.setdefault(row["label"], []).append((row, point))
    curves = []
    for name, found in groups.items():
        points = sorted((point for _, point in found), key=lambda point: point.cost)
        row = found[0][0]
        curves.append(Curve(name, row["solver"], row["kind"], tuple(points)))
    budgets = {row["budget"] for found in groups.values() for row, _ in found}
    values = [point.value for curve in curves for point in curve.points]
    log_y = axis.better == "lower" and min(values, default=0) > 0
    y_label = f"{axis.short_title}\n{axis.direction}"
    return Panel(x_label, y_label, log_y, tuple(curves), tuple(sorted(budgets)) if in_lsd else None)


def _point(result: Result, row: Measured, axis: Axis, in_lsd: bool) -> Point | None:
    score = read_score(row, axis)
    away = elsewhere(result, row) and not in_lsd
    cost = row["lsd"] if in_lsd else milliseconds_an_image(result, row)
    if score is None or not cost or away:
        return None
    if score.interval is not None:
        low, high = score.interval
        return Point(cost, score.value, max(score.value - low, 0), max(high - score.value, 0))
    error = score.standard_error or 0.0
    return Point(cost, score.value, error, error)


def _drawn_rows(result: Result) -> list[Measured]:
    """Return the rows to draw: all, or where that were too many, the best of each other kind.

    Best at the middle one of Morse's budgets, on the first axis.
    """
    rows = engaged_rows(result)
    if len({row["label"] for row in rows}) <= MAX_CURVES:
        return rows
    budgets, axis = split_budgets(result)[0], headline_axes(result)[0]
    kept = set()
    for kind in {row["kind"] for row in rows} - set(FRAMING):
        own = [row for row in rows if row["kind"] == kind]
        middle = [row for row in own if row["budget"] == budgets[len(budgets) // 2]]
        best = best_row(middle or own, axis)
        kept.add((best or own[0])["label"])
    return [row for row in rows if row["kind"] in FRAMING or row["label"] in kept]
