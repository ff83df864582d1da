import pytest
import torch
from PIL import Image
from rich.console import Console

from morse.evaluation.report import Row, plot_quality, results_table, save_grid

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


@pytest.mark.parametrize("frechet", ["frechet", "frechet_to_reference"])
def test_the_plot_is_written_without_a_display(tmp_path, frechet, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    plot_quality(ROWS, tmp_path / "plot.png", "title", frechet)
    assert Image.open(tmp_path / "plot.png").size == (1210, 616)
