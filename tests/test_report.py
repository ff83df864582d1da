from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console

from morse.evaluation.demo_report import (
    Row,
    _curves,
    _panel,
    plot_quality,
    results_table,
    save_grid,
)
from morse.evaluation.report.looks import COLORS, KINDS, find_looks
from morse.evaluation.report.pictures import join_strips
from morse.evaluation.report.plots import Curve, Panel, Point, draw_panels

ROWS = [
    Row(label, solver, kind, budget, budget - 0.25, budget, 2, 0.5, 20.0, 1.5 / budget, 0.5)
    for budget in (5, 10)
    for label, solver, kind in (
        ("DDIM", "ddim", "baseline"),
        ("Morse-DDIM r2", "ddim", "morse"),
        ("Reuse-DDIM r2", "ddim", "reuse"),
    )
]


def test_the_table_shows_every_row_and_names_the_metric():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(ROWS, "a title"))
    text = console.export_text()
    for wanted in ("a title", "Morse-DDIM r2", "4.75", "0.30", "Fréchet distance (Fashion-MNIST"):
        assert wanted in text
    assert "…" not in text  # nothing cut off at 80 columns
    assert text.count("DDIM") == len(ROWS)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_holds_the_pixels(tmp_path, channels):
    first, second = torch.zeros(3, channels, 8, 8), torch.zeros(3, channels, 8, 8)
    first[0, :, 0, 0], second[2] = 1.0, 0.5
    save_grid([("first", first), ("second, longer", second)], tmp_path / "g.png", scale=4)
    grid = Image.open(tmp_path / "g.png")
    width, height, cell = *grid.size, 8 * 4 + 2
    assert height == 2 * cell
    left = width - 3 * cell
    assert [grid.getpixel((left + x, 0)) for x in (0, 3, 4)] == [
        (255, 255, 255),
        (255, 255, 255),
        (0, 0, 0),
    ]
    assert grid.getpixel((left + 2 * cell + 10, cell + 10)) == (128, 128, 128)


def test_the_grid_is_cut_to_so_many_columns(tmp_path):
    images = torch.zeros(9, 1, 8, 8)
    save_grid([("a", images)], tmp_path / "all.png")
    save_grid([("a", images)], tmp_path / "few.png", columns=4)
    widths = [Image.open(tmp_path / name).width for name in ("all.png", "few.png")]
    assert widths[0] - widths[1] == 5 * (16 + 2)


def test_the_plot_is_written_without_a_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    plot_quality(ROWS, tmp_path / "plot.png", "title")
    image = Image.open(tmp_path / "plot.png")
    assert image.width == 1210
    colors = {color for _, color in image.convert("RGB").getcolors(2**24)}
    assert {(0x56, 0xB4, 0xE9), (0x00, 0x72, 0xB2)} <= colors  # DDIM, and Morse with it


def test_a_legend_covers_no_data_and_limits_come_from_solvers_and_morse():
    rows = [*ROWS, replace(ROWS[-1], label="Off", kind="independent", frechet=500.0)]
    panel = Panel("x", "y", True, _curves(rows, "frechet"), (5, 10))
    figure = draw_panels([panel, panel], "title")
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "DDIM",
        "Morse-DDIM r2",
        "Reuse-DDIM r2",
        "Off",
    ]
    assert figure.axes[0].get_ylim() == pytest.approx((0.15 / 1.25, 0.3 * 1.25))
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"


def test_a_legend_of_long_names_fits_into_the_picture():
    curves = tuple(
        Curve(
            f"DeepCache-Leapfrog, power 1.5 interval {k}", "leapfrog", "deepcache", (Point(5, k),)
        )
        for k in range(1, 6)
    )
    figure = draw_panels([Panel("x", "y", False, curves)] * 2)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width


def test_error_bars_are_the_points_own():
    curve = Curve("DDIM", "ddim", "baseline", (Point(5, 2.0, 0.5, 1.0), Point(9, 1.0)))
    (container,) = draw_panels([Panel("x", "y", False, (curve,))]).axes[0].containers
    segments = container[2][0].get_segments()
    assert segments[0].tolist() == [[5, 1.5], [5, 3.0]]
    assert segments[1].tolist() == [[9, 1.0], [9, 1.0]]


def make_panel(methods):
    """A panel with a curve a (label, solver, kind)."""
    curves = [Curve(*method, (Point(5, 1.0 + i),)) for i, method in enumerate(methods)]
    return Panel("x", "y", False, tuple(curves))


def drawn_looks(axes):
    """What is drawn of each curve: matplotlib calls every dash pattern of its own "--"."""
    lines = {container.get_label(): container[0] for container in axes.containers}
    return {
        label: (line.get_color(), line.get_linestyle(), line.get_marker(), line.get_fillstyle())
        for label, line in lines.items()
    }


def test_no_two_curves_look_alike():
    methods = [(kind, "ddim", kind) for kind in (*KINDS, "a new one", "another")]
    methods += [(f"Morse-{solver}", solver, "morse") for solver in ("unipc", "deis", "heun")]
    methods += [(f"Morse-PNDM r{i}", "pndm", "morse") for i in range(6)]
    looks = drawn_looks(draw_panels([make_panel(methods)]).axes[0])
    assert len(set(looks.values())) == len(looks) == len(methods)
    # Ratios differ in fill first.
    first, second = looks["Morse-PNDM r0"], looks["Morse-PNDM r1"]
    assert first[:3] == second[:3] and first[3] != second[3]


def test_a_method_looks_the_same_in_every_panel_and_alone():
    both = [("r1", "ddim", "morse"), ("r2", "ddim", "morse")]
    panels = [make_panel(both), make_panel(both[1:])]
    first, second = (drawn_looks(axes) for axes in draw_panels(panels).axes)
    assert second == {"r2": first["r2"]}
    alone = draw_panels(panels[1:], looks=find_looks(panels)).axes[0]
    assert drawn_looks(alone) == second != drawn_looks(draw_panels(panels[1:]).axes[0])


def test_every_color_can_be_seen_on_white():
    for color in COLORS.values():
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (((part + 0.055) / 1.055) ** 2.4 for part in parts)
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        assert 1.05 / (luminance + 0.05) > 2.2  # WCAG's contrast; the brightest are wide lines


def test_a_distance_of_zero_or_an_infinite_psnr_is_no_obstacle(tmp_path):
    axis = "frechet_to_reference"
    rows = [replace(ROWS[0], **{axis: 0.0}), replace(ROWS[1], psnr=float("inf")), *ROWS[2:]]
    assert not _panel(rows, axis, "y", True).log_y and _panel(ROWS, axis, "y", True).log_y
    assert "Morse-DDIM r2" in {curve.label for curve in _curves(rows, "psnr")}
    plot_quality(rows, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").exists()


def test_only_budgets_with_a_value_have_a_tick():
    rows = [replace(row, psnr=None) if row.budget == 10 else row for row in ROWS]
    assert _panel(rows, "psnr", "y", False).ticks == (5,)
    assert _panel(rows, "frechet", "y", True).ticks == (5, 10)


def test_strips_of_unequal_size_are_joined():
    first, second = Image.new("L", (40, 10), 10), Image.new("L", (60, 20), 20)
    joined = join_strips([("first", first), ("second", second)], gap=3)
    left = joined.width - 60
    assert joined.height == 10 + 20 + 2 * 3
    assert joined.getpixel((left + 39, 9)) == (10, 10, 10)
    assert joined.getpixel((left + 40, 9)) == (255, 255, 255)
    assert joined.getpixel((left + 59, 32)) == (20, 20, 20)
