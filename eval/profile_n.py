"""Measure N of the embedded pixel pipeline before and after changes of Dot's architecture.

`OMP_NUM_THREADS=1 python -m eval.profile_n`; weights are random where no trained ones fit, which
latency does not depend on. CPU seconds are counted, not those of the clock on the wall, so that
other programs on the machine disturb the ratio less.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from morse import MorseDot, MorsePipeline
from morse.cli import run_command
from morse.evaluation.environment import command_line, environment
from morse.evaluation.report.markdown import pipe_table
from morse.files import write_bytes, write_json
from morse.sampling import JumpPoint
from morse.settings import option
from morse.summary import quartiles

# What is changed -> options of a Dot otherwise like the embedded one.
OPTIONS: dict[str, dict[str, object]] = {
    "as embedded (16, 32)": {},
    "block_out_channels 8, 16": {"block_out_channels": (8, 16)},
    "block_out_channels 8, 32": {"block_out_channels": (8, 32)},
    "block_out_channels 32, 64": {"block_out_channels": (32, 64)},
    "layers_per_block 2": {"layers_per_block": 2},
    "num_down_blocks 1 (16)": {"num_down_blocks": 1, "block_out_channels": (16,)},
    "num_down_blocks 3 (16, 32, 64)": {"num_down_blocks": 3, "block_out_channels": (16, 32, 64)},
}
NO_FIRST = "first block without its ResNet"
USUAL_FORMAT = "as embedded, not channels last (as it was)"
Call = Callable[[], object]


@dataclass(frozen=True)
class ProfileConfig:
    """Measure N of the embedded pixel pipeline for several architectures of Dot."""

    output: Path = option(
        Path("eval/results/latency/n_of_embedded.json"),
        "file to write; a Markdown table of the same name goes beside it",
    )
    batch_sizes: tuple[int, ...] = option((1, 16), "images in one evaluation")
    repeats: int = option(15, "timed rounds of Dash and every Dot")


def make_dots(dash: nn.Module, embedded: MorseDot) -> dict[str, MorseDot]:
    """Make a merged Dot for each change, by the change's name."""
    base = {name: embedded.config[name] for name in ("num_down_blocks", "lora_rank")}
    base["block_out_channels"] = tuple(embedded.config.block_out_channels)
    dots = {name: MorseDot.from_dash(dash, **base | more) for name, more in OPTIONS.items()}
    dots[NO_FIRST] = MorseDot.from_dash(dash, **base)
    dots[NO_FIRST].down_blocks[0].resnets = nn.ModuleList()
    dots[USUAL_FORMAT] = MorseDot.from_dash(dash, **base)
    unmerged = MorseDot.from_dash(dash, **base).eval()
    dots = {name: dot.eval().merge_lora().bind(dash) for name, dot in dots.items()}
    undo_channels_last(dots[USUAL_FORMAT])
    return dots | {"LoRA separate": unmerged}


def undo_channels_last(dot: MorseDot) -> None:
    """Run a merged Dot in torch's usual memory format, as before it was placed channels last."""
    dot._tree_state.is_merged = False
    for module in dot._tree[0].modules():
        if "weight" in module._parameters:
            module._parameters["weight"].data = module.weight.data.contiguous()


def make_calls(dash: nn.Module, dots: dict[str, MorseDot], batch_size: int) -> dict[str, Call]:
    """Make calls without arguments of Dash and every Dot."""
    size = dash.config.sample_size
    sample = torch.randn(batch_size, dash.config.in_channels, size, size)
    timestep, jump = torch.tensor(500), JumpPoint(sample, torch.tensor(600), sample)
    calls: dict[str, Call] = {"Dash": lambda: dash(sample, timestep)}
    for name, dot in dots.items():
        calls[name] = lambda dot=dot: dot(sample, timestep, jump)
    return calls


@torch.no_grad()
def time_calls(calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Return the quartiles of CPU seconds of each call, made in turn in an order drawn anew."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(repeats + 2):
        for name in random.Random(index).sample(list(calls), len(calls)):
            started = time.process_time()
            calls[name]()
            if index > 1:  # the first rounds warm up
                seconds[name].append(time.process_time() - started)
    return {name: quartiles(each) for name, each in seconds.items()}


def profile_n(config: ProfileConfig) -> None:
    """Measure, print and write N of every change at every batch size."""
    torch.manual_seed(0)
    pipe = MorsePipeline.from_pretrained("fashion-mnist")
    dots, entries = make_dots(pipe.unet, pipe.dot), []
    for batch_size in config.batch_sizes:
        measured = time_calls(make_calls(pipe.unet, dots, batch_size), config.repeats)
        for name in dots:
            seconds = {"dash_seconds": measured["Dash"], "dot_seconds": measured[name]}
            ratio = seconds["dash_seconds"][1] / seconds["dot_seconds"][1]
            entries.append({"dot": name, "batch_size": batch_size, "speed_ratio": ratio, **seconds})
    result = {
        "command": command_line(),
        "how": f"CPU seconds, quartiles of {config.repeats} evaluations in turn, warm",
        **environment(torch.device("cpu")),
        "entries": entries,
    }
    write_json(config.output, result)
    table = to_markdown(result)
    write_bytes(config.output.with_suffix(".md"), table.encode())
    print(table)


def to_markdown(result: dict) -> str:
    """Return the table of N, a row a change and a column a batch size."""
    sizes = sorted({entry["batch_size"] for entry in result["entries"]})
    cells = {(e["dot"], e["batch_size"]): e for e in result["entries"]}
    lines = []
    for name in dict.fromkeys(entry["dot"] for entry in result["entries"]):
        row = [cells[name, size] for size in sizes]
        shown = [f"{e['speed_ratio']:.1f} ({1e3 * e['dot_seconds'][1]:.1f})" for e in row]
        lines.append((name, *shown))
    header = ("Dot", *(f"N at batch {size} (Dot, ms)" for size in sizes))
    dash = ", ".join(
        f"{1e3 * median(e['dash_seconds']):.0f} ms at batch {e['batch_size']}"
        for e in result["entries"]
        if e["dot"] == next(iter(OPTIONS))
    )
    return (
        "# N of the embedded pixel pipeline\n\n"
        f"{result['device']}, {result['dtype']}. {result['how']}; N is the ratio of medians. Dash: "
        f"{dash}. LoRA merged but in the last row. Only latency is compared: what a change does "
        f"to the images was not measured.\n\n```\n{result['command']}\n```\n\n"
        + pipe_table(header, lines, "|---|" + "--:|" * len(sizes))
        + "\n"
    )


if __name__ == "__main__":
    run_command(ProfileConfig, profile_n)
