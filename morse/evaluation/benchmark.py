"""The benchmark: every method at every budget, in one JSON file with a table and a plot."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from morse.evaluation.benchmark_report import render
from morse.evaluation.environment import command_line
from morse.evaluation.measuring import measure_cells
from morse.evaluation.runs import Method, check_solvers
from morse.evaluation.store import CellStore
from morse.evaluation.summary import rounded, summarize
from morse.training.checkpoint import write_json

SCHEMA_VERSION = 1
UNTOLD = (
    "output_dir",
    "json",
    "from_json",
    "resume",
    "max_seconds",
)  # settings that change no figure


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measure quality against cost, and matched-quality speed-ups, of Morse and its controls."""

    output_dir: Path = field(
        default=Path("benchmark_output"), metadata={"help": "folder for everything written"}
    )
    json: Path | None = field(
        default=None, metadata={"help": "result file; output_dir/benchmark.json if left out"}
    )
    from_json: Path | None = field(
        default=None, metadata={"help": "redraw this result's table and plot; no sampling"}
    )
    resume: bool = field(default=False, metadata={"help": "go on with the run in output_dir"})
    pipeline: str = field(
        default="fashion-mnist", metadata={"help": "the embedded pipeline, or a folder"}
    )
    dot: str | None = field(
        default=None, metadata={"help": "another Dot's folder; the pipeline's own if left out"}
    )
    independent_dot: str | None = field(
        default=None,
        metadata={
            "help": "folder of a Dot trained to estimate alone, from the sample only: a control"
        },
    )
    controls: bool = field(
        default=True, metadata={"help": "also measure reuse of Dash's estimates without Dot"}
    )
    num_images: int = field(
        default=5000, metadata={"help": "images of each method, budget and seed"}
    )
    batch_size: int = field(default=250, metadata={"help": "images at a time"})
    lsd: tuple[int, ...] = field(default=(5, 8, 12, 20, 30), metadata={"help": "budgets in LSD"})
    baseline_lsd: tuple[int, ...] = field(
        default=(3, 4, 6, 10, 15, 25, 40, 50, 70, 100),
        metadata={"help": "budgets of the bare solvers beside --lsd"},
    )
    solvers: tuple[str, ...] = field(
        default=("ddim", "dpmsolver++"), metadata={"help": "ddim, dpmsolver++, unipc"}
    )
    ddim_ratios: tuple[float, ...] = field(
        default=(2.0,), metadata={"help": "plan ratios tried with DDIM"}
    )
    dpm_ratios: tuple[float, ...] = field(
        default=(1.5, 2.0), metadata={"help": "plan ratios tried with the other solvers"}
    )
    speed_ratio: float | None = field(
        default=None, metadata={"help": "N; measured at batch_size if left out"}
    )
    latency_batch_sizes: tuple[int, ...] = field(
        default=(1, 16, 64),
        metadata={"help": "also measure N at these batch sizes, LoRA merged and not; 0 for none"},
    )
    merge_lora: bool = field(
        default=True, metadata={"help": "sample with Dot's LoRA merged into a copy of the weights"}
    )
    seeds: tuple[int, ...] = field(
        default=(0,), metadata={"help": "first image seed of each repetition"}
    )
    num_replicates: int = field(
        default=100, metadata={"help": "bootstrap replicates for standard errors; 0 for none"}
    )
    max_seconds: float | None = field(
        default=None, metadata={"help": "begin no measurement after so long; --resume goes on"}
    )
    latency_only: bool = field(
        default=False, metadata={"help": "only measure N, at latency_batch_sizes; no sampling"}
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = field(
        default="no", metadata={"help": "autocast of the networks"}
    )
    device: str = field(
        default="auto", metadata={"help": "cpu, cuda or another torch device; auto takes a GPU"}
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_solvers(self.solvers)
        for name, least in (("num_images", 2), ("batch_size", 1), ("num_replicates", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be {least} or more")
        for name in ("lsd", "baseline_lsd"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but each must be 1 or more")
        for name in ("ddim_ratios", "dpm_ratios"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but each must be 1 or more")
        if self.speed_ratio is not None and self.speed_ratio <= 0:
            raise ValueError(f"speed_ratio is {self.speed_ratio}, but must be positive")
        if any(later - seed < self.num_images for seed, later in pairwise(sorted(self.seeds))):
            raise ValueError(
                f"seeds is {self.seeds}, but image i of a repetition has seed + i: keep them "
                f"num_images = {self.num_images} apart, or repetitions share images"
            )

    def tasks(self) -> list[tuple[Method, int]]:
        """List every method with every budget it is measured at, what matters most first."""
        order = {solver: 2 * index for index, solver in enumerate(self.solvers)}

        def stage(task: tuple[Method, int]) -> int:
            method, budget = task
            early = {"morse": 1, "reuse": 2, "independent": 3 + order[method.solver]}
            if method.kind == "baseline":
                return 0 if budget in self.lsd else 4 + order[method.solver]
            return early[method.kind]

        return [] if self.latency_only else sorted(self._all_tasks(), key=stage)

    def _all_tasks(self) -> Iterator[tuple[Method, int]]:
        kinds = ["morse", *["reuse"] * self.controls]
        kinds += ["independent"] * (self.independent_dot is not None)
        for solver in self.solvers:
            for lsd in sorted({*self.lsd, *self.baseline_lsd}):
                yield Method(solver), lsd
            for kind in kinds:
                for ratio in self.ddim_ratios if solver == "ddim" else self.dpm_ratios:
                    for lsd in sorted(set(self.lsd)):
                        yield Method(solver, kind, ratio), lsd

    def identity(self) -> dict[str, object]:
        """Return the settings that a cell depends on; a resumed run may only add cells."""
        names = ("pipeline", "dot", "independent_dot", "num_images", "batch_size", "speed_ratio")
        names += ("merge_lora", "num_replicates", "mixed_precision", "device")
        return {name: getattr(self, name) for name in names}


def run_benchmark(config: BenchmarkConfig) -> dict[str, object]:
    """Measure what is missing, then write benchmark.json, benchmark.md and benchmark.png.

    Returns:
        The JSON's content.

    Raises:
        FileExistsError: If `output_dir` holds a run and `resume` is off.
        ValueError: If a resumed run was started with other settings.
    """
    if config.from_json is not None:
        result = json.loads(config.from_json.read_text())
        if result.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{config.from_json} has schema_version {result.get('schema_version')}, but this "
                f"version draws {SCHEMA_VERSION}; measure again"
            )
    else:
        store = CellStore(config.output_dir, config.identity(), config.resume)
        facts = measure_cells(config, store)
        asked = [(*task, seed) for task in config.tasks() for seed in config.seeds]
        missing = [cell for cell in asked if not store.has(*cell)]
        cells = [store.get(*cell) for cell in asked if cell not in missing]
        settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        result = {
            "schema_version": SCHEMA_VERSION,
            "command": command_line(),
            **facts,
            "settings": {name: settings[name] for name in settings if name not in UNTOLD},
            "not_measured": [f"{method.label}, {lsd} LSD" for method, lsd, _ in missing],
            **rounded(summarize(cells)),
        }
        target = config.json or config.output_dir / "benchmark.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, result)
        print(f"wrote {target}")
    for file in render(result, config.output_dir):
        print(f"wrote {file}")
    return result
