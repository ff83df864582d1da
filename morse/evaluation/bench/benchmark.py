"""The benchmark: every method at every budget, in one JSON file with a table and a plot."""

import math
import time

import torch

from morse.evaluation.bench.config import BenchmarkConfig
from morse.evaluation.bench.feature_space import AUTO, FeatureSpace, choose_extractor
from morse.evaluation.bench.flops import count_architectures
from morse.evaluation.bench.latency import LatencySettings
from morse.evaluation.bench.latency_report import run_architectures
from morse.evaluation.bench.measuring import (
    Part,
    compared_seeds,
    conditions_facts,
    hasten_after_tables,
    measure_cells,
)
from morse.evaluation.bench.packages import package_versions
from morse.evaluation.bench.parts import join_parts, part_folders
from morse.evaluation.bench.real_images import open_real, read_real
from morse.evaluation.bench.sampler import Bench
from morse.evaluation.bench.store import CellStore
from morse.evaluation.digests import file_sha256
from morse.evaluation.environment import AUTOCAST, command_line, environment, resolve_device
from morse.evaluation.report.data import SCHEMA_VERSION, read_result
from morse.evaluation.report.render import render
from morse.evaluation.stats.lossless import read_deltas
from morse.evaluation.stats.points import Statistics
from morse.evaluation.stats.summary import rounded, summarize
from morse.files import write_json
from morse.settings import as_json

__all__ = ["BenchmarkConfig", "measure_benchmark", "run_benchmark"]

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
        ValueError: If a resumed run was started with other settings, or a result to be drawn again
            has a schema that is not known.
    """
    if config.arch:
        return measure_architectures(config.resolved())
    if config.from_json is not None:
        result = read_result(config.from_json)
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
    device = resolve_device(config.device)
    if config.cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a CUDA device, and device is {device}")
    extractor = choose_extractor(config, device)
    opened = open_real(config.real, extractor)
    bench = Bench(config)
    deadline = time.monotonic() + (math.inf if config.max_seconds is None else config.max_seconds)
    scales = bench.guidance_scales()
    conditions = [bench.conditions(scale) for scale in scales]  # what is wrong is told at once
    models = dict(bench.pipelines.models)
    if config.prompt_embeds is not None:
        models["prompt_embeds_sha256"] = file_sha256(config.prompt_embeds)
    identity = {
        **config.identity(),
        **models,
        "machine": environment(bench.device),  # times of two would not compare
        "extractor": None if extractor is None else extractor.identity(),
    }
    folders = part_folders(config.output_dir, scales)
    stores = [CellStore(folder, identity, config.resume) for folder in folders]
    real = read_real(opened, extractor, stores[0])
    space = FeatureSpace(extractor, real, config.extractor == AUTO, device)
    parts = [
        Part(config, store, bench, wanted, space, deadline)
        for store, wanted in zip(stores, conditions, strict=True)
    ]
    if config.compile or config.cuda_graphs:
        hasten_after_tables(parts)
    facts = [measure_cells(part) for part in parts]
    figures = [_summarize(part) for part in parts]
    settings = as_json(config)
    kinds = {row["kind"] for part in figures for row in part["rows"]}
    result = {
        "schema_version": SCHEMA_VERSION,
        "command": command_line(),
        **conditions_facts(parts[0]),
        "models": models,
        "packages": package_versions(kinds),
        "settings": {name: settings[name] for name in settings if name not in UNTOLD},
        **join_parts(scales, facts, figures),
    }
    target = config.json or config.output_dir / "benchmark.json"
    write_json(target, result)
    print(f"wrote {target}")
    return result


def _summarize(part: Part) -> dict[str, object]:
    config, references = part.config, part.references()
    seeds, _ = compared_seeds(part)
    asked = [(*task, seed) for task in config.tasks() for seed in seeds]
    cells = [part.store.get(*cell) for cell in asked if part.store.has(*cell)]
    statistics = Statistics(config.num_replicates, device=part.space.kernel_device)
    deltas = read_deltas(config.lossless_delta)
    space = part.space
    return rounded(summarize(cells, space.real, references, statistics, space.axes, deltas))


def measure_architectures(config: BenchmarkConfig) -> dict[str, object]:
    """Count FLOPs of `config.arch`, and unless `flops_only` measure N; see `run_benchmark`.

    N is measured eager, as CUDA graphs where there is CUDA, and compiled where asked for.
    """
    target = config.json or config.output_dir / "latency.json"
    sizes = tuple(size for size in config.latency_batch_sizes if size > 0)
    if config.flops_only or not sizes:
        return count_architectures(config.arch, target)
    device = resolve_device(config.device)
    modes = {"eager": True, "compiled": config.compile, "cuda_graph": device.type == "cuda"}
    settings = LatencySettings(
        batch_sizes=sizes,
        modes=tuple(mode for mode, chosen in modes.items() if chosen),
        reduced=device.type == "cpu",
        dtype=AUTOCAST.get(config.mixed_precision, getattr(torch, config.dtype)),
    )
    return run_architectures(config.arch, device, settings, target)
