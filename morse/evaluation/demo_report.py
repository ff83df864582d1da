"""The demo's table, picture grid and plot of measured methods."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from morse.evaluation.metrics import FRECHET_LABEL
from morse.evaluation.report.pictures import join_strips, to_bytes, to_picture
from morse.evaluation.report.plots import LSD_LABEL, Curve, Panel, Point, draw_panels, to_png
from morse.files import replacing, write_bytes

GAP = 2  # white pixels between the grid's pictures


@dataclass(frozen=True)
class Row:
    """One method at one budget, as shown in tables and plots.

    Attributes:
        label: The method's name.
        solver: Its solver, a key of `solvers.SOLVERS`.
        kind: A key of `methods.KINDS`.
        budget: LSD asked for.
        lsd: LSD spent.
        num_dash: Dash evaluations an image, on average.
        num_dot: Dot evaluations an image, on average.
        seconds: Wall time for all images.
        psnr: Mean same-noise PSNR to the reference, in dB; None for the reference itself.
        frechet: Fréchet distance to the real training images; None for other than Fashion-MNIST's.
        frechet_to_reference: The same to the reference sampler's images; None like either.
        plan: Which evaluations were Dash's, such as "DooDoo"; "" for the bare pipeline.
    """

    label: str
    solver: str
    kind: str
    budget: int
    lsd: float
    num_dash: float
    num_dot: float
    seconds: float
    psnr: float | None
    frechet: float | None
    frechet_to_reference: float | None
    plan: str = ""


def has_distances(rows: Sequence[Row]) -> bool:
    """Tell whether Fréchet distances were measured."""
    return any(row.frechet is not None for row in rows)


def results_table(rows: Sequence[Row], title: str) -> object:
    """Build a `rich.table.Table`, one line a row, ruled between budgets; fits in 80 columns.

    Args:
        rows: Sorted as they shall appear.
        title: Printed above.
    """
    from rich import box
    from rich.table import Table

    with_distances = has_distances(rows)
    caption = f"Fréchet = {FRECHET_LABEL}" if with_distances else None
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("method", no_wrap=True)
    distances = ("Fréchet\nto ref.", "Fréchet\nto real") if with_distances else ()
    for header in ("LSD", "Dash", "Dot", "wall\nsec.", "PSNR\ndB", *distances):
        table.add_column(header, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        cells = [_told(row.psnr, 2)]
        if with_distances:
            cells += [_told(row.frechet_to_reference, 3), _told(row.frechet, 2)]
        table.add_row(
            row.label,
            f"{row.lsd:.2f}".removesuffix(".00"),
            f"{row.num_dash:.4g}",
            f"{row.num_dot:.4g}",
            f"{row.seconds:.2f}",
            *cells,
            end_section=i + 1 == len(rows) or rows[i + 1].budget != row.budget,
        )
    return table


def _told(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def save_grid(
    labelled: Sequence[tuple[str, Tensor]], file: Path, scale: int = 2, columns: int = 12
) -> None:
    """Write a PNG: a labelled row a method, a column a noise.

    Args:
        labelled: (label, images (N, C, H, W) in [0, 1] with C = 1 or 3) for each row.
        file: Where to.
        scale: Whole-number magnification, without smoothing.
        columns: At most so many images of each row.
    """
    strips = [(label, _strip(images[:columns], scale)) for label, images in labelled]
    with replacing(file) as temporary:
        join_strips(strips, GAP).save(temporary, "PNG")


def _strip(images: Tensor, scale: int) -> Image.Image:
    """Return images (N, C, H, W) in [0, 1] side by side, magnified, with a gap after each."""
    pixels = to_bytes(images).repeat(scale, axis=1).repeat(scale, axis=2)
    pixels = np.pad(pixels, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=255)
    return to_picture(np.concatenate(pixels, axis=1))


def plot_quality(rows: Sequence[Row], file: Path, title: str) -> None:
    """Plot distance to the reference (log), if measured, and PSNR against LSD and write a PNG.

    Args:
        rows: Any order; a label is a curve.
        file: Where to.
        title: Above both panels.
    """
    distance = "Fréchet distance to reference images, lower is better"
    panels = [
        _panel(rows, "frechet_to_reference", distance, True),
        _panel(rows, "psnr", "same-noise PSNR to reference, dB, higher is better", False),
    ]
    if panels[0].curves:
        title = f"{title}\n{FRECHET_LABEL}"
    write_bytes(file, to_png(draw_panels([panel for panel in panels if panel.curves], title)))


def _panel(rows: Sequence[Row], axis: str, label: str, may_log: bool) -> Panel:
    """Return an axis' panel, on a log axis where values may be and allow it."""
    drawn = [row for row in rows if _is_drawn(row, axis)]
    ticks = tuple(sorted({row.budget for row in drawn}))
    log_y = may_log and min((getattr(row, axis) for row in drawn), default=0) > 0
    return Panel(LSD_LABEL, label, log_y, _curves(rows, axis), ticks)


def _is_drawn(row: Row, axis: str) -> bool:
    """Tell whether a row has a value; pictures that are not finite have none that can be drawn."""
    value = getattr(row, axis)
    return value is not None and math.isfinite(value)


def _curves(rows: Sequence[Row], axis: str) -> tuple[Curve, ...]:
    """Return a curve a label, without the points that have no finite value."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.lsd):
        if _is_drawn(row, axis):
            groups.setdefault(row.label, []).append(row)
    return tuple(
        Curve(
            label,
            group[0].solver,
            group[0].kind,
            tuple(Point(row.lsd, getattr(row, axis)) for row in group),
        )
        for label, group in groups.items()
    )
