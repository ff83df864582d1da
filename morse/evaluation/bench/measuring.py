"""The benchmark's sampling: fills a store with one cell a method, budget and seed."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from morse.evaluation.bench.feature_space import FeatureSpace
from morse.evaluation.bench.grid import image_grid, strip_name, strip_png
from morse.evaluation.bench.methods import REFERENCE_SOLVER, REFERENCE_STEPS, Method
from morse.evaluation.bench.runs import Samples, reference_images
from morse.evaluation.bench.sampler import WARM_UP, Bench
from morse.evaluation.bench.solvers import SOLVERS
from morse.evaluation.bench.store import Cell, CellStore, reference_name
from morse.evaluation.bench.tasks import PEER_SETTINGS
from morse.evaluation.conditions import Conditions
from morse.evaluation.environment import environment
from morse.evaluation.scoring import Scorer
from morse.evaluation.stats.lossless import margins_left_over

if TYPE_CHECKING:
    from morse.evaluation.bench.config import BenchmarkConfig

Task = tuple[Method, int]


@dataclass(frozen=True)
class Part:
    """What is measured at one guidance scale, or all of it where there is none.

    Attributes:
        config: Settings without gaps (`BenchmarkConfig.resolved`).
        store: Where finished cells are kept.
        bench: The loaded pipelines.
        conditions: What images are of.
        space: What sets of images are compared in.
        deadline: By `time.monotonic`: no measurement begins later.
    """

    config: "BenchmarkConfig"
    store: CellStore
    bench: Bench
    conditions: Conditions
    space: FeatureSpace
    deadline: float = math.inf

    @property
    def is_over(self) -> bool:
        """Whether no measurement may begin any more."""
        return time.monotonic() > self.deadline

    def references(self) -> dict[int, Tensor]:
        """Return the features of the reference's images, (R, D), of each seed that was begun."""
        return {
            seed: self.store.features(reference_name(seed), Tensor)
            for seed in self.config.seeds
            if self.store.has_features(reference_name(seed))
        }


def _measure_table(part: Part, *merged: bool) -> list[dict[str, object]]:
    batch_sizes = [size for size in part.config.latency_batch_sizes if size > 0]
    return part.bench.speed_table(batch_sizes, part.conditions, merged)


def hasten_after_tables(parts: Sequence[Part]) -> None:
    """Measure the tables of N of all parts eager, for comparison, and hasten the models then."""
    for part in parts:
        part.store.once("speed_table", lambda part=part: _measure_table(part, True, False))
    parts[0].bench.hasten()


def measure_cells(part: Part) -> dict[str, object]:
    """Measure each method, budget and seed that the store lacks.

    Returns:
        "speed_ratio" (N), "speed_ratios", "grid" and "not_measured".
    """
    config, store, mode = part.config, part.store, part.bench.mode
    speed = store.once("speed", lambda: _speed(part))
    for seed in config.seeds if not config.latency_only else ():
        _measure_seed(part, speed["speed_ratio"], seed)
    speeds, tables = [], {"speed_table": (True, False)}
    if mode != "eager":
        tables[f"speed_table_{mode}"] = (True,)
    for name, merged in tables.items():
        if part.is_over and not store.knows(name):
            print("max_seconds is over; --resume measures what is missing")
            break
        speeds += store.once(name, lambda merged=merged: _measure_table(part, *merged))
    return {
        "speed_ratio": speed,
        "speed_ratios": speeds,
        "grid": image_grid(config, store),
        "not_measured": _not_measured(part),
        "seeds_left_out": compared_seeds(part)[1],
    }


def compared_seeds(part: Part) -> tuple[list[int], list[dict[str, int]]]:
    """Choose the repetitions that figures are made of, as only what all methods have compares.

    Returns:
        The seeds with every cell that any of them has, or the one that has most; and the others,
        each as {"seed": ..., "missing": how many cells}.
    """
    has, seeds = part.store.has, dict.fromkeys(part.config.seeds)
    tasks = [task for task in part.config.tasks() if any(has(*task, seed) for seed in seeds)]
    missing = {seed: sum(not has(*task, seed) for task in tasks) for seed in seeds}
    complete = [seed for seed in seeds if not missing[seed]]
    chosen = complete or [min(seeds, key=missing.get)]
    return chosen, [
        {"seed": seed, "missing": missing[seed]} for seed in seeds if seed not in chosen
    ]


