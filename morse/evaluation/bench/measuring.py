"""The benchmark's sampling: fills a store with one cell a method, budget and seed."""

import math
import time
from typing import TYPE_CHECKING

from morse.evaluation.bench.grid import COLUMNS, grid_budgets, strip_png
from morse.evaluation.bench.runs import REFERENCE_SOLVER, REFERENCE_STEPS, Method, Samples
from morse.evaluation.bench.sampler import Bench
from morse.evaluation.bench.solvers import SOLVERS
from morse.evaluation.bench.store import Cell, CellStore
from morse.evaluation.environment import environment
from morse.evaluation.features import (
    features_sha256,
    load_features,
    load_reference,
    read_features_config,
)
from morse.evaluation.metrics import FRECHET_LABEL
from morse.evaluation.scoring import Scorer

if TYPE_CHECKING:
    from morse.evaluation.bench.config import BenchmarkConfig

Task = tuple[Method, int]


def measure_cells(config: "BenchmarkConfig", store: CellStore) -> dict[str, object]:
    """Measure each method, budget and seed that `store` lacks.

    Args:
        config: Settings without gaps (`BenchmarkConfig.resolved`).
        store: Where finished cells are kept.

    Returns:
        What the figures were measured with (device, versions, N, extractor, reference), "grid"
        and "not_measured".
    """
    bench = Bench(config)
    deadline = time.monotonic() + (config.max_seconds or math.inf)
    batch_sizes = [size for size in config.latency_batch_sizes if size > 0]
    if config.compile:  # before they are compiled, for comparison
        store.once("speed_table", lambda: bench.speed_table(batch_sizes))
        bench.compile()
    speed = store.once("speed", lambda: _speed(config, bench))
    for seed in config.seeds if not config.latency_only else ():
        _measure_seed(config, store, bench, speed["speed_ratio"], seed, deadline)
    speeds = store.once("speed_table", lambda: bench.speed_table(batch_sizes))
    if config.compile:
        speeds += store.once(
            "speed_table_compiled", lambda: bench.speed_table(batch_sizes, (True,))
        )
    return {
        **environment(bench.device, config.mixed_precision),
        "speed_ratio": speed,
        "speed_ratios": speeds,
        "metric": FRECHET_LABEL,
        "features_sha256": features_sha256(),
        "features_test_accuracy": read_features_config().get("test_accuracy"),
        "real_images": "Fashion-MNIST, 60,000 training images",
        "reference": f"{SOLVERS[REFERENCE_SOLVER]}, {REFERENCE_STEPS} steps, the same noise",
        "grid": _grid(config, store),
        "not_measured": _not_measured(config, store, bench),
    }


def _speed(config: "BenchmarkConfig", bench: Bench) -> dict[str, object]:
    if config.speed_ratio is not None:
        return {"speed_ratio": config.speed_ratio, "how": "given by --speed_ratio"}
    return bench.speed()


def _not_measured(config: "BenchmarkConfig", store: CellStore, bench: Bench) -> list[str]:
    """List methods that can't be measured, with the reason, and cells that time ran out for."""
    lines = []
    kinds = {method.kind for method, _ in config.tasks()}
    for peer in sorted(set(config.chosen_peers) - kinds):
        lines.append(f"{peer}: {bench.peer_obstacle(peer) or 'not a method of this run'}")
    for method, budget in config.tasks():
        reason = bench.obstacle(method)
        if reason is not None:
            lines.append(f"{method.label}: {reason}")
        elif not all(store.has(method, budget, seed) for seed in config.seeds):
            lines.append(f"{method.label}, {budget} LSD")
    return list(dict.fromkeys(lines))


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
    missing = [task for task in missing if bench.obstacle(task[0]) is None]
    if not missing:
        return
    seeds = range(seed, seed + config.num_images)

    def sample(method: Method, budget: int, seeds: range = seeds) -> Samples:
        peer = None
        if method.kind == "deepcache":
            name = f"deepcache-{method.setting.replace(' ', '-')}"
            peer = store.once(name, lambda: bench.measure_peer(method))
        return bench.sample(method, budget, seeds, speed_ratio, peer)

    reference = store.images(
        reference_name(seed),
        lambda: (
            sample(
                Method(REFERENCE_SOLVER), REFERENCE_STEPS, seeds[: config.num_reference_images]
            ).images
        ),
    )
    scorer = Scorer(load_features().to(bench.device), load_reference(), reference)
    store.features(reference_name(seed), lambda: scorer.reference_features)
    for method, budget in track(missing, f"seed {seed}"):
        if time.monotonic() > deadline:
            print("max_seconds is over; --resume measures what is missing")
            return
        samples = sample(method, budget)
        _keep(store, scorer, (method, budget), seed, samples, speed_ratio)


def _keep(
    store: CellStore, scorer: Scorer, task: Task, seed: int, samples: Samples, speed_ratio: float
) -> None:
    """Score what was sampled, and put the figures and a strip of images into the store."""
    method, budget = task
    store.once(_strip_name(task, seed), lambda: strip_png(samples.images))
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
    )
    store.add(cell)
    frechet, ratio = scorer.frechet(scores), float(scores.psnr.mean())
    figures = f"Fréchet {frechet:.3f}, PSNR {ratio:.2f} dB, {samples.seconds:.1f} s"
    print(f"{method.label}, {budget} LSD: {figures}", flush=True)
    if samples.note:
        print(f"  {samples.note}", flush=True)


def reference_name(seed: int) -> str:
    """Return the name that the reference of a repetition has in the store."""
    return f"reference-seed{seed}"


def _strip_name(task: Task, seed: int) -> str:
    name = f"strip-{task[0].label}-lsd{task[1]}-seed{seed}"
    return name.replace("+", "p").replace(" ", "-")


def _grid(config: "BenchmarkConfig", store: CellStore) -> dict[str, object] | None:
    """Collect strips of images, the reference's first; None where nothing was sampled."""
    seed, budgets = config.seeds[0], grid_budgets(config.lsd)
    chosen = [task for task in config.tasks() if task[1] in budgets and store.has(*task, seed)]
    if not chosen:
        return None
    # The store holds all of them, since it holds these cells.
    reference = strip_png(store.images(reference_name(seed), list))
    label = f"{SOLVERS[REFERENCE_SOLVER]}, {REFERENCE_STEPS} LSD"
    rows = [{"label": label, "png_base64": reference}]
    for method, budget in sorted(chosen, key=lambda task: task[1]):
        png = store.once(_strip_name((method, budget), seed), str)
        rows.append({"label": f"{method.label}, {budget} LSD", "png_base64": png})
    count = min(COLUMNS, config.num_images)
    return {"seeds": list(range(seed, seed + count)), "rows": rows}
