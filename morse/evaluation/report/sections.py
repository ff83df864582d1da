"""The benchmark's report in blocks, drawn from its JSON alone."""

from collections.abc import Iterable
from dataclasses import replace

from morse.evaluation.report.blocks import Section, Table, budget_matrix
from morse.evaluation.report.costs import (
    costs_section,
    missing_section,
    not_engaged_section,
    remarks_section,
    speed_ratios_section,
)
from morse.evaluation.report.data import (
    BEST_TRAINING_FREE,
    NONE,
    Axis,
    Measured,
    Result,
    best_training_free_row,
    decimals_of,
    elsewhere,
    engaged_rows,
    footnotes,
    headline_axes,
    morse_names,
    read_axes,
    read_score,
    row_name,
    split_budgets,
)
from morse.evaluation.report.limits import claim_section, limits_section
from morse.evaluation.report.speedups import lossless_section, speedups_section


def report_sections(result: Result) -> list[Section]:
    """Return the whole report, what a reader wants first; sections without content are left out."""
    if not result["rows"]:
        sections = [conditions_section(result), speed_ratios_section(result)]
    else:
        sections = [
            claim_section(result),
            conditions_section(result),
            quality_section(result),
            limits_section(result),
            pictures_section(result),
            speedups_section(result),
            lossless_section(result),
            costs_section(result),
            speed_ratios_section(result),
            remarks_section(result),
            missing_section(result),
            not_engaged_section(result),
        ]
    return [part for part in sections if part.text or part.tables or part.folded]


def conditions_section(result: Result) -> Section:
    """What everything was measured with, in a paragraph."""
    settings, speed = result["settings"], result["speed_ratio"]
    parts = [f"{result['device']}, {result['dtype']}."]
    if result["rows"]:
        seeds, batch = settings.get("seeds", ()), settings.get("batch_size")
        each = f" from each of {len(seeds)} seeds ({_join(seeds)})" if len(seeds) > 1 else ""
        size = f", batch {batch}" if batch else ""
        parts.append(f"{settings['num_images']:,} images of each method and budget{each}{size}.")
    if speed:
        parts.append(f"N = {speed['speed_ratio']:.2f} ({speed['how']}).")
    for title, key in (("Reference", "reference"), ("Real images", "real_images")):
        if result.get(key):
            parts.append(f"{title}: {result[key]}.")
    if result.get("features_test_accuracy"):
        digest = str(result.get("features_sha256", ""))[:12]
        parts.append(
            f"The features' classifier is right on {100 * result['features_test_accuracy']:.1f} % "
            f"of the test images (sha256 {digest})."
        )
    versions = ("torch", "diffusers", "morse-diffusion", "python")
    parts.append(", ".join(f"{name} {result[name]}" for name in versions if name in result) + ".")
    words = "1 LSD is the time of one evaluation of Dash; one of Dot costs 1/N."
    if result["rows"]:
        words += " r is a plan's ratio, evaluations per LSD."
    if any(_has_error(row, axis) for row in result["rows"] for axis in read_axes(result)):
        words += " ± is the bootstrap's standard error over images."
    return Section("Conditions", (" ".join(parts), words), code=result["command"])


def _has_error(row: Measured, axis: Axis) -> bool:
    score = read_score(row, axis)
    return score is not None and score.standard_error is not None


def quality_section(result: Result) -> Section:
    """Every method on every axis, the headline axes first."""
    headline, (main, others) = headline_axes(result), split_budgets(result)
    rest = [axis for axis in read_axes(result) if axis not in headline]
    folded = [quality_table(result, axis, main) for axis in rest]
    for axis in (*headline, *rest):
        table = quality_table(result, axis, others)
        folded.append(replace(table, title=f"{table.title}: other budgets"))
    return Section(
        "Quality at each budget",
        tables=tuple(quality_table(result, axis, main) for axis in headline),
        folded=tuple(table for table in folded if table.rows),
        figures=("quality",),
    )


def quality_table(result: Result, axis: Axis, budgets: list[float]) -> Table:
    """Value ± error of the best training-free solver, then of every method, at `budgets`."""
    rows = {
        (row_name(row), row["budget"]): row
        for row in engaged_rows(result)
        if row["budget"] in budgets
    }
    best = {budget: best_training_free_row(result, axis, budget) for budget in budgets}
    solvers = list(dict.fromkeys(row["label"] for row in best.values() if row))
    best_name = f"{BEST_TRAINING_FREE}: {solvers[0]}" if len(solvers) == 1 else BEST_TRAINING_FREE
    decimals = decimals_of(read_score(row, axis) for row in rows.values())
    marks = footnotes(result)

    def cell(name: str, budget: float) -> str:
        row = best[budget] if name == best_name else rows.get((name, budget))
        if row is None:
            return ""
        score = read_score(row, axis)
        if score is None:
            return "reference" if axis.name in row["scores"] else ""
        mark = marks.get(elsewhere(result, row), "")
        solver = f"({row['label']})" if name == BEST_TRAINING_FREE else ""
        return " ".join(filter(None, (score.text(decimals), mark, solver)))

    names = [best_name, *dict.fromkeys(name for name, _ in rows)]
    table = budget_matrix(f"{axis.title}, {axis.direction}", names, budgets, cell)
    notes = [f"{NONE}: not measured."] * any(NONE in line for line in table.rows)
    used = "".join(text for line in table.rows for text in line)
    notes += [f"{mark} on {place}." for place, mark in marks.items() if mark in used]
    return replace(table, strong=morse_names(rows.values()), note=" ".join(notes))


def pictures_section(result: Result) -> Section:
    """Say what the columns of the picture grid are."""
    grid = result.get("grid") or {}
    if not grid.get("rows"):
        return Section("Pictures")
    text = f"Every column starts from the same noise (seeds {_join(grid['seeds'])}); no smoothing."
    return Section("Pictures", (text,), figures=("pictures",))


def _join(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)
