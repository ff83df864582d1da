"""What Morse gains, and where it does not: the report's first and most important lines."""

from collections import Counter
from collections.abc import Iterator

from morse.evaluation.bench.methods import BEST_TRAINING_FREE, TRAINING_FREE
from morse.evaluation.report.blocks import Section, Table
from morse.evaluation.report.data import (
    NONE,
    Measured,
    Result,
    against_best,
    best_row,
    budget_list,
    engaged_rows,
    headline_axes,
    is_paired,
    is_surely_cheaper,
    read_axes,
    read_score,
    split_budgets,
)
from morse.evaluation.report.scores import Axis, Verdict, compare

MAX_CLAIMED = 3  # Morse methods in the first table
LIMITS_TITLE = "Where Morse does not win"


def claim_section(result: Result) -> Section:
    """Matched-quality speed-ups of the leading Morse methods, and how often Morse is ahead."""
    wins = Counter({row["label"]: 0 for row in _morse_rows(result)})
    wins.update(name for name, *_, verdict in _verdicts(result) if verdict == "better")
    lines, methods = [], [method for method, _ in wins.most_common(MAX_CLAIMED)]
    for method in methods:
        for axis in headline_axes(result):
            cells = [_range(result, method, axis, cost) for cost in ("lsd", "seconds")]
            if set(cells) != {NONE}:
                lines.append((method, axis.name_alone, *cells))
    header = ("method", "equal quality in", "in LSD", "in wall time")
    title = f"How many times less Morse costs than the {BEST_TRAINING_FREE} at equal quality"
    note = (
        "From the worst to the best budget that has a factor, how many have one, and at how many "
        "Morse is surely cheaper (in at least 97.5 % of the bootstrap's replicates); below, every "
        "budget, and why some have no factor."
    )
    if len(methods) < len(wins):
        note += f" These {len(methods)} of {len(wins)} Morse methods win most comparisons."
    if not all(row["num_dot"] for row in _morse_rows(result)):
        note += f" {_without_dot(result)}"
    table = Table(title, header, tuple(lines), num_text=len(header), note=note)
    text = limits_sentence(result)
    if any(_verdicts(result)):
        text += f" “{LIMITS_TITLE}” lists them."
    return Section("In short", (text,), (table,) if lines else ())


def limits_sentence(result: Result) -> str:
    """Count Morse's comparisons with the best training-free solver at its budget, on every axis."""
    counts = Counter(verdict for *_, verdict in _verdicts(result))
    total = sum(counts.values())
    if not total:
        return "Morse was not compared with a training-free solver."
    where = "At equal LSD" if is_paired(result) else "At the same budget"
    return (
        f"{where}, of {total} comparisons with the {BEST_TRAINING_FREE} (every Morse "
        f"method, axis and budget) Morse is better in {counts['better']}, within noise in "
        f"{counts['within noise']} and worse in {counts['worse']}."
    )


def limits_section(result: Result) -> Section:
    """Where the best training-free solver, or another method, is as good as Morse or better."""
    found: dict[tuple[str, str], dict[Verdict, list[float]]] = {}
    for name, axis, budget, verdict in _verdicts(result):
        found.setdefault((name, axis.name), {}).setdefault(verdict, []).append(budget)
    order = [row["label"] for row in _morse_rows(result)]
    axes = {axis.name: axis for axis in read_axes(result)}
    lines = tuple(
        (
            name,
            axes[axis].short_title,
            budget_list(verdicts.get("worse", ())),
            budget_list(verdicts.get("within noise", ())),
            budget_list(verdicts.get("better", ())),
            _not_faster(result, name, axis),
        )
        for (name, axis), verdicts in sorted(
            found.items(), key=lambda pair: order.index(pair[0][0])
        )
        if set(verdicts) != {"better"} or _not_faster(result, name, axis) != NONE
    )
    text = [] if lines else [limits_sentence(result)]
    text.extend(_others_ahead(result))
    header = ("method", "axis", "worse", "within noise", "better", "no gain in seconds")
    noise = "closer than 1.96 standard errors of the difference"
    if is_paired(result):
        noise = "the 95 % interval of the difference, of pairs from the same noise, includes 0"
    note = (
        f"Budgets in LSD. Within noise: {noise}. No gain in seconds: not surely less wall time "
        f"than the {BEST_TRAINING_FREE} for equal quality (timing's own noise left out)."
    )
    title = f"Morse against the {BEST_TRAINING_FREE}, where it is not ahead everywhere"
    table = Table(title, header, lines, num_text=2, note=note)
    return Section(LIMITS_TITLE, tuple(text), (table,) if lines else ())


