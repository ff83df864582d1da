"""The benchmark: every method at every budget, in one JSON file with a table and a plot."""

import dataclasses
import json

import torch
from torch import Tensor

from morse.evaluation.bench.config import BenchmarkConfig
from morse.evaluation.bench.latency import LatencySettings
from morse.evaluation.bench.latency_report import run_architectures
from morse.evaluation.bench.measuring import measure_cells, reference_name
from morse.evaluation.bench.sampler import AUTOCAST
from morse.evaluation.bench.store import CellStore
from morse.evaluation.environment import command_line, resolve_device
from morse.evaluation.features import load_reference
from morse.evaluation.report.render import render
from morse.evaluation.stats.points import Statistics
from morse.evaluation.stats.summary import rounded, summarize
from morse.training.checkpoint import write_json

__all__ = ["BenchmarkConfig", "measure_benchmark", "run_benchmark"]

SCHEMA_VERSION = 2
UNTOLD = (
    "output_dir",
    "json",
    "from_json",
    "resume",
    "max_seconds",
)  # settings that change no figure


def run_benchmark(config: BenchmarkConfig) -> dict[str, object]:
    """Measure what is missing, then write benchmark.json and the report drawn from it.

    With `arch` only latency.json is written.

    Returns:
        The JSON's content.

    Raises:
        FileExistsError: If `output_dir` holds a run and `resume` is off.
        ValueError: If a resumed run was started with other settings.
    """
    if config.arch:
        return measure_architectures(config.resolved())
    if config.from_json is not None:
        result = json.loads(config.from_json.read_text())
        if result.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{config.from_json} has schema_version {result.get('schema_version')}, but this "
                f"version draws {SCHEMA_VERSION}; measure again"
            )
    else:
        result = measure_benchmark(config.resolved())
    for file in render(result, config.output_dir):
        print(f"wrote {file}")
    return result


def measure_benchmark(config: BenchmarkConfig) -> dict[str, object]:
    """Measure what is missing, and write the JSON file; see `run_benchmark`.

    Args:
        config: Settings without gaps (`BenchmarkConfig.resolved`).
    """
    store = CellStore(config.output_dir, config.identity(), config.resume)
    facts = measure_cells(config, store)
    asked = [(*task, seed) for task in config.tasks() for seed in config.seeds]
    cells = [store.get(*cell) for cell in asked if store.has(*cell)]
    references = {
        seed: store.features(reference_name(seed), Tensor) for seed in {cell.seed for cell in cells}
    }
    statistics = Statistics(config.num_replicates)
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    result = {
        "schema_version": SCHEMA_VERSION,
        "command": command_line(),
        **facts,
        "settings": {name: settings[name] for name in settings if name not in UNTOLD},
        **rounded(summarize(cells, load_reference(), references, statistics)),
    }
    target = config.json or config.output_dir / "benchmark.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, result)
    print(f"wrote {target}")
    return result


def measure_architectures(config: BenchmarkConfig) -> dict[str, object]:
    """Measure N and FLOPs of `config.arch`, eager, as CUDA graphs where there is CUDA, compiled
    where asked for; see `run_benchmark`.
    """
    device = resolve_device(config.device)
    modes = {"eager": True, "compiled": config.compile, "cuda_graph": device.type == "cuda"}
    settings = LatencySettings(
        batch_sizes=config.latency_batch_sizes,
        modes=tuple(mode for mode, chosen in modes.items() if chosen),
        reduced=device.type == "cpu",
        dtype=AUTOCAST.get(config.mixed_precision, torch.float32),
    )
    target = config.json or config.output_dir / "latency.json"
    return run_architectures(config.arch, device, settings, target)
