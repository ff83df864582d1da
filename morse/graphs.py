"""CUDA graphs for sampling: the kernels of Dash and Dot are replayed, not launched one by one.

At small batches a GPU waits for Python. An eager Dot has as many kernels to launch as Dash, so that
there it takes as long, however little each kernel has to do. Replayed, both take the time of their
kernels. No compiler is needed, and the kernels, hence images, are the eager ones.
"""

from collections.abc import Callable

from diffusers import DiffusionPipeline
from torch import nn

from morse.capture import Capture, CudaCapture
from morse.denoisers import find_denoisers
from morse.graphed import GraphedCall, Shared
from morse.slot import switch_of


def enable_cuda_graphs(
    pipe: DiffusionPipeline, max_graphs: int = 8, capture: Capture | None = None
) -> DiffusionPipeline:
    """Replay the calls of a pipeline's denoisers, and of its Dot if it has one, as CUDA graphs.

    The first call with new shapes is captured, which takes about five times as long; later ones
    copy their inputs to where the captured ones lie. A graph is captured anew where weights were
    moved or layers, adapters or settings replaced since. What is changed by other means (a custom
    attention processor's inner objects, torch's global settings) goes unseen: enable again, which
    is safe, and captures anew. A model is called as it is, with a warning that says why, where its
    call can't be captured: on other devices, with gradients, with hooks (offloading) or replaced
    forward methods (caches), with objects among its arguments; so is a Dot that writes to its jump
    point's memory (`norm="dnr"`), one whose convolutions hear the time, and one of a transformer
    with packed samples (Flux). A capture that failed is not tried again with such arguments.

    Call it after `enable_morse`: a Dot attached later is not replayed. A model's own `compile()`
    before it is captured along; after it, it takes the graphs' place. Graphs of one pipeline share
    memory, and the calls of all its threads must be on one CUDA stream. Before torch 2.13 no thread
    may draw from CUDA's default generator while another's call is captured.

    Args:
        pipe: A diffusers pipeline, with Morse or without.
        max_graphs: Graphs kept of each model, one for each set of shapes; the one not used for
            longest goes first.
        capture: Makes the graphs, instead of `CudaCapture`.

    Returns:
        The same pipeline.

    Raises:
        ValueError: If the pipeline has no denoiser, or `max_graphs` is below 1.
    """
    if max_graphs < 1:
        raise ValueError(f"max_graphs is {max_graphs}, but must be 1 or more.")
    shared = Shared(CudaCapture() if capture is None else capture)
    disable_cuda_graphs(pipe)
    for module in _models(pipe):
        _set_plain_call(module, GraphedCall(module, _plain_call(module), shared, max_graphs))
    return pipe


def disable_cuda_graphs(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Undo `enable_cuda_graphs` and free the graphs; returns the same pipeline, twice is safe.

    So it does for a Dot that the pipeline had then and has no more.
    """
    calls = map(graphed_call, find_denoisers(pipe).values())
    earlier = [module for call in calls if call is not None for module in call.shared.modules]
    for module in {*_models(pipe), *earlier}:
        call = graphed_call(module)
        if call is not None:
            call.shared.modules.discard(module)
            _set_plain_call(module, call.compiled)
    return pipe


def graphed_call(module: nn.Module) -> GraphedCall | None:
    """Give what replays a model's calls; None where nothing does."""
    call = _plain_call(module)
    return call if isinstance(call, GraphedCall) else None


def _models(pipe: DiffusionPipeline) -> list[nn.Module]:
    dot = getattr(pipe, "dot", None)
    return [*find_denoisers(pipe).values(), *([dot] if isinstance(dot, nn.Module) else [])]


# Graphs are made of what Morse's switch calls, so that a run is planned outside of them.
def _plain_call(module: nn.Module) -> Callable[..., object] | None:
    switch = switch_of(module)
    return vars(module).get("_compiled_call_impl") if switch is None else switch.compiled


def _set_plain_call(module: nn.Module, call: Callable[..., object] | None) -> None:
    switch = switch_of(module)
    if switch is None:
        vars(module)["_compiled_call_impl"] = call
    else:
        switch.compiled = call
