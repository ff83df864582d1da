"""The benchmark's report, drawn from its JSON alone: Markdown, one HTML page, plots, pictures."""

from pathlib import Path

from morse.evaluation.report.curves import MAX_CURVES, quality_panels
from morse.evaluation.report.data import Result, guidance_parts, num_paired, used_seeds
from morse.evaluation.report.html import Picture, to_html
from morse.evaluation.report.looks import find_looks
from morse.evaluation.report.markdown import to_markdown
from morse.evaluation.report.pictures import (
    Strips,
    join_strips,
    png_bytes,
    read_strips,
    strip_pictures,
)
from morse.evaluation.report.plots import (
    Panel,
    draw_panels,
    legend_figure,
    to_png,
    to_svg_uri,
)
from morse.evaluation.report.sections import figure_name, report_sections
from morse.files import write_bytes

TITLE = "Morse: quality against cost"
# A figure's name in `Section.figures` -> its file, with the guidance scale in the braces.
FILES = {"quality": "benchmark{}.png", "pictures": "benchmark_grid{}.png"}

# A guidance scale's part of a result, and what its two figures show.
Figures = tuple[Result, list[Panel], Strips]


def render(result: Result, folder: Path) -> list[Path]:
    """Write benchmark.md, benchmark.html, benchmark.png and benchmark_grid.png into `folder`.

    A plot needs rows with scores, the grid pictures; what has nothing to show is not written. With
    guidance each scale has a plot and a grid of its own: benchmark-guidance-3.png.

    Args:
        result: The content of benchmark.json, schema 4, 3 or 2.
        folder: Made if it is missing.

    Returns:
        The files.

    Raises:
        ValueError: If a picture in it is no PNG.
    """
    written: dict[str, bytes] = {}
    pictures: dict[str, list[Picture]] = {}
    figures = _figures(result)
    files = _figure_files(figures)
    for part, panels, strips in figures:
        quality, grid = (figure_name(name, part) for name in FILES)
        if panels:
            written[files[quality]] = to_png(draw_panels(panels, _subtitle(part)))
        if strips:
            written[files[grid]] = png_bytes(join_strips(strips))
        pictures |= {quality: _plots(panels), grid: strip_pictures(part, strips)}
    sections, subtitle = report_sections(result), _subtitle(result)
    written["benchmark.md"] = to_markdown(TITLE, subtitle, sections, files).encode()
    written["benchmark.html"] = to_html(TITLE, subtitle, sections, pictures).encode()
    for name, content in written.items():
        write_bytes(folder / name, content)
    return [folder / name for name in written]


def markdown_report(result: Result) -> str:
    """Return benchmark.md, which is made without drawing the figures that it shows."""
    files = _figure_files(_figures(result))
    return to_markdown(TITLE, _subtitle(result), report_sections(result), files)


def _figures(result: Result) -> list[Figures]:
    return [(part, quality_panels(part), read_strips(part)) for part in guidance_parts(result)]


def _figure_files(figures: list[Figures]) -> dict[str, str]:
    """Return the file of each figure that has something to show, by its `Section.figures` name."""
    return {
        figure_name(name, part): file.format(_mark(part))
        for part, *contents in figures
        for (name, file), shown in zip(FILES.items(), contents, strict=True)
        if shown
    }


def _mark(part: Result) -> str:
    scale = part["guidance_scale"]
    return "" if scale is None else f"-guidance-{scale:g}"


def _plots(panels: list[Panel]) -> list[Picture]:
    """Return each panel and their legend for the HTML page."""
    if not panels:
        return []
    looks, pictures = find_looks(panels), []
    for panel in panels:
        title = panel.y_label.replace("\n", ", ")
        alt = f"{title}, against {panel.x_label}; the tables have the values."
        pictures.append(Picture(to_svg_uri(draw_panels([panel], legend=False, looks=looks)), alt))
    legend = to_svg_uri(legend_figure(panels))
    caption = (
        "Bars: the 95 % interval where there is one, else one standard error. Panels are scaled to "
        "the bare pipeline's solvers and Morse; others may leave them, and of more than "
        f"{MAX_CURVES} methods only the best of each other kind is drawn (at the middle budget, "
        "first panel). The tables have every value."
    )
    return [*pictures, Picture(legend, f"Legend: {', '.join(looks)}", caption)]


def _subtitle(result: Result) -> str:
    """Return the conditions of a result, or of a part of it, in a line."""
    settings = result["settings"]
    parts = [result["device"], result["dtype"]]
    if result["rows"]:
        seeds = len(used_seeds(result))
        repeated = f" from each of {seeds} seeds" if seeds > 1 else ""
        number, paired = settings["num_images"], num_paired(result)
        few = f" ({paired:,} against the reference)" if paired < number else ""
        parts.insert(0, f"{number:,} images a point{few}{repeated}")
    if result.get("guidance_scale") is not None:
        parts.insert(0, f"guidance {result['guidance_scale']:g}")
    speeds = [part["speed_ratio"] for part in result.get("guidance") or [result]]
    if all(speeds):
        parts.append("N = " + ", ".join(f"{speed['speed_ratio']:.2f}" for speed in speeds))
    if result.get("guidance"):
        scales = (f"{part['guidance_scale']:g}" for part in result["guidance"])
        parts.append("guidance " + ", ".join(scales))
    return ", ".join(parts)
