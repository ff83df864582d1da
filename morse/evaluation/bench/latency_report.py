"""N and FLOP ratios of published architectures as a table and a JSON file."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from morse.evaluation.bench.latency import (
    DOT_WORDS,
    LatencySettings,
    measure_architecture,
)
from morse.evaluation.environment import command_line, environment
from morse.files import write_json

if TYPE_CHECKING:
    from rich.table import Table


def run_architectures(
    names: tuple[str, ...], device: torch.device, settings: LatencySettings, file: Path
) -> dict[str, object]:
    """Measure architectures, print a table and write a JSON file."""
    from rich.console import Console

    entries: list[dict[str, object]] = []
    result = {
        "command": command_line(),
        **environment(device),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "reduced": settings.reduced,
        "repeats": settings.repeats,
        "dot": DOT_WORDS,
        "entries": entries,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        for entry in measure_architecture(name, device, settings):
            entries.append(entry)
            write_json(file, result)  # a later one may end the process
    Console(width=100).print(_table(result))
    print(f"wrote {file}")
    return result


def _table(result: dict[str, object]) -> "Table":
    from rich.table import Table

    depth = ", fewer layers than published" if result["reduced"] else ""
    title = f"{result['device']}, {result['dtype']}, random weights{depth}"
    caption = "FLOP ratio: at full depth, batch 1. N: ratio of medians."
    table = Table(title=title, caption=caption)
    for header in ("arch", "m", "LoRA", "mode", "batch", "FLOP ratio", "N"):
        table.add_column(header, justify="left" if header in ("arch", "mode") else "right")
    for entry in result["entries"]:
        lora = "merged" if entry["merged"] else "separate"
        ratio = f"{entry['speed_ratio']:.2f}" if "speed_ratio" in entry else entry["error"]
        cells = (entry["arch"], entry["num_down_blocks"], lora, entry["mode"])
        cells += (entry["batch_size"], f"{entry['flop_ratio']:.2f}", ratio)
        table.add_row(*map(str, cells))
    return table
