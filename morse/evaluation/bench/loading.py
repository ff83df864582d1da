"""Loads a pipeline once and makes one of it for each solver."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from morse.denoisers import find_denoiser
from morse.evaluation.bench.solvers import make_solver
from morse.evaluation.conditions import check_starts_from_noise
from morse.evaluation.environment import resolve_device
from morse.rates import is_flow

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from morse.dot import MorseDot
    from morse.evaluation.bench.solver_pipeline import SolverPipeline
    from morse.pipeline import MorsePipeline

_LARGE_LATENTS = 64  # of images of 512 pixels, for most autoencoders


def load_pipelines(
    pipeline: str,
    dot: str | None,
    solvers: tuple[str, ...],
    device: str,
    needs_dot: bool = True,
    dtype: torch.dtype = torch.float32,
    merge_lora: bool = True,
) -> dict[str, "MorsePipeline"]:
    """Load one pipeline a solver, quiet, on `device`; all share one Dash and one Dot.

    Args:
        pipeline: As for `load_bare`, like `dot` and `device`.
        dot: See there.
        solvers: Keys of `SOLVERS`.
        device: See there.
        needs_dot: See there.
        dtype: See there.
        merge_lora: See `morse.enable_morse`.

    Returns:
        Morse pipelines: `SolverPipeline`s where there is a unet and a scheduler alone, else of the
        folder's own class.
    """
    from morse.pipeline import MorsePipeline

    bare, loaded_dot = load_bare(pipeline, dot, device, needs_dot, dtype)
    return {
        solver: MorsePipeline.from_pipe(
            with_solver(bare, solver), loaded_dot, merge_lora=merge_lora
        )
        for solver in solvers
    }


def load_bare(
    pipeline: str,
    dot: str | None,
    device: str,
    needs_dot: bool = True,
    dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
) -> tuple["DiffusionPipeline", "MorseDot | None"]:
    """Load a pipeline without Morse in which every solver works, and its Dot, on `device`.

    Args:
        pipeline: "fashion-mnist", or a folder or hub id of a pipeline that starts from noise alone,
            or from noise and prompts or classes. A safety checker is left out: it would paint over
            images.
        dot: A Dot's folder or hub id; None for the one that comes with the pipeline.
        device: A torch device, or "auto" for a GPU where there is one.
        needs_dot: Whether to refuse a pipeline without a Dot.
        dtype: Of all networks, or by component as diffusers takes it.

    Raises:
        ValueError: If the device is unknown, or the pipeline has no Dot though one is needed, or is
            of another kind.
    """
    from morse.attach import disable_morse
    from morse.pipeline import MorsePipeline

    torch_device = resolve_device(device)
    with _quiet_loading():
        # Else text encoders come in the precision that they were saved in, and others in float32.
        loaded = MorsePipeline.from_pretrained(pipeline, dot=dot, dtype=dtype).to(torch_device)
    if loaded.dot is None and needs_dot:
        raise ValueError(
            f"pipeline {pipeline!r} has no Dot; give one with --dot, or train one with "
            "`morse train-dot`"
        )
    loaded_dot = loaded.dot
    bare = _bare_pipeline(disable_morse(loaded), pipeline)
    for model in filter(None, (find_denoiser(bare), loaded_dot)):
        use_fast_layout(model, torch_device)
    return bare, loaded_dot


def use_fast_layout(model: torch.nn.Module, device: torch.device) -> None:
    """Lay out weights as the device's convolutions are fastest, so that no method is held back.

    On a CPU the embedded Dash takes a fifth to a third less time with them.
    """
    if device.type in ("cuda", "cpu"):
        model.to(memory_format=torch.channels_last)


def _bare_pipeline(bare: "DiffusionPipeline", name: str) -> "DiffusionPipeline":
    scheduler = bare.scheduler
    if not (hasattr(scheduler, "alphas_cumprod") or is_flow(scheduler)):
        raise ValueError(
            f"pipeline {name!r} has a {type(scheduler).__name__}, but the benchmark's solvers are "
            "for models that were trained with a noise schedule of alphas or by flow matching"
        )
    if set(bare.components) == {"unet", "scheduler"}:
        return make_pipeline(bare.unet, "ddim", scheduler.config)
    check_starts_from_noise(bare, name)
    if getattr(bare, "vae", None) is not None:
        decode_in_full(bare.vae)
    drop_safety_checker(bare)
    bare.set_progress_bar_config(disable=True)
    return bare


def drop_safety_checker(pipe: "DiffusionPipeline") -> None:
    """Leave out a pipeline's safety checker, if any; what it blacks out would be measured."""
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.register_modules(safety_checker=None)


def decode_in_full(vae: torch.nn.Module) -> None:
    """Keep autocast out of an autoencoder's decoder: in float16 that of SDXL overflows.

    Large images are decoded one by one: of a batch a GPU has no room for the features.
    """
    decode = vae.decode

    def in_full(latents: torch.Tensor, *args: object, **kwargs: object) -> object:
        if hasattr(vae, "enable_slicing") and min(latents.shape[-2:]) >= _LARGE_LATENTS:
            vae.enable_slicing()
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = in_full


def with_solver(bare: "DiffusionPipeline", solver: str) -> "DiffusionPipeline":
    """Copy a pipeline that has no Morse, with the same models and another scheduler.

    Args:
        bare: Any pipeline with a scheduler.
        solver: A key of `SOLVERS`.
    """
    return with_scheduler(bare, make_solver(solver, bare.scheduler.config))


def with_scheduler(bare: "DiffusionPipeline", scheduler: object) -> "DiffusionPipeline":
    """Copy a pipeline that has no Morse, with the same models and `scheduler`."""
    pipe = copy.copy(bare)  # its class's constructor might change the scheduler's settings
    pipe.register_modules(scheduler=scheduler)
    return pipe


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

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
