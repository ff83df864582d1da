"""Redo the tables of README and of the figures' page from the committed results.

`python -m eval.readme_table`
"""

import json
from collections.abc import Callable
from itertools import product

from eval.pages import ROOT, marks, replace_between
from morse.evaluation.ablation.report import compact_table
from morse.evaluation.bench.methods import (
    BEST_TRAINING_FREE,
    BEST_WITH_MIXTURE,
    TRAINING_FREE,
    WITH_MIXTURE,
)
from morse.evaluation.report.data import (
    CONTROLS,
    SURE,
    Measured,
    Result,
    elsewhere,
    engaged_rows,
    footnotes,
    read_axes,
    read_result,
    read_score,
    split_budgets,
    unscored_text,
)
from morse.evaluation.report.markdown import pipe_table
from morse.evaluation.stats.curves import STATUS, Place

PAGES = (ROOT / "README.md", ROOT / "eval/results/README.md")
RESULTS = ROOT / "eval/results/fashion_mnist"
ABLATION = ROOT / "eval/results/ablation/ablation.json"
FLOW = ROOT / "eval/results/flow_matching.json"
SHOWN_KINDS = (*TRAINING_FREE, "morse", *CONTROLS)
MAX_BUDGETS = 6
MAX_FACTOR_LSD = 20  # beyond it `lsd=` with leapfrog runs the plan of 20 or the bare solver
PLANNED = "Morse-Leapfrog as planned"
# What `lsd=` runs with DPM-Solver++ 2M, on pixels and on text.
WITH_DPM = ("Morse-DPM++ 2M as planned", "Morse-DPM++ 2M r1.5")
REPORTS = {"pixels": "fashion_mnist/planned", "text": "fashion_mnist_text"}
# Of many rows at each guidance scale: the best without training, Morse, and what Dot is worth.
GUIDED_ROWS = (
    "DPM++ 2M", "UniPC", "Leapfrog", "PFDiff-DDIM", "Morse-DPM++ 2M r1.5", "Morse-UniPC r1.5",
    PLANNED, "Reuse-DPM++ 2M r1.5",
)  # fmt: skip
# Of the searched plans' report: each solver with and without the mixture, and as planned.
PLANNED_ROWS = (
    "DDIM", "DPM++ 2M", "UniPC", "Leapfrog", "Leapfrog, power 1.5", "PFDiff-DDIM",
    "Mixture-DPM++ 2M", "Mixture-UniPC", "Mixture-Leapfrog",
    "Morse-DPM++ 2M r1.75", "Morse-DPM++ 2M as planned", "Morse-UniPC as planned", PLANNED,
)  # fmt: skip


def load_result(folder: str) -> Result:
    """Return a committed benchmark's JSON, by its folder in eval/results."""
    return read_result(ROOT / "eval/results" / folder / "benchmark.json")


def load_reports() -> dict[str, Result]:
    """Return what README's factors are of."""
    return {name: load_result(folder) for name, folder in REPORTS.items()}


def make_table(result: Result, names: tuple[str, ...] | None = None) -> str:
    """Return Fréchet distance and PSNR of training-free solvers, Morse and controls, as Markdown.

    Under guidance a first column says how strong it is.

    Args:
        result: The benchmark's JSON.
        names: Rows to show; None for all of these kinds.
    """
    budgets = shown_budgets(result)
    rows = {
        (row.get("guidance_scale"), row["label"], row["budget"]): row
        for row in engaged_rows(result)
        if row["kind"] in SHOWN_KINDS and (names is None or row["label"] in names)
    }
    morse = {name for (_, name, _), row in rows.items() if row["kind"] == "morse"}
    guided = any(scale is not None for scale, *_ in rows)
    heads = ["guidance"] if guided else []
    heads += ["Fréchet distance, PSNR in dB, at LSD", *map(str, budgets)]
    lines = []
    by_scale = sorted(rows, key=lambda key: key[0] or 0)
    for scale, name in dict.fromkeys((scale, name) for scale, name, _ in by_scale):
        cells = [f"{scale:g}"] if guided else []
        cells.append(f"**{name}**" if name in morse else name)
        cells += [_cell(result, rows.get((scale, name, each))) for each in budgets]
        lines.append(cells)
    notes = [f"\n{mark} measured on {place}" for place, mark in footnotes(result).items()]
    return "\n".join([pipe_table(heads, lines, "|---" * len(heads) + "|"), *notes])


