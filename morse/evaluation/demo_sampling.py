"""The demo's sampling: N, the reference, and every method at every budget."""

from typing import TYPE_CHECKING

from torch import Tensor

from morse.evaluation.bench.methods import AS_PLANNED, REFERENCE_SOLVER, REFERENCE_STEPS, Method
from morse.evaluation.bench.runs import Samples, sample_images
from morse.evaluation.bench.solvers import SOLVERS
from morse.evaluation.conditions import call_parameters
from morse.evaluation.demo_report import Row
from morse.evaluation.features import extract_features, load_features, load_reference
from morse.evaluation.metrics import feature_statistics, frechet_distance, psnr
from morse.evaluation.scoring import is_fashion_like
from morse.plan import MorsePlan
from morse.saved_plans import SavedPlan

if TYPE_CHECKING:
    from rich.progress import Progress

    from morse.calls import SpeedRatio
    from morse.pipeline import MorsePipeline

DEMO_SOLVERS = ("ddim", "dpmsolver++", "leapfrog")
REFERENCE_NAME = f"{SOLVERS[REFERENCE_SOLVER]}, {REFERENCE_STEPS} steps"
Run = tuple[Method, int, Samples]


def check_demo(pipe: "MorsePipeline", name: str) -> None:
    """Raise ValueError for a pipeline that does not sample from noise alone."""
    parameters = call_parameters(pipe)
    asked = [each for each in ("prompt", "class_labels") if each in parameters]
    if asked:
        raise ValueError(
            f"pipeline is {name!r}, which takes {asked[0]}; the demo samples from noise alone. "
            "Use `morse bench` with --prompts or --class_names"
        )


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
    """Turn images into figures: cost, PSNR to the reference, and of Fashion-MNIST's the distances.

    The reference itself has neither PSNR nor a distance to itself.
    """
    distances = _Distances(reference.images) if is_fashion_like(reference.images) else None
    rows = []
    for method, lsd, samples in runs:
        real, to_reference = (None, None) if distances is None else distances(samples.images)
        is_reference = method.is_reference(lsd)
        fidelity = None if is_reference else float(psnr(samples.images, reference.images).mean())
        rows.append(
            Row(
                label=_short_label(method),
                solver=method.solver,
                kind=method.kind,
                budget=lsd,
                lsd=samples.spent(speed_ratio),
                num_dash=samples.num_dash,
                num_dot=samples.num_dot,
                seconds=samples.seconds,
                psnr=fidelity,
                frechet=real,
                frechet_to_reference=None if is_reference else to_reference,
                plan=samples.plan,
            )
        )
    return rows


class _Distances:
    """Fréchet distances of images to the real ones and to the reference's."""

    def __init__(self, reference: Tensor) -> None:
        self.classifier, self.real = load_features(), load_reference()
        self.target = self._statistics(reference)

    def __call__(self, images: Tensor) -> tuple[float, float]:
        statistics = self._statistics(images)
        return tuple(frechet_distance(*statistics, *each) for each in (self.real, self.target))

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return feature_statistics(extract_features(self.classifier, images))
