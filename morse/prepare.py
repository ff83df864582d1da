"""Dot beside the denoiser as that is now, and what a denoiser remembers of its Dot."""

import weakref

from diffusers import DiffusionPipeline
from torch import nn

from morse.denoisers import find_denoisers
from morse.dot import MorseDot
from morse.dot.shell import moves_weights
from morse.dot.wrapped import unwrap
from morse.sampling import Dot
from morse.slot import install_switch, switch_owner


def prepare_dot(pipe: DiffusionPipeline, dot: Dot | None, denoiser: nn.Module) -> None:
    """Bring a MorseDot into the precision of a pipeline's denoiser and to where that runs."""
    if not isinstance(dot, MorseDot):
        return
    dtype = getattr(unwrap(denoiser), "dtype", dot.dtype)
    if dot.dtype != dtype:
        dot.to(dtype=dtype)
    # Offloading that was enabled before Morse does not know of the Dot, which is small.
    device = pipe._execution_device
    if dot.device != device and not moves_weights(dot):
        dot.to(device)


def remember(pipe: DiffusionPipeline, dot: Dot | None) -> None:
    """Put the switches in place and keep the Dot there, for pipelines made of this one's parts."""
    for denoiser in find_denoisers(pipe).values():
        install_switch(denoiser, owner=(dot, weakref.ref(pipe)))


def recall(denoiser: nn.Module) -> tuple[Dot | None, DiffusionPipeline | None]:
    """Give the Dot attached last to a denoiser, and the pipeline it belongs to if that exists."""
    dot, pipe = switch_owner(denoiser) or (None, lambda: None)
    return dot, pipe()
