"""The benchmark's report in blocks, drawn from its JSON alone."""

from collections.abc import Iterable
from dataclasses import replace

from morse.evaluation.bench.methods import BEST_TRAINING_FREE
from morse.evaluation.report.blocks import Section, Table, budget_matrix
from morse.evaluation.report.costs import (
    costs_section,
    missing_section,
    not_engaged_section,
    remarks_section,
    speed_ratios_section,
)
from morse.evaluation.report.data import (
    NONE,
    Measured,
    Result,
    best_training_free_row,
    elsewhere,
    engaged_rows,
    footnotes,
    guidance_parts,
    headline_axes,
    is_paired,
    morse_names,
    read_axes,
    read_score,
    row_name,
    split_budgets,
    unscored_text,
    used_seeds,
)
from morse.evaluation.report.limits import claim_section, limits_section
from morse.evaluation.report.scores import Axis, decimals_of
from morse.evaluation.report.speedups import lossless_section, speedups_section

MAX_PROMPTS = 12  # that the report writes out
FEW_IMAGES = 1000  # below, the report says that Fréchet distances are biased


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


def conditions_section(result: Result) -> Section:
    """What everything was measured with, in a paragraph."""
    settings = result["settings"]
    parts = [f"{result['device']}, {result['dtype']}."]
    if result["rows"]:
        seeds, batch = used_seeds(result), settings.get("batch_size")
        each = f" from each of {len(seeds)} seeds ({_join(seeds)})" if len(seeds) > 1 else ""
        number = settings["num_images"]
        size = f", batch {min(batch, number)}" if batch else ""
        parts.append(f"{number:,} images of each method and budget{each}{size}.")
        if number < FEW_IMAGES and any(_is(axis, "frechet") for axis in read_axes(result)):
            parts.append("Fréchet distances of so few are biased upwards, those of all alike.")
    parts += _seeds_words(result)
    parts.append(_speed_words(result))
    for title, key in (("Reference", "reference"), ("Real images", "real_images")):
        if result["rows"] and result.get(key):
            parts.append(f"{title}: {result[key]}.")
    parts.append(_features_words(result) if result["rows"] else "")
    versions = ("torch", "diffusers", "morse-diffusion", "python")
    parts.append(", ".join(f"{name} {result[name]}" for name in versions if name in result) + ".")
    words = "1 LSD is the time of one evaluation of Dash; one of Dot costs 1/N."
    if result["rows"]:
        words += " r is a plan's ratio, evaluations per LSD."
    if any(_has_error(row, axis) for row in result["rows"] for axis in read_axes(result)):
        words += " ± is the bootstrap's standard error over images."
    if result["rows"] and not is_paired(result):
        words += (
            " Measured by an earlier version: whether a difference is noise is told from both "
            "errors alone, at equal budgets, and a solver's curve has a mean where it got worse."
        )
    texts = (" ".join(filter(None, parts)), words, *_guidance_words(result))
    return Section("Conditions", texts, code=result["command"])


def _is(axis: Axis, distance: str) -> bool:
    return axis.name in (distance, f"{distance}_to_reference")


def _features_words(result: Result) -> str:
    """Say what gives the features that sets of images are compared in; "" where nothing does."""
    digest = str(result.get("features_sha256", ""))[:12]
    if result.get("features_test_accuracy"):
        return (
            f"The features' classifier is right on {100 * result['features_test_accuracy']:.1f} % "
            f"of the test images (sha256 {digest})."
        )
    about = result.get("extractor")
    if not about:
        return ""
    return (
        f"Sets of images are compared in {about['words']}, {about['feature_dim']:,} numbers an "
        f"image (sha256 {digest}; resize: {about['resize']})."
    )


def _seeds_words(result: Result) -> list[str]:
    """Name the seeds that are in no figure, as not all that was asked for was measured from them.

    The JSON has them for the whole result, or for each guidance scale.
    """
    words = {}
    for part in (result, *result.get("guidance", ())):
        scale = part.get("guidance_scale")
        at = "" if scale is None else f" at guidance {scale:g}"
        for entry in part.get("seeds_left_out", ()):
            count = entry["missing"]
            are = "are" if count > 1 else "is"
            said = f"Seed {entry['seed']} is left out{at}: {count} of its cells {are} missing."
            words[said] = None
    return list(words)


def _speed_words(result: Result) -> str:
    found = []
    for part in guidance_parts(result):
        scale, speed = part["guidance_scale"], part["speed_ratio"]
        at = "" if scale is None else f" at guidance {scale:g}"
        found += [f"N = {speed['speed_ratio']:.2f}{at} ({speed['how']})."] * bool(speed)
    return " ".join(found)


def _guidance_words(result: Result) -> list[str]:
    """Say what images were asked for and what an LSD is with guidance; [] without it."""
    if not result.get("guidance"):
        return []
    settings = result["settings"]
    asked = [str(text) for text in settings.get("prompts") or settings.get("class_names") or ()]
    scales = _join(f"{entry['guidance_scale']:g}" for entry in result["guidance"])
    first = f"{result.get('pipeline_class', 'A guided pipeline')} at guidance {scales}."
    if asked:
        some = "; ".join(asked[:MAX_PROMPTS]) + "; ..." * (len(asked) > MAX_PROMPTS)
        first += f" Image i is of prompt or class i modulo {len(asked)}: {some}."
    return [
        f"{first} The reference has the same guidance.",
        "An LSD is one evaluation step of Dash at the guidance of its section. Where guidance is "
        "above 1, a step evaluates the branches with and without the prompt in one batch, and both "
        "together are 1 LSD. Wall times are end to end: text encoder, denoiser, decoder.",
    ]


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
    most = 6 if _is(axis, "kernel") else 4  # KID's values are thousandths
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
    text = f"Every column starts from the same noise (seeds {_join(grid['seeds'])}); no smoothing."
    return Section("Pictures", (text,), figures=("pictures",))


def _join(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)
