"""The benchmark's sampling: fills a store with one cell a method, budget and seed."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from morse.evaluation.environment import environment
from morse.evaluation.features import (
    features_sha256,
    load_features,
    load_reference,
    read_features_config,
)
from morse.evaluation.metrics import FRECHET_LABEL
from morse.evaluation.runs import (
    REFERENCE_SOLVER,
    REFERENCE_STEPS,
    SOLVERS,
    Method,
    Samples,
    load_pipelines,
    reuse_dot,
    sample_images,
)
from morse.evaluation.scoring import Scorer
from morse.evaluation.speed import measure_speed, measure_speed_table
from morse.evaluation.store import Cell, CellStore
from morse.plan import MorsePlan

if TYPE_CHECKING:
    from morse.evaluation.benchmark import BenchmarkConfig
    from morse.pipeline import MorsePipeline

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Bench:
    """The loaded pipelines, one a solver, and the Dots that take turns in them."""

    def __init__(self, config: "BenchmarkConfig"):
        """Load everything; the Dots of all kinds of method are at hand."""
        from morse.pipeline import load_dot

        self.config = config
        solvers = tuple(dict.fromkeys((*config.solvers, REFERENCE_SOLVER)))
        self.pipelines = load_pipelines(config.pipeline, config.dot, solvers, config.device)
        self.device = self.pipelines[REFERENCE_SOLVER].device
        self.dots: dict[tuple[str, str], object] = {}
        for solver, pipe in self.pipelines.items():
            self.dots[solver, "morse"] = pipe.dot
            self.dots[solver, "reuse"] = reuse_dot
            if config.independent_dot:
                self.dots[solver, "independent"] = load_dot(config.independent_dot).to(pipe.device)

    def speed(self, batch_size: int) -> dict[str, object]:
        """Measure N at `batch_size` in the precision that is sampled in."""
        with self._autocast():
            return measure_speed(self._prepare(REFERENCE_SOLVER, "morse"), batch_size)

    def speed_table(self, batch_sizes: list[int]) -> list[dict[str, object]]:
        """Measure N at each batch size, LoRA merged and not, in that precision."""
        with self._autocast():
            return measure_speed_table(self._prepare(REFERENCE_SOLVER, "morse"), batch_sizes)

    def sample(self, method: Method, steps: int | MorsePlan, seeds: range) -> Samples:
        """Sample with the method's Dot in place, after one batch of two steps to warm up."""
        pipe = self._prepare(method.solver, method.kind)
        batch_size = min(self.config.batch_size, len(seeds))
        with self._autocast():
            warm_up = MorsePlan.from_string("Do") if isinstance(steps, MorsePlan) else 2
            sample_images(pipe, warm_up, seeds[:batch_size], batch_size)
            return sample_images(pipe, steps, seeds, batch_size)

    def _autocast(self) -> AbstractContextManager:
        if self.config.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, AUTOCAST[self.config.mixed_precision])

    def _prepare(self, solver: str, kind: str) -> "MorsePipeline":
        from morse.attach import enable_morse

        pipe = self.pipelines[solver]
        if kind != "baseline":
            enable_morse(pipe, self.dots[solver, kind], merge_lora=self.config.merge_lora)
        return pipe


def measure_cells(config: "BenchmarkConfig", store: CellStore) -> dict[str, object]:
    """Measure each method, budget and seed that `store` lacks.

    Returns:
        What the figures were measured with: device, versions, N, extractor, reference.
    """
    bench = Bench(config)
    deadline = time.monotonic() + (config.max_seconds or math.inf)
    speed = store.once("speed", lambda: _speed(config, bench))
    for seed in config.seeds if not config.latency_only else ():
        _measure_seed(config, store, bench, speed["speed_ratio"], seed, deadline)
    speeds = store.once("speed_table", lambda: _speed_table(config, bench))
    return {
        **environment(bench.device, config.mixed_precision),
        "speed_ratio": speed,
        "speed_ratios": speeds,
        "metric": FRECHET_LABEL,
        "features_sha256": features_sha256(),
        "features_test_accuracy": read_features_config().get("test_accuracy"),
        "real_images": "Fashion-MNIST, 60,000 training images",
        "reference": f"{SOLVERS[REFERENCE_SOLVER]}, {REFERENCE_STEPS} steps, the same noise",
    }


def _speed(config: "BenchmarkConfig", bench: Bench) -> dict[str, object]:
    if config.speed_ratio is not None:
        return {"speed_ratio": config.speed_ratio, "how": "given by --speed_ratio"}
    return bench.speed(config.batch_size)


def _speed_table(config: "BenchmarkConfig", bench: Bench) -> list[dict[str, object]]:
    batch_sizes = [size for size in config.latency_batch_sizes if size > 0]
    return bench.speed_table(batch_sizes)


def _measure_seed(
    config: "BenchmarkConfig",
    store: CellStore,
    bench: Bench,
    speed_ratio: float,
    seed: int,
    deadline: float,
) -> None:
    """Sample and score what is missing of one repetition."""
    from rich.progress import track

    missing = [task for task in config.tasks() if not store.has(*task, seed)]
    if not missing:
        return
    seeds = range(seed, seed + config.num_images)
    reference = store.images(
        f"reference-seed{seed}",
        lambda: bench.sample(Method(REFERENCE_SOLVER), REFERENCE_STEPS, seeds).images,
    )
    classifier = load_features().to(bench.device)
    scorer = Scorer(classifier, load_reference(), reference, config.num_replicates, seed)
    for method, lsd in track(missing, f"seed {seed}"):
        if time.monotonic() > deadline:
            print("max_seconds is over; --resume measures what is missing")
            return
        samples = bench.sample(method, method.plan(lsd, speed_ratio) or lsd, seeds)
        scores = scorer.score(samples.images)
        cell = Cell(
            method=method,
            budget=lsd,
            seed=seed,
            plan=samples.plan,
            num_dash=samples.num_dash,
            num_dot=samples.num_dot,
            lsd=samples.num_dash + samples.num_dot / speed_ratio,
            seconds=samples.seconds,
            fallbacks=samples.fallbacks,
            scores=scores,
        )
        store.add(cell)
        frechet, ratio = scores["frechet"].value, scores["psnr"].value
        print(f"{method.label}, {lsd} LSD: Fréchet {frechet:.3f}, PSNR {ratio:.2f} dB", flush=True)
