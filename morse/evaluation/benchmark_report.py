"""The benchmark's Markdown tables and plot, drawn from its JSON alone."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from morse.evaluation.report import Row, plot_quality
from morse.evaluation.scoring import AXES

Result = dict[str, object]
AXIS_NAMES = {"frechet": "Fréchet", "psnr": "PSNR", "frechet_to_reference": "Fréchet to reference"}


def render(result: Result, folder: Path) -> list[Path]:
    """Write benchmark.md and benchmark.png into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in dataclasses.fields(Row)]
    rows = [Row(**{name: entry[name] for name in names}) for entry in result["rows"]]
    num_images = result["settings"]["num_images"]
    title = f"{num_images} images, {result['device']}, N = {_speed_ratio(result):.2f}"
    if not rows:
        (folder / "benchmark.md").write_text(markdown(result))
        return [folder / "benchmark.md"]
    # The independent control runs off the scale of the others.
    shown = [row for row in rows if row.kind != "independent"]
    plot_quality(shown, folder / "benchmark.png", title)
    (folder / "benchmark.md").write_text(markdown(result))
    return [folder / "benchmark.md", folder / "benchmark.png"]


def markdown(result: Result) -> str:
    """Return conditions, quality, matched-quality speed-ups, costs and N as Markdown."""
    if not result["rows"]:
        conditions = f"{result['device']}, {result['dtype']}, torch {result['torch']}."
        made_by = f"Made by `{result['command']}`."
        return "\n\n".join([conditions, made_by, *_speed_ratios(result)]) + "\n"
    return (
        "\n\n".join(
            [
                _conditions(result),
                *_quality(result, "frechet", f"{result['metric']} to real images, lower is better"),
                *_quality(result, "psnr", "Same-noise PSNR to the reference, dB, higher is better"),
                *_quality(
                    result,
                    "frechet_to_reference",
                    f"{result['metric']} to the reference's images, lower is better",
                ),
                *_speedups(result, "lsd", "cost in LSD"),
                *_points(result),
                *_speedups(result, "seconds", "cost in wall seconds"),
                *_costs(result),
                *_not_measured(result),
                *_speed_ratios(result),
            ]
        )
        + "\n"
    )


def _speed_ratio(result: Result) -> float:
    return result["speed_ratio"]["speed_ratio"]


