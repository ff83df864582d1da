"""Matched-quality speed-ups and lossless factors, as the benchmark's JSON has them."""

from dataclasses import replace
from itertools import takewhile

from morse.evaluation.bench.methods import BEST_TRAINING_FREE, BEST_WITH_MIXTURE
from morse.evaluation.report.blocks import Section, Table, budget_matrix
from morse.evaluation.report.data import (
    Measured,
    Result,
    headline_axes,
    morse_names,
    read_axes,
    used_seeds,
)
from morse.evaluation.report.scores import Axis
from morse.evaluation.stats.lossless import margins_left_over

BESTS = (BEST_TRAINING_FREE, BEST_WITH_MIXTURE)
NOT_FIXED = "it comes from the run itself and was not fixed beforehand; with few images it is wide."
# What δ is, by an entry's "delta_from".
ORIGINS = {
    "given": "was fixed before anything was measured, by --lossless_delta.",
    "seeds": "is what that solver's own figure deviates by between this run's own {} seeds: "
    f"{NOT_FIXED}",
    "bootstrap": "is the bootstrap's standard error of that solver's own figure, for this run has "
    f"one seed: {NOT_FIXED}",
}
COSTS = {"lsd": "cost in LSD", "seconds": "cost in wall seconds"}


def speedups_section(result: Result) -> Section:
    """Matched-quality speed-ups at each budget; what could not be measured is written out.

    The headline axes are shown for every method over the best training-free solver, and for Morse
    over the best of those and of what a mixture begins; Morse over each single solver, and the
    other axes, are folded away.
    """
    entries = result.get("speedups", ())
    if not entries:
        return Section("Matched-quality speed-ups")
    headline, morse = headline_axes(result), morse_names(result["rows"])
    tables, folded = [], []
    for cost in COSTS:
        for axis in read_axes(result):
            own = [e for e in entries if (e["axis"], e["cost"]) == (axis.name, cost)]
            title = f"{axis.short_title}, {COSTS[cost]}, over "
            for name in BESTS:
                best = [entry for entry in own if entry["baseline"] == name]
                if best:
                    table = _speedup_table(f"{title}the {name}", best, morse)
                    (tables if axis in headline else folded).append(table)
            single = [e for e in own if e["baseline"] not in BESTS and e["method"] in morse]
            if single:
                folded.append(
                    _speedup_table(title + "each training-free solver", single, frozenset())
                )
    text = (
        "What a solver pays for the quality that a method has at a budget, divided by what the "
        "method pays: above 1, the method is cheaper. A solver's curve leaves out what is no "
        "better than something cheaper. Brackets hold the 95 % interval over images; how times "
        "vary is not in it. Where there is no factor, the line below the table says why. No "
        "interval: too many of the bootstrap's replicates have no factor."
    )
    return Section("Matched-quality speed-ups", (text,), tuple(tables), tuple(folded))


def _speedup_table(title: str, entries: list[Measured], strong: frozenset[str]) -> Table:
    """Return a line for each method, or method and solver, of `entries`; `strong` ones first."""
    several = len({entry["baseline"] for entry in entries}) > 1
    cells, notes = {}, {}
    for entry in sorted(entries, key=lambda entry: entry["method"] not in strong):
        name = f"{entry['method']} over {entry['baseline']}" if several else entry["method"]
        cells[name, entry["budget"]] = _speedup_text(entry)
        if entry["status"] != "measured" and entry.get("note"):
            notes.setdefault(entry["status"], {})[entry["note"]] = None
    names = dict.fromkeys(name for name, _ in cells)
    budgets = sorted({budget for _, budget in cells})
    table = budget_matrix(title, names, budgets, lambda *place: cells.get(place, ""))
    said = "; ".join(f"{status}: {', or '.join(found)}" for status, found in notes.items())
    return replace(table, strong=strong, note=said)


