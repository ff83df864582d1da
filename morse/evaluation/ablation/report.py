"""The ablation's table: every row against the plain Dot and against its control."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

from morse.evaluation.ablation.rows import PLAIN
from morse.evaluation.ablation.statistics import Difference, paired_difference
from morse.evaluation.report.markdown import pipe_table
from morse.files import write_bytes, write_json

SCHEMA_VERSION = 1
OVERALL = "residual_ratio"
Result = dict[str, object]
RowFacts = dict[str, object]


def write_report(result: Result, folder: Path) -> None:
    """Write ablation.json and ablation.md.

    Raises:
        ValueError: If the result has another schema.
    """
    if result.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version is {result.get('schema_version')!r}, but this version reads "
            f"{SCHEMA_VERSION}: run the ablation again"
        )
    write_json(folder / "ablation.json", result)
    write_bytes(folder / "ablation.md", to_markdown(result).encode())


def compare_rows(row: RowFacts, other: RowFacts) -> Difference | None:
    """Return the difference of two rows in `row`'s figure, over the seeds that both have."""
    first, second = (
        {run["seed"]: run["ratios"][row["figure"]] for run in each["runs"]} for each in (row, other)
    )
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    return paired_difference([first[s] for s in seeds], [second[s] for s in seeds])


def find_winners(result: Result) -> list[RowFacts]:
    """Return the rows that are better than the plain Dot and than each control, best first.

    Rows that are themselves controls cannot win.
    """
    rows = {row["name"]: row for row in result["rows"]}
    controls = {name for row in result["rows"] for name in row["controls"]}
    winners = []
    for row in result["rows"]:
        if row["name"] in {PLAIN, *controls}:
            continue
        found = [compare_rows(row, rows[name]) for name in (PLAIN, *row["controls"])]
        if all(each is not None and each.verdict == "better" for each in found):
            winners.append(row)
    return sorted(winners, key=_mean_ratio)


def compact_table(result: Result) -> str:
    """Return a short table of all rows, and which of them win, as Markdown."""
    rows = {row["name"]: row for row in result["rows"]}
    header = ("Dot", "residual ratio", "against its controls", "time of an evaluation, plain = 1")
    lines = []
    for row in result["rows"]:
        controls = () if row["name"] == PLAIN else row["controls"]
        against = "; ".join(_against(row, rows[name], 3) for name in controls)
        lines.append((row["name"], _ratio(row), against, _to_plain(row)))
    winners = ", ".join(f"{row['name']} ({_ratio(row)})" for row in find_winners(result))
    note = f"Better than the plain Dot and than their controls: {winners or 'none'}."
    return f"{pipe_table(header, lines, '|---|--:|---|--:|')}\n\n{note}"


