"""Sampling the same noise with each method at each budget, as the demo and the benchmark do."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from morse.evaluation.environment import resolve_device
from morse.plan import MorsePlan

if TYPE_CHECKING:
    from morse.pipeline import MorsePipeline

SOLVERS = {"ddim": "DDIM", "dpmsolver++": "DPM++ 2M", "unipc": "UniPC"}
REFERENCE_SOLVER, REFERENCE_STEPS = "dpmsolver++", 100
KINDS = {"baseline": "", "morse": "Morse-", "reuse": "Reuse-", "independent": "Independent-"}
Kind = Literal["baseline", "morse", "reuse", "independent"]


@dataclass(frozen=True)
class Method:
    """A way of spending a budget.

    Attributes:
        solver: A key of `SOLVERS`.
        kind: "baseline": Dash alone. "morse": Dash and Dot. Two controls run Morse's plan, counted
            as if they had its cost: "reuse" repeats Dash's latest estimate where Dot would correct
            it, "independent" has a network of Dot's size estimate alone, from the sample only.
        ratio: Evaluations per LSD that the plan aims at (see `MorsePlan.from_budget`).
    """

    solver: str
    kind: Kind = "baseline"
    ratio: float = 1.0

    def is_reference(self, budget: int) -> bool:
        """Tell whether this method at `budget` is what fidelity is measured against."""
        return (self.kind, self.solver, budget) == ("baseline", REFERENCE_SOLVER, REFERENCE_STEPS)

    @property
    def label(self) -> str:
        """A short name, such as "DDIM" or "Morse-DDIM r2"."""
        name = KINDS[self.kind] + SOLVERS[self.solver]
        return name if self.kind == "baseline" else f"{name} r{self.ratio:g}"

    def plan(self, lsd: int, speed_ratio: float) -> MorsePlan | None:
        """Return what to run within `lsd`; None for the bare pipeline with `lsd` steps."""
        if self.kind == "baseline":
            return None
        return MorsePlan.from_budget(lsd, speed_ratio, self.ratio)


@dataclass(frozen=True)
class Samples:
    """Images of one method at one budget, and what they cost.

    Attributes:
        images: (N, C, H, W) in [0, 1], float32, on the CPU.
        num_dash: Dash evaluations an image.
        num_dot: Dot evaluations an image.
        seconds: Wall time for all N, from noise to pixels.
        plan: Which evaluations were Dash's, "DooDoo"; "" for the bare pipeline.
        fallbacks: Why Dash ran where Dot should have, and how often; {} if all went to plan.
    """

    images: Tensor
    num_dash: int
    num_dot: int
    seconds: float
    plan: str
    fallbacks: dict[str, int]


def sample_images(
    pipe: "MorsePipeline",
    steps: int | MorsePlan,
    seeds: range,
    batch_size: int,
    on_step: Callable[[], object] | None = None,
) -> Samples:
    """Sample one image a seed; neither batch size nor device changes the noise it starts from.

    Args:
        pipe: A pipeline without text or class input.
        steps: The bare pipeline's number of steps, or Morse's plan.
        seeds: The seed of each image's own CPU generator.
        batch_size: Images at a time.
        on_step: Called after each step of each batch, for progress bars.
    """
    planned = isinstance(steps, MorsePlan)
    settings = {"plan": steps} if planned else {"num_inference_steps": steps}
    parts, run = [], None
    start = time.perf_counter()
    with _step_callback(pipe, on_step):
        for first in range(0, len(seeds), batch_size):
            chunk = seeds[first : first + batch_size]
            generators = [torch.Generator().manual_seed(seed) for seed in chunk]
            output = pipe(batch_size=len(chunk), generator=generators, output_type="np", **settings)
            parts.append(torch.from_numpy(output.images).permute(0, 3, 1, 2).float())
            run = pipe.last_run if planned else None
    seconds = time.perf_counter() - start
    images = torch.cat(parts)
    if run is None:
        return Samples(images, int(steps), 0, seconds, "", {})
    return Samples(images, run.num_dash, run.num_dot, seconds, str(steps), dict(run.fallbacks))


@contextmanager
def _step_callback(pipe: "MorsePipeline", on_step: Callable[[], object] | None) -> Iterator[None]:
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


def reuse_dot(sample: Tensor, timestep: Tensor, jump: object) -> Tensor:
    """Stand in for Dot with no correction at all: the control "reuse without Dot"."""
    return torch.zeros_like(sample)


def load_pipelines(
    pipeline: str, dot: str | None, solvers: tuple[str, ...], device: str
) -> dict[str, "MorsePipeline"]:
    """Load one pipeline a solver, quiet, on `device`.

    Args:
        pipeline: "fashion-mnist" or a folder.
        dot: A Dot's folder; None for the one that comes with the pipeline.
        solvers: Keys of `SOLVERS`.
        device: A torch device, or "auto" for a GPU where there is one.

    Raises:
        ValueError: If the device is unknown, or the pipeline has no Dot.
    """
    from morse.pipeline import MorsePipeline

    pipelines, torch_device = {}, resolve_device(device)
    for solver in solvers:
        with _quiet_loading():
            pipe = MorsePipeline.from_pretrained(pipeline, dot=dot, scheduler=solver)
            pipe.to(torch_device)
        if torch_device.type == "cuda":  # the layout that its convolutions want
            for model in filter(None, (pipe.unet, pipe.dot)):
                model.to(memory_format=torch.channels_last)
        if pipe.dot is None:
            raise ValueError(
                f"pipeline {pipeline!r} has no Dot; give one with --dot, or train one with "
                "`morse train-dot`"
            )
        pipe.set_progress_bar_config(disable=True)
        pipelines[solver] = pipe
    return pipelines


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep diffusers' notes and bars out of our own progress display."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def check_solvers(solvers: tuple[str, ...]) -> None:
    """Raise ValueError for a solver that is not in `SOLVERS`."""
    for solver in solvers:
        if solver not in SOLVERS:
            raise ValueError(f"solver {solver!r} is unknown, choose from {list(SOLVERS)}")