def _without_dot(result: Result) -> str:
    """Say which budgets' figures are of plans without Dot."""
    budgets: dict[str, list[float]] = {}
    for row in _morse_rows(result):
        if not row["num_dot"]:
            budgets.setdefault(row["label"], []).append(row["budget"])
    told = "; ".join(f"{name} at {budget_list(found)} LSD" for name, found in budgets.items())
    return f"Without Dot, so that what is gained there is the steps' or the mixture's: {told}."


def _morse_rows(result: Result) -> list[Measured]:
    return [row for row in engaged_rows(result) if row["kind"] == "morse"]


def _verdicts(result: Result) -> Iterator[tuple[str, Axis, float, Verdict]]:
    """Yield (method, axis, budget, verdict against the best training-free solver there)."""
    for axis in read_axes(result):
        for row in _morse_rows(result):
            verdict = against_best(result, row, axis)
            if verdict is not None:
                yield row["label"], axis, row["budget"], verdict


def _range(result: Result, method: str, axis: Axis, cost: str) -> str:
    """Return such as "1.19–2.10× (4 of 5, surely 3)": the spread, and how many there are."""
    entries = _against_best(result, method, axis.name, cost)
    values = [entry["value"] for entry in entries if entry["status"] == "measured"]
    if not entries:
        return NONE
    ends = (min(values), max(values)) if values else ()
    spread = "–".join(dict.fromkeys(f"{value:.2f}" for value in ends))
    sure = sum(is_surely_cheaper(result, entry) for entry in entries)
    return f"{spread + '×' if spread else 'none'} ({len(values)} of {len(entries)}, surely {sure})"


def _not_faster(result: Result, method: str, axis: str) -> str:
    """Return the budgets at which a method saves no wall time, or not surely."""
    entries = _against_best(result, method, axis, "seconds")
    slow = [entry["budget"] for entry in entries if not is_surely_cheaper(result, entry)]
    return budget_list(sorted(slow)) if entries else "not measured"


def _against_best(result: Result, method: str, axis: str, cost: str) -> list[Measured]:
    wanted = {"method": method, "baseline": BEST_TRAINING_FREE, "axis": axis, "cost": cost}
    return [
        entry
        for entry in result.get("speedups", ())
        if all(entry[key] == value for key, value in wanted.items())
    ]


def _others_ahead(result: Result) -> list[str]:
    """Name the controls and peers that beat every Morse method at a budget.

    Morse's losses to training-free solvers are in the table of its comparisons with the best.
    """
    ahead: dict[tuple[str, str], list[float]] = {}
    for axis in read_axes(result):
        for budget in split_budgets(result)[0]:
            rows = [row for row in engaged_rows(result) if row["budget"] == budget]
            morse = read_score(best_row((r for r in rows if r["kind"] == "morse"), axis), axis)
            for row in rows:
                score = read_score(row, axis)
                if row["kind"] in ("morse", *TRAINING_FREE) or not (score and morse):
                    continue
                if compare(score, morse, axis) == "better":
                    ahead.setdefault((row["label"], axis.short_title), []).append(budget)
    return [
        f"{name} is better than every Morse method at {budget_list(budgets)} LSD ({title})."
        for (name, title), budgets in ahead.items()
    ]
