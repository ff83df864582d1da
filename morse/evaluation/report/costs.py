"""What each method costs, N, and what is missing from the report."""

from dataclasses import replace

from morse.evaluation.report.blocks import Section, Table, budget_matrix
from morse.evaluation.report.data import (
    NONE,
    Measured,
    Result,
    batch_milliseconds,
    budget_list,
    elsewhere,
    engaged_rows,
    milliseconds_an_image,
    morse_names,
    split_budgets,
    used_seeds,
)


def costs_section(result: Result) -> Section:
    """LSD, evaluations, seconds, images a second and memory of every method and budget."""
    main, others = split_budgets(result)
    rows = {(row["label"], row["budget"]): row for row in engaged_rows(result)}

    def cell(name: str, budget: float) -> str:
        found = (name, budget) in rows
        return _milliseconds(result, rows[name, budget]) if found else ""

    names = dict.fromkeys(name for name, _ in rows)
    times = budget_matrix("Wall time, ms an image", names, main, cell)
    spread = any(batch_milliseconds(result, row) for row in rows.values())
    note = _batches_words(result) if spread else ""
    times = replace(times, strong=morse_names(rows.values()), note=note)
    folded = [_costs_table(result, budgets) for budgets in (main, others) if budgets]
    return Section("What it costs", tables=(times,), folded=tuple(folded))


def _costs_table(result: Result, budgets: list[float]) -> Table:
    """One line a method and budget; columns that nobody filled are left out."""
    rows = [row for row in engaged_rows(result) if row["budget"] in budgets]
    spread = any(batch_milliseconds(result, row) for row in rows)
    milliseconds = "ms an image" + " (batches' median [quartiles])" * spread
    columns = {
        "method": lambda row: row["label"],
        "budget": lambda row: f"{row['budget']:g}",
        "LSD": lambda row: f"{row['lsd']:.2f}".removesuffix(".00"),
        "Dash + Dot": lambda row: f"{row['num_dash']:.4g} + {row['num_dot']:.4g}",
        "seconds": lambda row: _number(row.get("seconds")),
        milliseconds: lambda row: _milliseconds(result, row),
        "images/s": lambda row: _images_a_second(result, row),
        "peak memory, MiB": lambda row: _number(row.get("peak_memory_mib"), "{:.0f}"),
        "measured on": lambda row: elsewhere(result, row),
    }
    filled = {
        name: cells
        for name, show in columns.items()
        if set(cells := tuple(show(row) for row in rows)) - {"", NONE}
    }
    cells = zip(*filled.values(), strict=True)
    lines = tuple(tuple(text or NONE for text in line) for line in cells)
    title = f"LSD, evaluations, time and memory at {budget_list(budgets)} LSD"
    return Table(title, tuple(filled), lines, morse_names(rows))


def _milliseconds(result: Result, row: Measured) -> str:
    """Return such as "40.4 [37.1, 44.2]": batches' median and quartiles, else the mean of all."""
    quartiles = batch_milliseconds(result, row)
    if quartiles is None:
        return _number(milliseconds_an_image(result, row))
    low, middle, high = map(_number, quartiles)
    return f"{middle} [{low}, {high}]"


def _images_a_second(result: Result, row: Measured) -> str:
    milliseconds = milliseconds_an_image(result, row)
    return _number(milliseconds and 1e3 / milliseconds)


def _batches_words(result: Result) -> str:
    """Explain the brackets of `_milliseconds`."""
    first = "the first seed's " if len(used_seeds(result)) > 1 else ""
    return (
        f"The median of {first}full batches of {result['settings']['batch_size']} images, with "
        "their quartiles in brackets; without brackets, the mean of all images. Plots and "
        "speed-ups are of that mean everywhere."
    )


def _number(value: float | None, form: str = "{:.3g}") -> str:
    """Return a figure without an exponent, which "{:.3g}" has from 999.5 on."""
    if value is None:
        return NONE
    return form.format(value) if value < 999.5 else f"{value:,.0f}"


def speed_ratios_section(result: Result) -> Section:
    """N at each batch size and mode."""

    def quartiles(seconds: list[float] | None) -> str:
        return " / ".join(_number(1e3 * value) for value in seconds) if seconds else NONE

    lines = tuple(
        (
            str(entry["batch_size"]),
            {True: "merged", False: "separate"}.get(entry.get("merged"), NONE),
            entry.get("mode") or "eager",
            f"{entry['speed_ratio']:.2f}",
            quartiles(entry.get("dash_seconds")),
            quartiles(entry.get("dot_seconds")),
        )
        for entry in result.get("speed_ratios", ())
    )
    header = ("batch", "LoRA", "mode", "N", "Dash, ms (quartiles)", "Dot, ms (quartiles)")
    places = {entry["device"] for entry in result.get("speed_ratios", ()) if "device" in entry}
    note = f"Measured on {', '.join(sorted(places))}." if places else ""
    table = Table("N at each batch size", header, lines, note=note)
    title = "N, how many times faster Dot is than Dash"
    return Section(title, tables=(table,) if lines else ())


def remarks_section(result: Result) -> Section:
    """What a reader should know of single figures; methods with the same remark together."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in engaged_rows(result):
        remarks = [row.get("note") or ""]
        remarks += [
            f"Dash ran in Dot's place ({why}: {count})"
            for why, count in (row.get("fallbacks") or {}).items()
        ]
        for remark in filter(None, remarks):
            found.setdefault(remark, {}).setdefault(row["label"], []).append(row["budget"])
    lines = []
    for remark, methods in found.items():
        places = [f"{name} at {budget_list(sorted(at))} LSD" for name, at in methods.items()]
        lines.append(f"{remark}: {'; '.join(places)}.")
    return Section("Remarks on single figures", tuple(lines))


def missing_section(result: Result) -> Section:
    """What was asked for and not measured; the budgets of one method together."""
    budgets: dict[str, list[str]] = {}
    for entry in result.get("not_measured", ()):
        what, _, reason = str(entry).partition(": ")
        label, _, budget = what.rpartition(", ")
        fits = bool(label) and budget.endswith(" LSD")
        key = label + (f" ({reason})" if reason else "") if fits else str(entry)
        budgets.setdefault(key, []).extend([budget.removesuffix(" LSD")] * fits)
    lines = [f"{key} at {', '.join(found)} LSD" if found else key for key, found in budgets.items()]
    text = ("; ".join(lines) + ".",) if lines else ()
    return Section("Asked for and not measured", text)


def not_engaged_section(result: Result) -> Section:
    """Methods that ran without doing what their name says, so that they are in no table."""
    rows = [row for row in result["rows"] if not row.get("engaged", True)]
    lines = tuple(
        (row["label"], f"{row['budget']:g}", row.get("note") or "no reason given") for row in rows
    )
    text = (
        "They ran, but changed no picture, or changed pictures and saved no time, as the last "
        "column says; so they appear in no other table or plot."
    )
    table = Table("Did not engage", ("method", "budget, LSD", "why"), lines, num_text=3)
    title = "Methods that did not engage"
    return Section(title, (text,), (table,)) if rows else Section(title)
