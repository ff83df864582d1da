"""The benchmark's report in blocks, drawn from its JSON alone."""

from dataclasses import replace

from morse.evaluation.bench.methods import BEST_TRAINING_FREE
from morse.evaluation.report.blocks import Section, Table, budget_matrix
from morse.evaluation.report.conditions import conditions_section, join
from morse.evaluation.report.costs import (
    costs_section,
    missing_section,
    not_engaged_section,
    remarks_section,
    speed_ratios_section,
)
from morse.evaluation.report.data import (
    NONE,
    Result,
    best_training_free_row,
    elsewhere,
    engaged_rows,
    footnotes,
    guidance_parts,
    headline_axes,
    morse_names,
    read_axes,
    read_score,
    split_budgets,
    unscored_text,
)
from morse.evaluation.report.limits import claim_section, limits_section
from morse.evaluation.report.scores import Axis, decimals_of
from morse.evaluation.report.speedups import lossless_section, speedups_section


def report_sections(result: Result) -> list[Section]:
    """Return the whole report, what a reader wants first; sections without content are left out."""
    parts = guidance_parts(result)
    if not result["rows"]:
        sections = [conditions_section(result)]
        sections += [at_guidance(speed_ratios_section(part), part) for part in parts]
    else:
        sections = [at_guidance(claim_section(part), part) for part in parts]
        sections.append(conditions_section(result))
        for part in parts:
            sections += [at_guidance(section, part) for section in _measured_sections(part)]
    return [part for part in sections if part.text or part.tables or part.folded]


def _measured_sections(part: Result) -> list[Section]:
    return [
        quality_section(part),
        limits_section(part),
        pictures_section(part),
        speedups_section(part),
        lossless_section(part),
        costs_section(part),
        speed_ratios_section(part),
        remarks_section(part),
        missing_section(part),
        not_engaged_section(part),
    ]


def at_guidance(section: Section, part: Result) -> Section:
    """Name a section, and its figures, after the guidance scale of its part, if it has one."""
    if part["guidance_scale"] is None:
        return section
    figures = tuple(figure_name(name, part) for name in section.figures)
    title = f"{section.title} at guidance {part['guidance_scale']:g}"
    return replace(section, title=title, figures=figures)


def figure_name(name: str, part: Result) -> str:
    """Return what `Section.figures` calls a part's figure; as words, each a class of the page."""
    scale = part["guidance_scale"]
    return name if scale is None else f"{name} guidance-{scale:g}"


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
        (row["label"], row["budget"]): row
        for row in engaged_rows(result)
        if row["budget"] in budgets
    }
    best = {budget: best_training_free_row(result, axis, budget) for budget in budgets}
    solvers = list(dict.fromkeys(row["label"] for row in best.values() if row))
    best_name = f"{BEST_TRAINING_FREE}: {solvers[0]}" if len(solvers) == 1 else BEST_TRAINING_FREE
    most = 6 if axis.is_distance("kernel") else 4  # KID's values are thousandths
    decimals = decimals_of((read_score(row, axis) for row in rows.values()), most)
    marks = footnotes(result)

    def cell(name: str, budget: float) -> str:
        row = best[budget] if name == best_name else rows.get((name, budget))
        if row is None:
            return ""
        score = read_score(row, axis)
        if score is None:
            return unscored_text(row, axis)
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
    text = f"Every column starts from the same noise (seeds {join(grid['seeds'])}); no smoothing."
    return Section("Pictures", (text,), figures=("pictures",))