def _table(header: Iterable[object], lines: Iterable[Iterable[object]]) -> str:
    header = [str(cell) for cell in header]
    rows = [header, ["---", *["--:"] * (len(header) - 1)], *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def _labels(result: Result, kinds: tuple[str, ...] | None = None) -> list[str]:
    rows = result["rows"]
    return list(dict.fromkeys(row["label"] for row in rows if not kinds or row["kind"] in kinds))


def _budgets(result: Result) -> tuple[list[int], list[int]]:
    """Return the budgets of Morse, and those at which only bare solvers were measured."""
    asked = {row["budget"] for row in result["rows"] if row["kind"] != "baseline"}
    others = {row["budget"] for row in result["rows"]} - asked
    return sorted(asked), sorted(others)


def _cells(
    result: Result, labels: list[str], budgets: list[int], show: object
) -> list[list[object]]:
    """Return a line a method, with `show(row)` in a column a budget."""
    rows = {(row["label"], row["budget"]): row for row in result["rows"]}
    return [
        [label, *(show(rows[label, n]) if (label, n) in rows else "" for n in budgets)]
        for label in labels
    ]


def _conditions(result: Result) -> str:
    settings, speed = result["settings"], result["speed_ratio"]
    return (
        f"{settings['num_images']} images of each method (first seeds {settings['seeds']}, batch "
        f"{settings['batch_size']}), {result['device']}, {result['dtype']}, torch "
        f"{result['torch']}, diffusers {result['diffusers']}; N = {speed['speed_ratio']:.2f} "
        f"({speed['how']}). Reference: {result['reference']}. Real images: "
        f"{result['real_images']}. ± is the bootstrap standard error over images. r is the plan's "
        f"ratio, evaluations per LSD.\n\nMade by `{result['command']}`."
    )


def _quality(result: Result, axis: str, title: str) -> list[str]:
    """One table at Morse's budgets, one of the bare solvers at the others."""

    def show(row: dict[str, object]) -> str:
        if row[axis] is None:
            return "reference"
        digits, error = (2 if axis == "psnr" else 3), row[f"{axis}_standard_error"]
        return f"{row[axis]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    asked, others = _budgets(result)
    parts = [f"### {title}"]
    if asked:
        parts.append(_table(["LSD", *asked], _cells(result, _labels(result), asked, show)))
    if others:
        labels = _labels(result, ("baseline",))
        parts.append(_table(["LSD", *others], _cells(result, labels, others, show)))
    return parts


def _costs(result: Result) -> list[str]:
    """Dash + Dot evaluations and milliseconds an image, at Morse's budgets."""

    def show(row: dict[str, object]) -> str:
        milliseconds = 1e3 * row["seconds"] / result["settings"]["num_images"]
        return f"{row['num_dash']} + {row['num_dot']}, {milliseconds:.3g} ms"

    asked, others = _budgets(result)
    table = _table(
        ["LSD", *(asked or others)], _cells(result, _labels(result), asked or others, show)
    )
    return ["### Dash + Dot evaluations, and wall time an image", table]


def _speedups(result: Result, cost: str, title: str) -> list[str]:
    entries = [entry for entry in result["speedups"] if entry["cost"] == cost]
    columns = [
        (baseline, axis)
        for axis in AXES
        for baseline in dict.fromkeys(entry["baseline"] for entry in entries)
    ]
    cells = {
        (entry["method"], entry["baseline"], entry["axis"]): entry["mean"]["text"]
        + ("" if (error := entry["mean_standard_error"]) is None else f" ± {error:.2f}")
        for entry in entries
    }
    lines = [
        [method, *(cells.get((method, *column), "") for column in columns)]
        for method in dict.fromkeys(entry["method"] for entry in entries)
    ]
    if not lines:
        return []
    note = ">= and <= mark means that hold bounds: points outside the baseline's measured range."
    header = ["method", *(f"{AXIS_NAMES[axis]}, over {baseline}" for baseline, axis in columns)]
    return [f"### Mean matched-quality speed-up, {title}", note, _table(header, lines)]


def _points(result: Result) -> list[str]:
    """The single points behind Morse's means."""
    morse, (asked, _) = _labels(result, ("morse",)), _budgets(result)
    lines = []
    for entry in result["speedups"]:
        if entry["cost"] != "lsd" or entry["method"] not in morse:
            continue
        texts = {point["budget"]: point["text"] for point in entry["points"]}
        name = f"{entry['method']} over {entry['baseline']}, {AXIS_NAMES[entry['axis']]}"
        lines.append([name, *(texts.get(budget, "") for budget in asked)])
    title = "### Matched-quality speed-up at each budget, cost in LSD"
    return [title, _table(["LSD", *asked], lines)] if lines else []


def _not_measured(result: Result) -> list[str]:
    missing = result["not_measured"]
    return ["### Asked for and not measured", "; ".join(missing)] if missing else []


def _speed_ratios(result: Result) -> list[str]:
    def quartiles(seconds: list[float]) -> str:
        return " / ".join(f"{1e3 * value:.3g}" for value in seconds)

    lines = [
        [
            entry["batch_size"],
            "merged" if entry["merged"] else "separate",
            f"{entry['speed_ratio']:.2f}",
            quartiles(entry["dash_seconds"]),
            quartiles(entry["dot_seconds"]),
        ]
        for entry in result["speed_ratios"]
    ]
    header = ["batch", "LoRA", "N", "Dash, ms (quartiles)", "Dot, ms (quartiles)"]
    title = "### N, how many times faster Dot is than Dash"
    return [title, _table(header, lines)] if lines else []