def _speedup_text(entry: Measured) -> str:
    """Return such as "1.34× [1.31, 1.37]", or a status."""
    parts = [] if entry["status"] == "measured" else [entry["status"]]
    if entry["value"] is not None:
        parts.append(f"{entry['value']:.2f}×")
    if entry.get("interval"):
        parts[-1] += " [{:.2f}, {:.2f}]".format(*entry["interval"])
    elif entry["status"] == "measured" and entry.get("note"):
        parts[-1] += " (no interval)"
    return ", ".join(parts)


def lossless_section(result: Result) -> Section:
    """The largest factor that passed the non-inferiority test, per method, axis and budget."""
    tables = []
    for axis in read_axes(result):
        entries = _tested(result, axis)
        if not entries:
            continue
        found: dict[tuple[str, float], list[Measured]] = {}
        for entry in entries:
            found.setdefault((entry["method"], entry["budget"]), []).append(entry)

        def cell(name: str, budget: float, found: dict = found) -> str:
            return _lossless_text(found.get((name, budget), []))

        budgets = sorted({entry["budget"] for entry in entries})
        names = dict.fromkeys(entry["method"] for entry in entries)
        table = budget_matrix(f"{axis.short_title}, {axis.direction}", names, budgets, cell)
        tables.append(replace(table, strong=morse_names(result["rows"])))
    text = (
        f"The largest factor f such that at it and at every smaller one tried a method is no worse "
        f"than the {BEST_TRAINING_FREE} at f times its cost: the one-sided 95 % upper bound of how "
        "much worse it is stays below the margin δ. None: no factor passed. Only factors within "
        "the training-free solvers' measured costs are tried."
    )
    texts = (text, *_margin_words(result)) if tables else ()
    return Section("Lossless factors", texts, tuple(tables))


def _tested(result: Result, axis: Axis) -> list[Measured]:
    """List an axis' tests, without those whose margin would be a distance's bootstrap error."""
    entries = [entry for entry in result.get("lossless", ()) if entry["axis"] == axis.name]
    if axis.side == "fidelity" or len(used_seeds(result)) > 1:
        return entries
    return [entry for entry in entries if entry.get("delta_from") == "given"]


def _margin_words(result: Result) -> list[str]:
    """Say where margins come from, and that those which were not given come from the run itself."""
    num_seeds, found, untested = len(used_seeds(result)), {}, []
    for axis in read_axes(result):
        entries = _tested(result, axis)
        entry = next((e for e in entries if e["delta"] is not None), None)
        if not entries and axis.side == "distribution":
            untested.append(axis.short_title)
        if entry is not None:
            source = entry.get("delta_from") or ("seeds" if num_seeds > 1 else "bootstrap")
            given = f": {entry['delta']:g} {axis.unit}".rstrip() if source == "given" else ""
            found.setdefault(source, []).append(f"{axis.short_title}{given}")
    words = []
    for source, axes in found.items():
        of = f" ({'; '.join(axes)})" if len(found) > 1 or source == "given" else ""
        words.append(f"δ{of} {ORIGINS[source].format(num_seeds)}")
    if untested and num_seeds == 1:
        words.append(
            f"Not tested: {'; '.join(untested)}. With one seed nothing tells how much a distance "
            "deviates between seeds; give several --seeds, or --lossless_delta."
        )
    measured = [axis.name for axis in read_axes(result)]
    left_over = margins_left_over(result["settings"].get("lossless_delta") or (), measured)
    return [*words, left_over] if left_over else words


def _lossless_text(entries: list[Measured]) -> str:
    """Return such as "1.5× (δ 0.05)", or "none (δ 0.05)"."""
    if not entries:
        return ""
    entries = sorted(entries, key=lambda entry: entry["factor"])
    passed = list(takewhile(lambda entry: entry["lossless"], entries))
    if passed:
        best = passed[-1]
        return f"{best['factor']:g}× (δ {best['delta']:.2g})"
    if all(entry["lossless"] is None for entry in entries):
        return "not tested"
    return f"none (δ {entries[0]['delta']:.2g})"
