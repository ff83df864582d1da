"""Curves of quality against cost, for the benchmark's report and the demo."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from morse.evaluation.report.looks import Look, find_looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRAMING = ("baseline", "morse")  # kinds whose range a panel shows; others may leave it
LSD_LABEL = "cost, LSD (1 = one Dash evaluation)"


@dataclass(frozen=True)
class Point:
    """A value at a cost, and how far below and above it the uncertainty reaches, if known."""

    cost: float
    value: float
    below: float = 0.0
    above: float = 0.0


@dataclass(frozen=True)
class Curve:
    """One method's points, in the order of their cost."""

    label: str
    solver: str
    kind: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        x_label: Under it.
        y_label: Beside it.
        log_y: Whether values are drawn on a log axis (costs always are).
        curves: One a method.
        ticks: Costs to label; None leaves that to matplotlib.
    """

    x_label: str
    y_label: str
    log_y: bool
    curves: tuple[Curve, ...]
    ticks: tuple[float, ...] | None = None


def draw_panels(
    panels: Sequence[Panel],
    title: str = "",
    legend: bool = True,
    looks: Mapping[str, Look] | None = None,
) -> "Figure":
    """Draw two panels a line, with one legend below them all that covers no data.

    Args:
        panels: At least one.
        title: Above them all; "" for none.
        legend: Whether to draw it.
        looks: From `find_looks`, of these panels and of those drawn elsewhere; None for these only.
    """
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    labels = {curve.label for panel in panels for curve in panel.curves} if legend else set()
    width, longest = 5.5 * columns, max(map(len, labels), default=0)
    # A letter takes about .085 inches, a line and the space between columns .6.
    legend_columns = max(1, min(2 * columns, int(width / (0.085 * longest + 0.6))))
    height = 4.4 * lines + 0.25 * -(-len(labels) // legend_columns) + 0.5 * bool(title)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    looks = find_looks(panels) if looks is None else looks
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, looks)
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=12)
    if legend:
        figure.legend(*_legend_entries(figure), loc="outside lower center", ncols=legend_columns)
    return figure


def legend_figure(panels: Sequence[Panel]) -> "Figure":
    """Return the legend of all panels as a picture of its own, in two columns."""
    figure = draw_panels(panels, legend=False)
    entries = _legend_entries(figure)
    figure.clear()
    figure.set_layout_engine("none")
    figure.legend(*entries, loc="center", ncols=2, frameon=False)
    return figure


def to_png(figure: "Figure") -> bytes:
    """Return the picture as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def to_svg_uri(figure: "Figure") -> str:
    """Return the picture as a data: URI of an SVG cut to what is drawn, equal in every run."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "morse"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _legend_entries(figure: "Figure") -> tuple[list[object], list[str]]:
    """Return a line and a label for each method in any panel."""
    entries = {}
    for axes in figure.axes:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, line)
    return list(entries.values()), list(entries)


def _draw(axes: "Axes", panel: Panel, looks: Mapping[str, Look]) -> None:
    for curve in panel.curves:
        _, caps, bars = axes.errorbar(
            [point.cost for point in curve.points],
            [point.value for point in curve.points],
            yerr=[[p.below for p in curve.points], [p.above for p in curve.points]],
            label=curve.label,
            **_style(curve, looks[curve.label]),
        )
        for part in (*caps, *bars):
            part.set_alpha(0.35)  # longer than the panel is high, many would hide the curves
    _scale(axes, panel)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    axes.grid(True, alpha=0.3)


def _style(curve: Curve, look: Look) -> dict[str, object]:
    leading = curve.kind in FRAMING
    return {
        "color": look.color,
        "linestyle": look.line,
        "linewidth": 1.8 if leading else 1.1,
        "marker": look.marker,
        "markersize": 5 if leading else 4.5,
        "fillstyle": look.fill,
        "elinewidth": 1.2,
        "capsize": 2,
        "zorder": 3 if curve.kind == "morse" else 2,
    }


def _scale(axes: "Axes", panel: Panel) -> None:
    """Log axes with plain numbers; limits from the kinds in `FRAMING`, where any are."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set(xscale="log", yscale="log" if panel.log_y else "linear")
    for axis in [axes.xaxis] + [axes.yaxis] * panel.log_y:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())
    if panel.ticks is not None:
        shown: list[float] = []
        for tick in panel.ticks:
            if not shown or tick > 1.15 * shown[-1]:  # closer labels would overlap
                shown.append(tick)
        axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    framing = [c for c in panel.curves if c.kind in FRAMING] or panel.curves
    values = [point.value for curve in framing for point in curve.points]
    low, high = min(values), max(values)
    if panel.log_y:
        axes.set_ylim(low / 1.25, high * 1.25)
    elif high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
