"""Tables, picture grids and plots of measured methods."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from morse.evaluation.metrics import FRECHET_LABEL

# One colour a solver and kind; Okabe and Ito's palette, told apart by colour-blind readers too.
COLORS = {
    ("ddim", "baseline"): "#56B4E9",
    ("ddim", "morse"): "#0072B2",
    ("dpmsolver++", "baseline"): "#E69F00",
    ("dpmsolver++", "morse"): "#D55E00",
    ("unipc", "baseline"): "#CC79A7",
    ("unipc", "morse"): "#009E73",
}
LINES = {"baseline": "--", "morse": "-", "reuse": ":", "independent": "-."}
MARKERS = "osD^v"


@dataclass(frozen=True)
class Row:
    """One method at one budget, as shown in tables and plots.

    Attributes:
        label: The method's name.
        solver: Its solver, a key of `runs.SOLVERS`.
        kind: A key of `runs.KINDS`.
        budget: LSD asked for.
        lsd: LSD spent.
        num_dash: Dash evaluations an image.
        num_dot: Dot evaluations an image.
        seconds: Wall time for all images.
        psnr: Mean same-noise PSNR to the reference, in dB; None for the reference itself.
        frechet: Fréchet distance to the real training images.
        frechet_to_reference: The same to the reference sampler's images; None like `psnr`.
        plan: Which evaluations were Dash's, such as "DooDoo"; "" for the bare pipeline.
    """

    label: str
    solver: str
    kind: str
    budget: int
    lsd: float
    num_dash: int
    num_dot: int
    seconds: float
    psnr: float | None
    frechet: float
    frechet_to_reference: float | None
    plan: str = ""


def results_table(rows: Sequence[Row], title: str) -> object:
    """Build a `rich.table.Table`, one line a row, ruled between budgets; fits in 80 columns.

    Args:
        rows: Sorted as they shall appear.
        title: Printed above.
    """
    from rich import box
    from rich.table import Table

    caption = f"Fréchet = {FRECHET_LABEL}"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("method", no_wrap=True)
    for header in (
        "LSD",
        "Dash",
        "Dot",
        "wall\nsec.",
        "PSNR\ndB",
        "Fréchet\nto ref.",
        "Fréchet\nto real",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(
            row.label,
            f"{row.lsd:.2f}".removesuffix(".00"),
            str(row.num_dash),
            str(row.num_dot),
            f"{row.seconds:.2f}",
            f"{row.psnr:.2f}",
            f"{row.frechet_to_reference:.3f}",
            f"{row.frechet:.2f}",
            end_section=i + 1 == len(rows) or rows[i + 1].budget != row.budget,
        )
    return table


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
    gap, cells = 2, [_cells(images[:columns], scale) for _, images in labelled]
    height, width = cells[0].shape[1:3]
    font = ImageFont.load_default(size=max(12, height // 4))
    label_width = 16 + round(max(font.getlength(label) for label, _ in labelled))
    grid = Image.new(
        "RGB",
        (label_width + len(cells[0]) * (width + gap), len(cells) * (height + gap)),
        "white",
    )
    draw = ImageDraw.Draw(grid)
    for i, (label, _) in enumerate(labelled):
        top = i * (height + gap)
        draw.text((8, top + height // 2), label, fill="black", font=font, anchor="lm")
        for j, cell in enumerate(cells[i]):
            grid.paste(Image.fromarray(cell), (label_width + j * (width + gap), top))
    grid.save(file)


def _cells(images: Tensor, scale: int) -> np.ndarray:
    """Return (N, C, H, W) in [0, 1] as magnified 8-bit RGB, (N, scale H, scale W, 3)."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels
    return pixels.repeat(scale, axis=1).repeat(scale, axis=2)


def plot_quality(rows: Sequence[Row], file: Path, title: str, frechet: str = "frechet") -> None:
    """Plot Fréchet distance (log) and PSNR against LSD (log) and write a PNG.

    Args:
        rows: Any order; a label is a curve.
        file: Where to.
        title: Above both panels.
        frechet: Which of `Row`'s two distances: "frechet" or "frechet_to_reference".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    target = {"frechet": "real images", "frechet_to_reference": "reference images"}[frechet]
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    seen: list[tuple[str, str]] = []
    for label in dict.fromkeys(row.label for row in rows):
        points = sorted((row for row in rows if row.label == label), key=lambda row: row.lsd)
        seen.append((points[0].solver, points[0].kind))
        style = _line_style(points[0], seen.count(seen[-1]) - 1)
        for axes, axis in ((left, frechet), (right, "psnr")):
            pairs = [(row.lsd, getattr(row, axis)) for row in points]
            kept = [(cost, value) for cost, value in pairs if value is not None]
            axes.plot(*zip(*kept, strict=True), label=label if axes is left else None, **style)
    _log_distance_axis(left)
    left.set(ylabel=f"Fréchet distance to {target}, lower is better")
    right.set(ylabel="same-noise PSNR to reference, dB, higher is better")
    for axes in (left, right):
        _log_cost_axis(axes, sorted({row.budget for row in rows}))
    figure.suptitle(f"{title}\n{FRECHET_LABEL}", fontsize=12)
    figure.legend(loc="outside lower center", ncols=min(4, len({row.label for row in rows})))
    figure.savefig(file, dpi=110)


def _line_style(row: Row, variant: int) -> dict[str, object]:
    """Style a curve by solver and kind; `variant` counts curves alike in both (other ratios)."""
    return {
        "color": COLORS.get(
            (row.solver, row.kind), COLORS.get((row.solver, "baseline"), "#777777")
        ),
        "linestyle": LINES[row.kind],
        "marker": MARKERS[variant % len(MARKERS)],
        "markersize": 5,
    }


def _log_cost_axis(axes: object, ticks: list[int]) -> None:
    """Give `axes` a log cost axis labelled with plain numbers, none closer than 15 percent."""
    shown: list[int] = []
    for tick in ticks:
        if not shown or tick > 1.15 * shown[-1]:
            shown.append(tick)
    axes.set(xscale="log", xlabel="cost, LSD (1 = one Dash evaluation)")
    axes.set_xticks(shown, [str(tick) for tick in shown])
    axes.set_xticks([], minor=True)
    axes.grid(True, alpha=0.3)


def _log_distance_axis(axes: object) -> None:
    """Give `axes` a log distance axis with plain labels at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set(yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