def make_axes_table(result: Result, axes: dict[str, tuple[str, int]]) -> str:
    """Return the scores of every method at every budget, axis by axis, as Markdown.

    Args:
        result: The benchmark's JSON.
        axes: Those to show, by name: what the table calls them, and decimals.
    """
    rows = {(row["label"], row["budget"]): row for row in engaged_rows(result)}
    budgets = sorted({budget for _, budget in rows})
    labels, lines = dict.fromkeys(label for label, _ in rows), []
    known = {axis.name: axis for axis in read_axes(result)}
    for (name, (title, decimals)), label in product(axes.items(), labels):
        scores = [read_score(rows.get((label, budget)), known[name]) for budget in budgets]
        lines.append((title, label, *(each.text(decimals) if each else "" for each in scores)))
    header = ("", "at LSD", *map(str, budgets))
    return pipe_table(header, lines, "|---" * len(header) + "|")


def shown_budgets(result: Result) -> list[float]:
    """Return Morse's budgets, of many only `MAX_BUDGETS` spread over them with both ends."""
    budgets = split_budgets(result)[0]
    count = min(len(budgets), MAX_BUDGETS)
    last = len(budgets) - 1
    return [budgets[round(i * last / max(count - 1, 1))] for i in range(count)]


def _cell(result: Result, row: Measured | None) -> str:
    if row is None:
        return "not measured"
    axes = {axis.name: axis for axis in read_axes(result)}
    frechet, psnr = (read_score(row, axes[name]) for name in ("frechet", "psnr"))
    mark = footnotes(result).get(elsewhere(result, row))
    distance = frechet.text(2) if frechet else unscored_text(row, axes["frechet"])
    fidelity = psnr.text(1) if psnr else unscored_text(row, axes["psnr"])
    return " ".join(filter(None, (f"{distance}, {fidelity}", mark)))


def make_factors(
    results: dict[str, Result],
    baselines: tuple[str, ...],
    methods: tuple[str, ...] = (PLANNED,),
    cost: str = "lsd",
) -> str:
    """Return how many times less Morse costs for the same PSNR, as Markdown.

    Args:
        results: What the rows are about -> a benchmark's JSON.
        baselines: Each has rows: a method's label, or the best training-free solver.
        methods: Labels of what `lsd=` runs, of which each result has one.
        cost: "lsd" or "seconds".
    """
    rows: dict[tuple[str, str], dict[float, str]] = {}
    for baseline, (about, result) in product(baselines, results.items()):
        for entry in result["speedups"]:
            chosen = (entry["baseline"], entry["axis"], entry["cost"])
            planned = entry["method"] in methods and entry["budget"] <= MAX_FACTOR_LSD
            if planned and chosen == (baseline, "psnr", cost):
                scale = entry.get("guidance_scale")
                place = about if scale is None else f"{about}, guidance {scale:g}"
                rows.setdefault((baseline, place), {})[entry["budget"]] = _factor(result, entry)
    budgets = sorted({budget for cells in rows.values() for budget in cells})
    lines = [
        (baseline, place, *(cells.get(budget, "") for budget in budgets))
        for (baseline, place), cells in rows.items()
    ]
    unit = "LSD at" if cost == "lsd" else "seconds at LSD"
    header = ("against", f"times fewer {unit}", *map(str, budgets))
    return pipe_table(header, lines, "|---" * len(header) + "|")


def _factor(result: Result, entry: Measured) -> str:
    if entry["status"] == "measured":
        low, high = entry["interval"] or (None, None)
        interval = "" if low is None else f" ({low:.2f}–{high:.2f})"
        return f"{entry['value']:.2f}{interval}"
    if entry["status"] != "saturated" or entry["note"] == STATUS[Place.FLAT][1]:
        return entry["status"]  # a level stretch bounds nothing
    number = result["settings"]["num_replicates"]
    sure = entry["replicates_outside"] / number if number else 1.0
    told = "" if sure >= SURE else f" ({sure:.0%})"
    return f"over {_largest_cost(result, entry) / entry['spent']:.2f}{told}"


