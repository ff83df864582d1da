"""Sampling the same noise with each method at each budget, as the demo and the benchmark do."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morse.evaluation.conditions import UNCONDITIONAL, Conditions
from morse.plan import MorsePlan
from morse.saved_plans import SavedPlan, scheduler_options
from morse.steps import find_exact_steps
from morse.summary import quartiles

if TYPE_CHECKING:
    from morse.evaluation.bench.solver_pipeline import SolverPipeline
    from morse.pipeline import MorsePipeline


@dataclass(frozen=True)
class Samples:
    """Images of one method at one budget, and what they cost.

    Attributes:
        images: (N, C, H, W) in [0, 1], float32, on the CPU.
        num_dash: Dash evaluations an image, on average.
        num_dot: Dot evaluations an image, on average.
        seconds: Wall time for all N, from noise, and where there is one the text, to pixels.
        plan: Which evaluations were Dash's, "DooDoo"; "" where Dash makes all.
        fallbacks: Why Dash ran where Dot should have, and how often in all batches; {} if all went
            to plan.
        batch_seconds: Wall time of each batch; the last may be smaller than the others.
        batch_size: Images of a full batch.
        peak_memory_mib: Most memory allocated while sampling, in MiB; None except on CUDA.
        lsd: Cost, where it is not one LSD a Dash and 1/N a Dot evaluation.
        engaged: Whether the method did anything that the bare pipeline does not.
        note: What a reader of the figures should know; "" for nothing.
        num_broken: How many images were not finite; they are black.
        scheduler_options: What a saved plan set of the scheduler's options, to lay its steps.
    """

    images: Tensor
    num_dash: float
    num_dot: float
    seconds: float
    plan: str
    fallbacks: dict[str, int]
    batch_seconds: tuple[float, ...] = ()
    batch_size: int = 0
    peak_memory_mib: float | None = None
    lsd: float | None = None
    engaged: bool = True
    note: str = ""
    num_broken: int = 0
    scheduler_options: dict[str, object] = field(default_factory=dict)

    def spent(self, speed_ratio: float) -> float:
        """Return the cost in LSD where Dot is `speed_ratio` times as fast as Dash."""
        return self.num_dash + self.num_dot / speed_ratio if self.lsd is None else self.lsd

    @property
    def quartiles(self) -> tuple[float, float, float] | None:
        """Quartiles of the full batches' seconds; None for fewer than two."""
        full = self.batch_seconds[: len(self.images) // max(self.batch_size, 1)]
        if len(full) < 2:
            return None
        return tuple(quartiles(full))


def sample_images(
    pipe: "MorsePipeline | SolverPipeline",
    steps: int | MorsePlan | SavedPlan,
    seeds: range,
    batch_size: int,
    on_step: Callable[[], object] | None = None,
    conditions: Conditions = UNCONDITIONAL,
) -> Samples:
    """Sample one image a seed; neither batch size nor device changes the noise it starts from.

    Args:
        pipe: A pipeline of `load_pipelines`.
        steps: The bare pipeline's number of evaluations, or Morse's plan, with a grid or without.
        seeds: The seed of each image's own CPU generator.
        batch_size: Images at a time.
        on_step: Called after each step of each batch, for progress bars.
        conditions: What each image is of; image 0 is that of the first seed.

    Raises:
        ValueError: If the pipeline's scheduler can't make so many evaluations.
    """
    settings, options, grid = _call_settings(pipe, steps)
    planned = "plan" in settings
    images, num_broken, batch_seconds, runs = None, 0, [], []
    on_cuda = pipe.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(pipe.device)
    start = time.perf_counter()
    with _step_callback(pipe, on_step), scheduler_options(pipe, options):
        for first in range(0, len(seeds), batch_size):
            began = time.perf_counter()
            chunk = seeds[first : first + batch_size]
            generators = [torch.Generator().manual_seed(seed) for seed in chunk]
            wanted = conditions.arguments(range(first, first + len(chunk)))
            output = pipe(generator=generators, output_type="np", **wanted, **settings)
            # Pixels on the CPU: the device has finished.
            batch_seconds.append(time.perf_counter() - began)
            found = torch.from_numpy(output.images).permute(0, 3, 1, 2)
            if images is None:  # at once, for 5,000 large ones fill much of a machine's memory
                images = torch.empty(len(seeds), *found.shape[1:])
            images[first : first + len(chunk)], broken = _finite(found.float())
            num_broken += broken
            if planned:
                runs.append(pipe.last_run)
    broken = f"{num_broken} images are not finite and are scored as black ones"
    return Samples(
        images=images,
        num_dash=_mean_count([run.num_dash for run in runs], batch_size, len(seeds), steps),
        num_dot=_mean_count([run.num_dot for run in runs], batch_size, len(seeds), 0),
        seconds=time.perf_counter() - start,
        plan=str(settings.get("plan", "")),
        fallbacks=dict(sum((run.fallbacks for run in runs), Counter())),
        batch_seconds=tuple(batch_seconds),
        batch_size=batch_size,
        peak_memory_mib=torch.cuda.max_memory_allocated(pipe.device) / 2**20 if on_cuda else None,
        note="; ".join(filter(None, (grid, broken if num_broken else ""))),
        num_broken=num_broken,
        scheduler_options=options,
    )


def _call_settings(
    pipe: "MorsePipeline | SolverPipeline", steps: int | MorsePlan | SavedPlan
) -> tuple[dict[str, object], dict[str, object], str]:
    """Return arguments of a call, options of the scheduler, and what a reader should know of them.

    Raises:
        ValueError: If the pipeline's scheduler can't make so many evaluations.
    """
    if isinstance(steps, SavedPlan):
        settings = {"plan": MorsePlan.from_string(steps.plan)}
        return settings, dict(steps.scheduler), steps.grid
    if isinstance(steps, MorsePlan):
        return {"plan": steps}, {}, ""
    return {"num_inference_steps": find_exact_steps(pipe, {}, steps)}, {}, ""


def _mean_count(counts: list[int], batch_size: int, total: int, bare: int) -> float:
    """Average batches' counts over images, as the last may fall back where the others do not."""
    if not counts:
        return bare
    last = total - (len(counts) - 1) * batch_size
    mean = (batch_size * sum(counts[:-1]) + last * counts[-1]) / total
    return int(mean) if mean == int(mean) else mean


def reference_images(samples: Samples) -> Tensor:
    """Give the images that others are compared with.

    Raises:
        ValueError: If some are not finite: whatever failed alike would seem to be perfect.
    """
    if samples.num_broken:
        raise ValueError(
            f"{samples.num_broken} of the {len(samples.images)} reference images are not finite; "
            "compute in float32, or in bfloat16 instead of float16 (--mixed_precision, --dtype)"
        )
    return samples.images


def _finite(images: Tensor) -> tuple[Tensor, int]:
    """Replace images that are not finite, so that a broken solver gets bad scores, not none."""
    broken = ~images.isfinite().flatten(1).all(dim=1)
    if broken.any():
        images = torch.where(broken[:, None, None, None], torch.zeros_like(images), images)
    return images, int(broken.sum())


@contextmanager
def _step_callback(
    pipe: "MorsePipeline | SolverPipeline", on_step: Callable[[], object] | None
) -> Iterator[None]:
    """Call `on_step` after each step that `pipe` takes from its own progress bar."""

    def ticking(iterable: object = None, total: int | None = None) -> object:
        return nullcontext() if iterable is None else _ticks(iterable, on_step)

    if on_step is None:
        yield
        return
    pipe.progress_bar = ticking
    try:
        yield
    finally:
        del pipe.progress_bar


def _ticks(iterable: object, on_step: Callable[[], object]) -> Iterator[object]:
    for item in iterable:
        yield item
        on_step()