def to_markdown(result: Result) -> str:
    """Return the report as Markdown."""
    place, settings, seeds = result["environment"], result["settings"], result["seeds"]
    parts = [
        "# Ablation of Dot's toolbox",
        f"`{result['command']}`, {place['device']}, torch {place['torch']}, {place['dtype']}, "
        f"seeds {', '.join(map(str, seeds))}.",
        f"All rows of a seed have the same {settings['max_train_steps']} updates of "
        f"{settings['train_batch_size']} windows, drawn in the same order from the same "
        f"{settings['cache_windows']}; seeds differ in weights, windows and order. The residual "
        "ratio is Dot's squared error as a share of that of reusing Dash's estimate, on fixed "
        f"pairs of {settings['validation_images']} held-out images; 0 is perfect.",
        _main_table(result),
        _judgement_note(result),
        "## Size and speed",
        _cost_table(result),
        _cost_note(result),
        "## Residual ratio by gap",
        "Of t_s - t_i, in timesteps; mean ± standard deviation over seeds.",
        _detail_table(result, "residual_ratio/"),
        "## Sequence ratio",
        "The same share along the steps that follow one Dash evaluation: all, and each.",
        _detail_table(result, "sequence_ratio"),
        "## Rows",
        _row_table(result),
    ]
    if result["failures"]:
        failed = [f"- {name}: `{error}`" for name, error in result["failures"].items()]
        parts += ["## Failed", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _main_table(result: Result) -> str:
    rows = {row["name"]: row for row in result["rows"]}
    header = ("row", "residual ratio", "difference to plain", "", "against its other controls")
    lines = []
    for row in result["rows"]:
        cells = [row["name"], _ratio(row), "", "", ""]
        if row["name"] != PLAIN:
            cells[2:4] = _difference(compare_rows(row, rows[PLAIN]))
            others = [name for name in row["controls"] if name != PLAIN]
            cells[4] = "; ".join(_against(row, rows[name], 4) for name in others)
        lines.append(cells)
    return pipe_table(header, lines, "|---|--:|--:|---|---|")


def _judgement_note(result: Result) -> str:
    comparisons = sum(
        len({PLAIN, *row["controls"]}) for row in result["rows"] if row["name"] != PLAIN
    )
    winners = ", ".join(row["name"] for row in find_winners(result)) or "none"
    return (
        "Mean ± standard deviation over seeds. Differences are of runs of the same seed, with "
        "Student's 95 % interval; better or worse where that leaves zero out, which chance alone "
        f"does once in 20 of the {comparisons} comparisons. "
        f"Better than plain and than their controls: {winners}."
    )


def _cost_table(result: Result) -> str:
    header = ("row", "parameters", "not zero", "file, kB", "Dot, ms", "time, plain = 1", "N")
    lines = []
    for row in result["rows"]:
        latency = row["latency"]
        low, middle, high = (1e3 * s for s in latency["dot_seconds"]) if latency else (0, 0, 0)
        cells = [
            row["name"],
            *(_count(row, key) for key in ("parameters", "nonzero")),
            _mean_of(row, lambda run: run["bytes"] / 1e3, "{:,.0f}"),
            f"{middle:.1f} ({low:.1f}–{high:.1f})" if latency else "",
            _to_plain(row),
            f"{latency['speed_ratio']:.2f}" if latency else "",
            _mean_of(row, lambda run: run["cpu_seconds"], "{:.0f}"),
        ]
        lines.append(cells)
    return pipe_table((*header, "training, s"), lines, "|---|" + "--:|" * 7)


def _cost_note(result: Result) -> str:
    settings = result["settings"]
    return (
        "Parameters are Dot's own, and like the file means over seeds. Times are medians and "
        f"quartiles of {settings['latency_rounds']} evaluations at batch "
        f"{settings['latency_batch_size']}, LoRA merged, warm, of the first seed's Dot, a plain "
        "one and Dash in turn in one process; the first row times two plain Dots. N is how many "
        "times faster Dot is than Dash. Training is CPU seconds of the whole run, with loading and "
        "its own validation."
    )


def _detail_table(result: Result, prefix: str) -> str:
    names = [name for row in result["rows"] for run in row["runs"] for name in run["ratios"]]
    shown = [name for name in dict.fromkeys(names) if name.startswith(prefix)]
    heads = [name.partition("/")[2] or "all" for name in shown]
    lines = [(row["name"], *(_ratio(row, name) for name in shown)) for row in result["rows"]]
    return pipe_table(("row", *heads), lines, "|---|" + "--:|" * len(shown))


def _row_table(result: Result) -> str:
    rows = {row["name"]: row for row in result["rows"]}
    lines = []
    for row in result["rows"]:
        settings = ", ".join(f"`{key}={value}`" for key, value in row["overrides"].items())
        text = row["description"]
        if row["same_size_as"]:
            sizes = (_count(each, "nonzero") for each in (row, rows[row["same_size_as"]]))
            text += " ({} parameters, for {})".format(*sizes)
        lines.append((row["name"], text, settings))
    return pipe_table(("row", "what it is", "settings"), lines, "|---|---|---|")


def _difference(found: Difference | None, digits: int = 4) -> tuple[str, str]:
    """Return the figures of a difference, and what they say."""
    if found is None:
        return "", "not measured"
    if math.isnan(found.mean):
        return "", found.verdict
    mean, *ends = (
        "" if value is None else f"{value:+.{digits}f}"
        for value in (found.mean, found.low, found.high)
    )
    return (f"{mean} [{', '.join(ends)}]" if all(ends) else mean), found.verdict


def _against(row: RowFacts, control: RowFacts, digits: int) -> str:
    figures, verdict = _difference(compare_rows(row, control), digits)
    of = "" if row["figure"] == OVERALL else f"({row['figure'].replace('_', ' ')})"
    return " ".join(filter(None, (control["name"], of, figures, verdict)))


def _to_plain(row: RowFacts) -> str:
    if not row["latency"]:
        return ""
    low, middle, high = row["latency"]["to_plain"]
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _mean_ratio(row: RowFacts) -> float:
    return fmean(run["ratios"][OVERALL] for run in row["runs"])


def _ratio(row: RowFacts, name: str = OVERALL) -> str:
    values = [run["ratios"][name] for run in row["runs"] if name in run["ratios"]]
    if not values:
        return "not measured"
    if not all(map(math.isfinite, values)):
        return "not finite"
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{fmean(values):.4f}{spread}"


def _count(row: RowFacts, key: str) -> str:
    return _mean_of(row, lambda run: run[key], "{:,.0f}")


def _mean_of(row: RowFacts, value: Callable[[dict], float], form: str) -> str:
    return form.format(fmean(map(value, row["runs"]))) if row["runs"] else ""
