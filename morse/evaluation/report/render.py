"""The benchmark's report, drawn from its JSON alone: Markdown, one HTML page, plots, pictures."""

from pathlib import Path

from morse.evaluation.demo_report import join_strips
from morse.evaluation.report.curves import MAX_CURVES, quality_panels
from morse.evaluation.report.data import Result
from morse.evaluation.report.html import Picture, to_html
from morse.evaluation.report.markdown import to_markdown
from morse.evaluation.report.pictures import png_bytes, read_strips, strip_pictures
from morse.evaluation.report.plots import (
    Panel,
    draw_panels,
    legend_figure,
    to_png,
    to_svg_uri,
)
from morse.evaluation.report.sections import report_sections
from morse.training.checkpoint import write_bytes

TITLE = "Morse: quality against cost"
PLOT, GRID = "benchmark.png", "benchmark_grid.png"
FIGURES = {"quality": PLOT, "pictures": GRID}  # name in `Section.figures` -> file


def render(result: Result, folder: Path) -> list[Path]:
    """Write benchmark.md, benchmark.html, benchmark.png and benchmark_grid.png into `folder`.

    A plot needs rows with scores, the grid pictures; what has nothing to show is not written.

    Args:
        result: The content of benchmark.json, schema 2.
        folder: Made if it is missing.

    Returns:
        The files.

    Raises:
        ValueError: If `result` has another schema version, or a picture in it is no PNG.
    """
    if result.get("schema_version") != 2:
        raise ValueError(
            f"schema_version is {result.get('schema_version')!r}, but this version draws 2; "
            "measure again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    sections, panels = report_sections(result), quality_panels(result)
    strips, subtitle = read_strips(result), _subtitle(result)
    written: dict[str, bytes] = {}
    if panels:
        written[PLOT] = to_png(draw_panels(panels, subtitle))
    if strips:
        written[GRID] = png_bytes(join_strips(strips))
    files = {name: file for name, file in FIGURES.items() if file in written}
    written["benchmark.md"] = to_markdown(TITLE, subtitle, sections, files).encode()
    pictures = {"quality": _plots(panels), "pictures": strip_pictures(result, strips)}
    written["benchmark.html"] = to_html(TITLE, subtitle, sections, pictures).encode()
    for name, content in written.items():
        write_bytes(folder / name, content)
    return [folder / name for name in written]


def _plots(panels: list[Panel]) -> list[Picture]:
    """Return each panel and their legend for the HTML page."""
    if not panels:
        return []
    labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
    pictures = []
    for panel in panels:
        title = panel.y_label.replace("\n", ", ")
        alt = f"{title}, against {panel.x_label}; the tables have the values."
        pictures.append(Picture(to_svg_uri(draw_panels([panel], legend=False)), alt))
    legend = to_svg_uri(legend_figure(panels))
    caption = (
        "Bars: the 95 % interval where there is one, else one standard error. Panels are scaled to "
        "the training-free solvers and Morse; others may leave them, and of more than "
        f"{MAX_CURVES} methods only the best of each other kind is drawn (at the middle budget, "
        "first panel). The tables have every value."
    )
    return [*pictures, Picture(legend, f"Legend: {', '.join(labels)}", caption)]


def _subtitle(result: Result) -> str:
    """Return the conditions in a line."""
    speed, settings = result["speed_ratio"], result["settings"]
    parts = [result["device"], result["dtype"]]
    if result["rows"]:
        seeds = len(settings.get("seeds", ()))
        repeated = f" from each of {seeds} seeds" if seeds > 1 else ""
        parts.insert(0, f"{settings['num_images']:,} images a point{repeated}")
    if speed:
        parts.append(f"N = {speed['speed_ratio']:.2f}")
    return ", ".join(parts)
