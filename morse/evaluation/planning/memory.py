"""Spares a search the evaluations of Dash that it has made before."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_MOST_CALLS = 1024  # remembered; a few hundred MiB for batches of small images


@contextmanager
def remembering(denoiser: nn.Module) -> Iterator[None]:
    """Answer a denoiser's calls from memory where the same was asked before, bit for bit.

    Runs that differ from some step on are the same before it: plans whose ends differ, and fits
    that move one number of a run at a time.
    """
    memory: OrderedDict[bytes, object] = OrderedDict()
    plain = denoiser.forward

    def forward(*args: object, **kwargs: object) -> object:
        key = _digest((args, kwargs))
        output = memory.pop(key, None)
        memory[key] = output = plain(*args, **kwargs) if output is None else output
        if len(memory) > _MOST_CALLS:
            memory.popitem(last=False)
        return output

    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward


def _digest(value: object) -> bytes:
    """Tell arguments apart by their contents."""
    state = hashlib.blake2b(type(value).__name__.encode(), digest_size=16)
    if isinstance(value, Tensor):
        state.update(f"{value.dtype} {tuple(value.shape)}".encode())
        state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            state.update(repr(name).encode() + _digest(each))
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for each in value:
            state.update(_digest(each))
    else:
        state.update(repr(value).encode())
    return state.digest()
