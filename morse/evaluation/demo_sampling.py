"""The demo's sampling: N, the reference, and every method at every budget."""

from typing import TYPE_CHECKING

from morse.evaluation.bench.methods import AS_PLANNED, REFERENCE_SOLVER, REFERENCE_STEPS, Method
from morse.evaluation.bench.runs import Samples, sample_images
from morse.evaluation.bench.solvers import SOLVERS
from morse.evaluation.demo_report import Row
from morse.evaluation.features import extract_features, load_features, load_reference
from morse.evaluation.metrics import feature_statistics, frechet_distance, psnr
from morse.plan import MorsePlan
from morse.saved_plans import SavedPlan

if TYPE_CHECKING:
    from rich.progress import Progress

    from morse.calls import SpeedRatio
    from morse.pipeline import MorsePipeline

DEMO_SOLVERS = ("ddim", "dpmsolver++", "leapfrog")
REFERENCE_NAME = f"{SOLVERS[REFERENCE_SOLVER]}, {REFERENCE_STEPS} steps"
Run = tuple[Method, int, Samples]


def measure_warm(pipelines: dict[str, "MorsePipeline"], batch_size: int) -> "SpeedRatio":
    """Measure N on the first pipeline, and run each once so that later timings start warm."""
    first = next(iter(pipelines.values()))
    speed = first.measure_speed_ratio(batch_size=batch_size)
    for pipe in pipelines.values():
        sample_images(pipe, MorsePlan.from_string("Do"), range(batch_size), batch_size)
    return speed


def sample_all(
    pipelines: dict[str, "MorsePipeline"],
    budgets: tuple[int, ...],
    seeds: range,
    speed_ratio: float,
    progress: "Progress",
) -> tuple[Samples, list[Run]]:
    """Sample the reference and every method at every budget, with a progress bar for each.

    Args:
        pipelines: One a solver of `DEMO_SOLVERS`.
        budgets: LSD budgets.
        seeds: One an image; all images make one batch.
        speed_ratio: N, which Morse plans with.
        progress: Where the bars go.
    """

    def sample(solver: str, steps: int | SavedPlan, name: str) -> Samples:
        length = steps if isinstance(steps, int) else len(steps.plan)
        task = progress.add_task(name.ljust(34), total=length)
        return sample_images(
            pipelines[solver], steps, seeds, len(seeds), lambda: progress.advance(task)
        )

    reference = sample(REFERENCE_SOLVER, REFERENCE_STEPS, f"reference: {REFERENCE_NAME}")
    runs = []
    methods = [
        method
        for solver in DEMO_SOLVERS
        for method in (Method(solver), Method(solver, "morse", setting=AS_PLANNED))
    ]
    for lsd in budgets:
        for method in methods:
            steps = method.plan(lsd, speed_ratio, pipelines[method.solver]) or lsd
            name = f"{_short_label(method)}, {lsd} LSD"
            runs.append((method, lsd, sample(method.solver, steps, name)))
    return reference, runs


def _short_label(method: Method) -> str:
    """A method's name, without what goes without saying: that Morse runs as planned."""
    return method.label.removesuffix(f" {AS_PLANNED}")


def measure_rows(reference: Samples, runs: list[Run], speed_ratio: float) -> list[Row]:
    """Turn images into figures: cost, PSNR to the reference, Fréchet distances."""
    classifier, real = load_features(), load_reference()
    target = feature_statistics(extract_features(classifier, reference.images))
    rows = []
    for method, lsd, samples in runs:
        statistics = feature_statistics(extract_features(classifier, samples.images))
        rows.append(
            Row(
                label=_short_label(method),
                solver=method.solver,
                kind=method.kind,
                budget=lsd,
                lsd=samples.num_dash + samples.num_dot / speed_ratio,
                num_dash=samples.num_dash,
                num_dot=samples.num_dot,
                seconds=samples.seconds,
                psnr=float(psnr(samples.images, reference.images).mean()),
                frechet=frechet_distance(*statistics, *real),
                frechet_to_reference=frechet_distance(*statistics, *target),
                plan=samples.plan,
            )
        )
    return rows