def conditions_facts(part: Part) -> dict[str, object]:
    """Tell what every part's figures were measured with: device, versions, extractor, reference."""
    facts = {
        **environment(part.bench.device, part.config.mixed_precision, part.config.dtype),
        "pipeline_class": part.bench.pipeline_class,
        "reference": f"{SOLVERS[REFERENCE_SOLVER]}, {REFERENCE_STEPS} steps, the same noise",
    }
    num_features = max((each.shape[1] for each in part.references().values()), default=0)
    return facts | part.space.facts(num_features)


def _speed(part: Part) -> dict[str, object]:
    if part.config.speed_ratio is not None:
        return {"speed_ratio": part.config.speed_ratio, "how": "given by --speed_ratio"}
    return part.bench.speed(part.conditions)


def _not_measured(part: Part) -> list[str]:
    """List methods that can't be measured, with the reason, and cells that time ran out for.

    Seeds that no figure is made of are told of by themselves (`compared_seeds`).
    """
    lines, store, (seeds, _) = [], part.store, compared_seeds(part)
    for method, budget in part.config.tasks():
        reason = part.bench.obstacle(method) or _peer_error(store, method)
        if reason is not None:
            applies = not reason.startswith("not applicable")
            lines.append(f"{method.label if applies else method.kind}: {reason}")
        elif not all(store.has(method, budget, seed) for seed in seeds):
            lines.append(f"{method.label}, {budget} LSD")
    return list(dict.fromkeys(lines))


def _peer_error(store: CellStore, method: Method) -> str | None:
    """Tell what a peer raised when it was tried out; None if nothing, or it was not tried."""
    if method.kind not in PEER_SETTINGS or not store.knows(_peer_name(method)):
        return None
    return store.once(_peer_name(method), dict).get("error")


def _measure_seed(part: Part, speed_ratio: float, seed: int) -> None:
    """Sample and score what is missing of one repetition."""
    from rich.progress import track

    config, store, bench = part.config, part.store, part.bench
    missing = [task for task in config.tasks() if not store.has(*task, seed)]
    missing = [task for task in missing if bench.obstacle(task[0]) is None]
    if not missing or part.is_over:
        return
    seeds = range(seed, seed + config.num_images)

    def sample_reference() -> Tensor:
        few, method = seeds[: config.num_reference_images], Method(REFERENCE_SOLVER)
        tried = bench.sample(method, WARM_UP, few[:1], speed_ratio, part.conditions)
        part.space.check(tried.images)
        samples = bench.sample(method, REFERENCE_STEPS, few, speed_ratio, part.conditions)
        return reference_images(samples)

    reference = store.images(reference_name(seed), sample_reference)
    scorer = part.space.scorer(reference)
    features = store.features(reference_name(seed), lambda: scorer.reference_features)
    if words := margins_left_over(config.lossless_delta, part.space.axes_measured(features)):
        print(words)  # before the methods are sampled
    scale = part.conditions.guidance_scale
    at = "" if scale is None else f", guidance {scale:g}"
    for method, budget in track(missing, f"seed {seed}{at}"):
        if part.is_over:
            return
        peer = None
        if method.kind in PEER_SETTINGS:
            peer = store.once(
                _peer_name(method), lambda m=method: bench.measure_peer(m, part.conditions)
            )
            if "error" in peer:
                continue
        samples = bench.sample(method, budget, seeds, speed_ratio, part.conditions, peer)
        _keep(store, scorer, (method, budget), seed, samples, speed_ratio)


def _peer_name(method: Method) -> str:
    """Return the name of what was measured of a peer; DeepCache's cost is any solver's."""
    solver = "" if method.kind == "deepcache" else f"{method.solver}-"
    return f"{method.kind}-{solver}{method.setting}".replace(" ", "-").replace("+", "p")


def _keep(
    store: CellStore, scorer: Scorer, task: Task, seed: int, samples: Samples, speed_ratio: float
) -> None:
    """Score what was sampled, and put the figures and a strip of images into the store."""
    method, budget = task
    store.once(strip_name(*task, seed), lambda: strip_png(samples.images))
    scores = scorer.score(samples.images)
    cell = Cell(
        method=method,
        budget=budget,
        seed=seed,
        plan=samples.plan,
        num_dash=samples.num_dash,
        num_dot=samples.num_dot,
        lsd=samples.spent(speed_ratio),
        seconds=samples.seconds,
        fallbacks=samples.fallbacks,
        scores=scores,
        engaged=samples.engaged,
        note=samples.note,
        peak_memory_mib=samples.peak_memory_mib,
        batch_seconds=samples.quartiles,
        scheduler_options=samples.scheduler_options,
    )
    store.add(cell)
    figures = f"{scorer.summary(scores)}, {samples.seconds:.1f} s"
    print(f"{method.label}, {budget} LSD: {figures}", flush=True)
    if samples.note:
        print(f"  {samples.note}", flush=True)
