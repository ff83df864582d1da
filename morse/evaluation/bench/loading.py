"""Loads a pipeline once and makes one of it for each solver."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from morse.evaluation.bench.solvers import make_solver
from morse.evaluation.environment import resolve_device

if TYPE_CHECKING:
    from morse.evaluation.bench.solver_pipeline import SolverPipeline
    from morse.pipeline import MorsePipeline


def load_pipelines(
    pipeline: str, dot: str | None, solvers: tuple[str, ...], device: str
) -> dict[str, "MorsePipeline"]:
    """Load one pipeline a solver, quiet, on `device`; all share one Dash and one Dot.

    Args:
        pipeline: "fashion-mnist" or a folder with an unconditional pipeline of pixels.
        dot: A Dot's folder; None for the one that comes with the pipeline.
        solvers: Keys of `SOLVERS`.
        device: A torch device, or "auto" for a GPU where there is one.

    Returns:
        Morse pipelines whose class is `SolverPipeline`.

    Raises:
        ValueError: If the device is unknown, or the pipeline has no Dot or other components.
    """
    from morse.pipeline import MorsePipeline

    torch_device = resolve_device(device)
    with _quiet_loading():
        loaded = MorsePipeline.from_pretrained(pipeline, dot=dot).to(torch_device)
    others = sorted(set(loaded.components) - {"unet", "scheduler", "dot"})
    if others:
        raise ValueError(
            f"pipeline {pipeline!r} has {others}; use one with a unet and a scheduler alone"
        )
    if loaded.dot is None:
        raise ValueError(
            f"pipeline {pipeline!r} has no Dot; give one with --dot, or train one with "
            "`morse train-dot`"
        )
    if torch_device.type == "cuda":  # the layout that its convolutions want
        for model in (loaded.unet, loaded.dot):
            model.to(memory_format=torch.channels_last)
    config = loaded.scheduler.config
    return {
        solver: MorsePipeline.from_pipe(make_pipeline(loaded.unet, solver, config), loaded.dot)
        for solver in solvers
    }


def make_pipeline(
    unet: torch.nn.Module, solver: str, config: dict[str, object]
) -> "SolverPipeline":
    """Make a bare, quiet pipeline of a network and a solver in `SOLVERS`.

    Args:
        unet: Dash, or what takes its place.
        solver: A key of `SOLVERS`.
        config: The config of the scheduler that Dash was trained with.
    """
    from morse.evaluation.bench.solver_pipeline import SolverPipeline

    pipe = SolverPipeline(unet=unet, scheduler=make_solver(solver, config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
