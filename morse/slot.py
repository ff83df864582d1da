"""The one place where a denoiser's calls are intercepted.

The switch sits in `nn.Module`'s private slot `_compiled_call_impl`, which a call consults first and
which copies and saved files leave out. Unlike a replaced forward method, a proxy module or a hook,
it survives saving, loading, offloading and `from_pipe`. The name is used in this file and for
shells (`morse.dot.shell`) only; the switch is looked after at every pipeline call (`morse.calls`).
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol

from torch import nn

from morse.dot.wrapped import unwrap


class Run(Protocol):
    """What answers calls of denoisers and ControlNets during a run (`morse.switch`)."""

    def answer(
        self, module: nn.Module, plain: Callable[..., object], args: tuple, kwargs: dict
    ) -> object:
        """Answer one call of `module`, which `plain` makes without Morse."""


CURRENT_RUN: ContextVar[Run | None] = ContextVar("morse_run", default=None)


class _Switch:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.compiled = vars(module).get("_compiled_call_impl")  # left by `module.compile()`
        self.owner: object = None

    def __call__(self, *args: object, **kwargs: object) -> object:
        plain = self.compiled or self.module._call_impl
        run = CURRENT_RUN.get()
        if run is None:
            return plain(*args, **kwargs)
        token = CURRENT_RUN.set(None)  # what runs inside, such as a Dot that calls Dash, is plain
        try:
            return run.answer(self.module, plain, args, kwargs)
        finally:
            CURRENT_RUN.reset(token)


def install_switch(module: nn.Module, owner: object = None) -> None:
    """Put the switch in place, on top of a compiled call where there is one; twice is safe.

    Args:
        module: A denoiser or ControlNet; the module that `torch.compile` returns has its own.
        owner: What `switch_owner` is to tell.
    """
    # By way of the dictionary: what `torch.compile` returns hands attributes on to its inside.
    slot = vars(module)
    if not isinstance(slot.get("_compiled_call_impl"), _Switch):
        if unwrap(module) is not module:
            remove_switch(unwrap(module))  # it would be compiled along
        slot["_compiled_call_impl"] = _Switch(module)
    slot["_compiled_call_impl"].owner = owner


def switch_owner(module: nn.Module) -> object:
    """Tell who put the switch in place last; None where there is none."""
    return getattr(vars(module).get("_compiled_call_impl"), "owner", None)


def remove_switch(module: nn.Module) -> None:
    """Take the switch out and leave what was there before."""
    switch = vars(module).get("_compiled_call_impl")
    if isinstance(switch, _Switch):
        vars(module)["_compiled_call_impl"] = switch.compiled
