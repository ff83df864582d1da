"""FLOPs of published architectures and their Dots at full depth, without running them."""

from pathlib import Path

from morse.evaluation.bench.latency import DOT_WORDS, count_architecture
from morse.evaluation.environment import command_line
from morse.evaluation.report.markdown import pipe_table
from morse.files import write_bytes, write_json

NOT_MEASURED = "not measured"


def count_architectures(names: tuple[str, ...], file: Path) -> dict[str, object]:
    """Count FLOPs for m = 1 and 2, LoRA merged and separate; write `file` and a table beside it.

    Nothing is timed: "speed_ratio" is `NOT_MEASURED`.

    Args:
        names: Keys of `ARCHITECTURES`.
        file: The JSON file; its Markdown twin ends in .md.
    """
    entries = [
        {**counted, "speed_ratio": NOT_MEASURED}
        for name in names
        for counted in count_architecture(name)
    ]
    result: dict[str, object] = {
        "command": command_line(),
        "how": "counted on torch's meta device at full depth, batch 1; a multiply-add counts 2",
        "dot": DOT_WORDS,
        "entries": entries,
    }
    write_json(file, result)
    write_bytes(file.with_suffix(".md"), to_markdown(result).encode())
    for written in (file, file.with_suffix(".md")):
        print(f"wrote {written}")
    return result


def to_markdown(result: dict[str, object]) -> str:
    """Return the table of a result of `count_architectures`."""
    rows = []
    for entry in result["entries"]:
        lora = "merged" if entry["merged"] else "separate"
        flops = [f"{entry[key] / 1e9:,.1f}" for key in ("dash_flops", "dot_flops")]
        dot = [entry["arch"], str(entry["num_down_blocks"]), lora]
        rows.append([*dot, *flops, f"{entry['flop_ratio']:.2f}", entry["speed_ratio"]])
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
