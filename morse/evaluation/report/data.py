"""What the benchmark's JSON (schema 4, 3 or 2) holds, read once for all its reports.

Schema 4 adds "against_best" to each row and "cheaper" to each speed-up. Schema 3 added a
`guidance_scale` to each row, speed-up and test, and "guidance": what belongs to one guidance scale
as a whole. Schema 2 knew no guidance, and reads as one part of it.
"models", "packages" and a row's "scheduler_options" say what a result is repeated with; they and a
test's "delta_from" are left out of older ones.
Seeds from which not all was measured are in "seeds_left_out", of the whole or of a guidance scale.
"""

import gzip
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from morse.evaluation.bench.methods import TRAINING_FREE
from morse.evaluation.bench.tasks import PEER_SETTINGS
from morse.evaluation.report.scores import Axis, Score, Verdict, compare

Result = Mapping[str, Any]  # the JSON's content
Measured = Mapping[str, Any]  # one of its "rows": a method at a budget

SCHEMA_VERSION, READABLE_SCHEMAS = 4, (2, 3, 4)
CONTROLS = ("mixture", "reuse", "extrapolation", "independent", "shrunk")
KIND_ORDER = (*TRAINING_FREE, "morse", *CONTROLS, *PEER_SETTINGS)
FOOTNOTE_MARKS = "†‡§¶"
NONE = "–"
SURE = 0.975  # the share of the bootstrap's replicates that "surely" asks for
LEAST_REPLICATES = 40  # of which 2.5 % are one


def read_result(file: Path) -> Result:
    """Read a benchmark's JSON, packed by gzip if its name ends in ".gz".

    Raises:
        ValueError: If it has another schema than `READABLE_SCHEMAS`.
    """
    content = file.read_bytes()
    result = json.loads(gzip.decompress(content) if file.suffix == ".gz" else content)
    if result.get("schema_version") not in READABLE_SCHEMAS:
        raise ValueError(
            f"schema_version is {result.get('schema_version')!r}, but this version reads "
            f"{READABLE_SCHEMAS}; measure again"
        )
    return result


def guidance_parts(result: Result) -> list[Result]:
    """Take a result apart by guidance scale; each part reads as a result of its own.

    A part has "guidance_scale" (None without guidance, where the result is the only part).
    """
    if not result.get("guidance"):
        return [{**result, "guidance_scale": None}]
    parts = []
    for own in result["guidance"]:
        scale = own["guidance_scale"]
        kept = {
            key: [entry for entry in result.get(key, ()) if entry.get("guidance_scale") == scale]
            for key in ("rows", "speedups", "lossless")
        }
        parts.append({**result, **own, **kept, "guidance": ()})
    return parts


def used_seeds(result: Result) -> list[int]:
    """Return the seeds that all figures of a result, or of a part of it, are made of."""
    left_out = {entry["seed"] for entry in result.get("seeds_left_out", ())}
    return [seed for seed in result["settings"].get("seeds", ()) if seed not in left_out]


def num_paired(result: Result) -> int:
    """Return how many images of a method and seed are compared with the reference's."""
    settings = result["settings"]
    return min(settings["num_images"], settings.get("num_reference_images") or math.inf)


def read_axes(result: Result) -> list[Axis]:
    """Return every axis, in the JSON's order."""
    return [Axis(**about, name=name) for name, about in result.get("axes", {}).items()]


def headline_axes(result: Result) -> list[Axis]:
    """Return the first axis of each side: distribution, then fidelity."""
    axes = read_axes(result)
    firsts = (next((a for a in axes if a.side == s), None) for s in ("distribution", "fidelity"))
    return [axis for axis in firsts if axis is not None]


def read_score(row: Measured | None, axis: Axis) -> Score | None:
    """Return the row's score; None where nothing was measured, or for the reference itself.

    Neither do NaN and infinity count as measured, nor as an uncertainty: nothing could draw them.
    """
    entry = row and row["scores"].get(axis.name)
    if not entry or not _are_finite(entry.get("value")):
        return None
    error, interval = entry.get("standard_error"), entry.get("interval") or (None, None)
    return Score(
        entry["value"],
        error if _are_finite(error) else None,
        tuple(interval) if _are_finite(*interval) else None,
    )


def unscored_text(row: Measured, axis: Axis) -> str:
    """Say why a row has no score on an axis; "" where none was measured."""
    if axis.name not in row["scores"]:
        return ""
    value = (row["scores"][axis.name] or {}).get("value")
    return "reference" if value is None else "not finite"


