"""FLOPs of published architectures and their Dots at full depth, without running them."""

from pathlib import Path

from morse.evaluation.bench.latency import DOT_WORDS, FlopCounts
from morse.evaluation.environment import command_line
from morse.evaluation.report.markdown import pipe_table
from morse.files import write_bytes, write_json

NOT_MEASURED = "not measured"


def count_architectures(names: tuple[str, ...], file: Path) -> dict[str, object]:
    """Count FLOPs for m = 1 and 2, LoRA merged and separate; write `file` and a table beside it.

    Nothing is timed: "speed_ratio" is `NOT_MEASURED`. Where an architecture's Dot cannot be built,
    "error" says why.

    Args:
        names: Keys of `ARCHITECTURES`.
        file: The JSON file; its Markdown twin ends in .md.
    """
    entries = [
        _count(name, counts, num_down_blocks, merged)
        for name in names
        for counts in (FlopCounts(name),)
        for num_down_blocks in (1, 2)
        for merged in (True, False)
    ]
    result: dict[str, object] = {
        "command": command_line(),
        "how": "counted on torch's meta device at full depth, batch 1; a multiply-add counts 2",
        "dot": DOT_WORDS,
        "entries": entries,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    write_bytes(file.with_suffix(".md"), to_markdown(result).encode())
    for written in (file, file.with_suffix(".md")):
        print(f"wrote {written}")
    return result


def _count(name: str, counts: FlopCounts, num_down_blocks: int, merged: bool) -> dict[str, object]:
    entry = {"arch": name, "num_down_blocks": num_down_blocks, "merged": merged}
    entry["speed_ratio"] = NOT_MEASURED
    try:
        return {**entry, **counts.of(num_down_blocks, merged)}
    except ValueError as error:  # no Dot of that kind
        return {**entry, "error": str(error)}


def to_markdown(result: dict[str, object]) -> str:
    """Return the table of a result of `count_architectures`."""
    rows = []
    for entry in result["entries"]:
        lora = "merged" if entry["merged"] else "separate"
        cells = [entry["arch"], str(entry["num_down_blocks"]), lora]
        if "error" in entry:
            cells += [entry["error"].replace("|", "\\|"), "", ""]
        else:
            cells += [f"{entry[key] / 1e9:,.1f}" for key in ("dash_flops", "dot_flops")]
            cells.append(f"{entry['flop_ratio']:.2f}")
        rows.append([*cells, str(entry["speed_ratio"])])
    header = ("architecture", "m", "LoRA", "Dash, GFLOPs", "Dot, GFLOPs", "ratio", "N")
    parts = [
        "# FLOPs of Dash and Dot",
        f"{result['how'].capitalize()}. Dot: {result['dot']}. Random weights, which FLOPs do not "
        "depend on. The ratio bounds N, how many times faster Dot is, from above where the device "
        "is busy; N itself was not measured on these full-size models.",
        f"```\n{result['command']}\n```",
        pipe_table(header, rows, "|---|--:|---|--:|--:|--:|---|"),
    ]
    return "\n\n".join(parts) + "\n"