def _largest_cost(result: Result, entry: Measured) -> float:
    """Return the most LSD or seconds at which a speed-up's baseline has a score."""
    baseline = entry["baseline"]
    kinds = WITH_MIXTURE if baseline == BEST_WITH_MIXTURE else TRAINING_FREE
    is_best = baseline in (BEST_TRAINING_FREE, BEST_WITH_MIXTURE)
    (axis,) = (axis for axis in read_axes(result) if axis.name == entry["axis"])
    return max(
        row[entry["cost"]]
        for row in engaged_rows(result)
        if row["kind"] in kinds
        and (is_best or row["label"] == baseline)
        and row.get("guidance_scale") == entry.get("guidance_scale")
        and read_score(row, axis) is not None
    )


def make_speeds(entries: list[dict[str, object]]) -> str:
    """Return N at each batch size, as Markdown, of `morse bench --latency_only --compile`.

    In brackets is N from a quick Dash and a slow Dot to the reverse, by their quartiles.

    Args:
        entries: The JSON's "speed_ratios".
    """
    columns = {
        "N, LoRA merged (default)": (True, "eager"),
        "N, LoRA separate": (False, "eager"),
        "N, Dash and Dot compiled": (True, "compiled"),
    }
    found = {}
    for entry in entries:
        (fast, _, slow), (dot_fast, _, dot_slow) = entry["dash_seconds"], entry["dot_seconds"]
        text = f"{entry['speed_ratio']:.1f} ({fast / dot_slow:.1f}–{slow / dot_fast:.1f})"
        found[entry["batch_size"], entry["merged"], entry["mode"]] = text
    lines = [
        (str(size), *(found[size, *how] for how in columns.values()))
        for size in sorted({size for size, *_ in found})
    ]
    return pipe_table(("batch", *columns), lines, "|--:" * (len(columns) + 1) + "|")


def make_flow_table(result: dict[str, object]) -> str:
    """Return PSNR of each solver and number of evaluations, as Markdown, of `eval.flow_solvers`."""
    cells = {
        (row["solver"], row["steps"]): f"{row['psnr']:.1f} ± {row['error']:.1f}"
        for row in result["rows"]
    }
    counts = sorted({count for _, count in cells})
    lines = [
        (solver, *(cells.get((solver, count), "not measured") for count in counts))
        for solver in dict.fromkeys(solver for solver, _ in cells)
    ]
    header = ("PSNR in dB, at evaluations", *map(str, counts))
    return pipe_table(header, lines, "|---" * len(header) + "|")


# By the names in the pages' marks.
TABLES: dict[str, Callable[[], str]] = {
    "factors": lambda: make_factors(load_reports(), (BEST_TRAINING_FREE, BEST_WITH_MIXTURE)),
    "against_dpm": lambda: make_factors(load_reports(), ("DPM++ 2M",)),
    "seconds": lambda: make_factors(load_reports(), (BEST_TRAINING_FREE,), cost="seconds"),
    "with_dpm": lambda: make_factors(load_reports(), ("DPM++ 2M",), WITH_DPM),
    "dpm_distances": lambda: make_axes_table(
        load_result("fashion_mnist/dpmsolver"),
        {
            "frechet_to_reference": ("Fréchet distance to the images of 100 steps", 3),
            "frechet": ("to real images", 2),
            "psnr": ("PSNR in dB", 1),
        },
    ),
    "table": lambda: make_table(load_result("fashion_mnist")),
    "planned": lambda: make_table(load_result("fashion_mnist/planned"), names=PLANNED_ROWS),
    "speeds": lambda: make_speeds(
        json.loads((RESULTS / "latency.json").read_text("utf-8"))["speed_ratios"]
    ),
    "guided": lambda: make_table(load_result("fashion_mnist_text"), names=GUIDED_ROWS),
    "flow": lambda: make_flow_table(json.loads(FLOW.read_text("utf-8"))),
    "ablation": lambda: compact_table(json.loads(ABLATION.read_text("utf-8"))),
}


def update(text: str) -> str:
    """Return a page's text with its tables redone from the committed JSON."""
    for name, make in TABLES.items():
        begin, end = marks(name, "eval.readme_table")
        if begin in text:
            text = replace_between(text, begin, end, make())
    return text


def main() -> None:
    """Rewrite the pages."""
    for page in PAGES:
        page.write_text(update(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