def _are_finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def morse_names(rows: Iterable[Measured]) -> frozenset[str]:
    """Return the names of the rows that are Morse."""
    return frozenset(row["label"] for row in rows if row["kind"] == "morse")


def engaged_rows(result: Result) -> list[Measured]:
    """Return the rows whose method did what its name says, sorted by kind and then as given."""
    rows = [row for row in result["rows"] if row.get("engaged", True)]
    rank = {kind: index for index, kind in enumerate(KIND_ORDER)}
    return sorted(rows, key=lambda row: rank.get(row["kind"], len(rank)))


def split_budgets(result: Result) -> tuple[list[float], list[float]]:
    """Return the budgets that Morse was measured at, and those of other methods only."""
    rows = result["rows"]
    everything = {row["budget"] for row in rows}
    main = {row["budget"] for row in rows if row["kind"] == "morse"} or everything
    return sorted(main), sorted(everything - main)


def best_row(rows: Iterable[Measured], axis: Axis) -> Measured | None:
    """Return the row with the best value on an axis; None if none has one."""
    scored = [row for row in rows if read_score(row, axis)]
    return min(scored, key=lambda row: axis.sign * row["scores"][axis.name]["value"], default=None)


def best_training_free_row(result: Result, axis: Axis, budget: float) -> Measured | None:
    """Return the best training-free solver's row at a budget."""
    solvers = (
        row
        for row in engaged_rows(result)
        if row["kind"] in TRAINING_FREE and row["budget"] == budget
    )
    return best_row(solvers, axis)


def is_paired(result: Result) -> bool:
    """Tell whether differences were measured on pairs, as they are since schema 4."""
    return result["schema_version"] >= 4


def against_best(result: Result, row: Measured, axis: Axis) -> Verdict | None:
    """Say how a row stands against the best training-free solver; None where there is none.

    By the 95 % interval of the paired difference at the LSD that the row spent. Before schema 4
    there was none, and the two scores are compared at one budget (`compare`).
    """
    if "against_best" not in row:
        score = read_score(row, axis)
        bare = read_score(best_training_free_row(result, axis, row["budget"]), axis)
        return compare(score, bare, axis) if score and bare else None
    found = row["against_best"].get(axis.name)
    if found is None:
        return None
    low, high = found["interval"] or (found["gain"], found["gain"])
    if not _are_finite(low, high):
        return None
    return "better" if low > 0 else "worse" if high < 0 else "within noise"


def is_surely_cheaper(result: Result, entry: Measured) -> bool:
    """Tell whether a speed-up is above 1 in at least 97.5 % of the bootstrap's replicates.

    Before schema 4: whether its interval is, and then nothing without one is sure. Nor is anything
    of so few replicates that none would be left for the other 2.5 %.
    """
    if result["settings"].get("num_replicates", math.inf) < LEAST_REPLICATES:
        return False
    if "cheaper" in entry:
        return (entry["cheaper"] or 0) >= SURE
    return bool(entry.get("interval")) and entry["interval"][0] > 1


def elsewhere(result: Result, row: Measured) -> str:
    """Return a row's own device and precision; "" where they are those of the whole result."""
    own = [row.get(name) or result[name] for name in ("device", "dtype")]
    return "" if own == [result["device"], result["dtype"]] else ", ".join(own)


def footnotes(result: Result) -> dict[str, str]:
    """Return a mark for each device and precision other than the result's own."""
    places = dict.fromkeys(filter(None, (elsewhere(result, row) for row in result["rows"])))
    return {
        place: FOOTNOTE_MARKS[i] if i < len(FOOTNOTE_MARKS) else f"({i + 1})"
        for i, place in enumerate(places)
    }


def milliseconds_an_image(result: Result, row: Measured) -> float | None:
    """Return the wall time of an image of a batch, in milliseconds.

    By the seconds that speed-ups are of, for of several seeds earlier versions averaged the rates.
    """
    num_images = result["settings"].get("num_images")
    if row.get("seconds") and num_images:
        return 1e3 * row["seconds"] / num_images
    return 1e3 / row["images_per_second"] if row.get("images_per_second") else None


def batch_milliseconds(result: Result, row: Measured) -> list[float] | None:
    """Return the quartiles of full batches' wall times, in milliseconds an image of a batch.

    None where there were fewer than two batches, or an earlier version measured.
    """
    size = result["settings"].get("batch_size")
    seconds = row.get("batch_seconds")
    return [1e3 * value / size for value in seconds] if seconds and size else None


def budget_list(budgets: Iterable[float]) -> str:
    """Return such as "5, 8, 12"; "–" for none."""
    return ", ".join(f"{budget:g}" for budget in budgets) or NONE
