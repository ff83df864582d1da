"""Dot beside the denoiser as that is now, and what a denoiser remembers of its Dot."""

import weakref

from diffusers import DiffusionPipeline
from torch import nn

from morse.denoisers import find_controlnet, find_denoisers
from morse.dot import MorseDot
from morse.dot.shell import execution_device, moves_weights
from morse.dot.wrapped import unwrap
from morse.sampling import Dot
from morse.slot import Owner, install_switch, release_switch, switch_owner

# Library and class. diffusers itself never imports this library, and finds it if it is imported.
DOT_IN_CONFIG = ("morse", "MorseDot")


def check_dot(dot: object) -> None:
    """Refuse what is no Dot.

    Raises:
        TypeError: If it is neither callable nor None, or a MorseDot inside something else.
    """
    if dot is not None and not callable(dot):
        raise TypeError(
            f"dot is {dot!r}, but must be a MorseDot, a callable (sample, timestep, jump, "
            "**conditions) -> residual, or None; load a saved one by "
            "MorseDot.from_pretrained(path), or give its path to MorsePipeline.from_pipe."
        )
    inside = unwrap(dot) if isinstance(dot, nn.Module) else dot
    if inside is not dot and isinstance(inside, MorseDot):
        raise TypeError(
            f"dot is a {type(dot).__name__}, which torch.compile puts around a MorseDot: its plans "
            "and its Dash would be lost. Compile it in place instead: pipe.dot.compile(...)."
        )


def prepare_dot(pipe: DiffusionPipeline, dot: Dot | None, denoiser: nn.Module) -> None:
    """Bring a MorseDot into the precision of a pipeline's denoiser and to where that runs.

    With `device_map="balanced"` that is not where the pipeline's other models run.
    """
    if not isinstance(dot, MorseDot):
        return
    dtype = getattr(unwrap(denoiser), "dtype", dot.dtype)
    if dot.takes_dtype and dot.dtype != dtype:
        nn.Module.to(dot, dtype)  # without ModelMixin's warning
    # Offloading that was enabled before Morse does not know of the Dot, which is small.
    device = execution_device(unwrap(denoiser)) or pipe._execution_device
    if dot.device != device and not moves_weights(dot):
        dot.to(device)


def remember(pipe: DiffusionPipeline, dot: Dot | None) -> None:
    """Put the switches in place and keep the Dot there, for pipelines made of this one's parts."""
    owner = Owner(weakref.ref(pipe), dot)
    for module in switched(pipe):
        install_switch(module, owner)


def forget(pipe: DiffusionPipeline) -> None:
    """Take the switches out again where no other pipeline uses them."""
    for module in switched(pipe):
        release_switch(module, pipe)
        release_switch(unwrap(module), pipe)  # wrapped after it was switched


def replace_module(pipe: DiffusionPipeline, before: nn.Module, after: object) -> None:
    """Leave no switch of a pipeline in a model that it had before.

    What `torch.compile` made of a denoiser gets its own in exchange.
    """
    served = release_switch(before, pipe)
    if served and isinstance(after, nn.Module) and unwrap(after) is unwrap(before):
        remember(pipe, pipe.dot)


def switched(pipe: DiffusionPipeline) -> list[nn.Module]:
    """List the models that get a switch, the denoiser first; none where there is no denoiser."""
    try:
        modules = (*find_denoisers(pipe).values(), find_controlnet(pipe))
    except ValueError:  # the denoiser was let go of, to make room
        return []
    return [module for module in modules if module is not None]


def recall(denoiser: nn.Module) -> tuple[Dot | None, DiffusionPipeline | None]:
    """Give the Dot attached last to a denoiser, and the pipeline it belongs to if that exists."""
    owner = switch_owner(denoiser)
    return (None, None) if owner is None else (owner.dot, owner.pipe())
