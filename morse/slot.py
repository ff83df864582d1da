"""The one place where a denoiser's calls are intercepted.

The switch sits in `nn.Module`'s private slot `_compiled_call_impl`, which a call consults first and
which copies and saved files leave out. Unlike a replaced forward method, a proxy module or a hook,
it survives saving, loading, offloading and `from_pipe`. The name is used in this file, for shells
(`morse.dot.shell`) and for graphs (`morse.graphs`, `morse.dot.sharing`) only; the switch is looked
after at every pipeline call (`morse.calls`).
"""

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from morse.dot.wrapped import unwrap


class Run(Protocol):
    """What answers calls of denoisers and ControlNets during a run (`morse.switch.Dispatcher`)."""

    def answer(
        self, module: nn.Module, plain: Callable[..., object], args: tuple, kwargs: dict
    ) -> object:
        """Answer one call of `module`, which `plain` makes without Morse."""


CURRENT_RUN: ContextVar[Run | None] = ContextVar("morse_run", default=None)


@dataclass(frozen=True, eq=False)
class Owner:
    """A pipeline that a switch serves, and its Dot, for pipelines made of the same parts."""

    pipe: weakref.ref
    dot: object


class _Switch:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.compiled = vars(module).get("_compiled_call_impl")  # left by `module.compile()`
        self.owners: tuple[Owner, ...] = ()  # the latest comes last

    def others(self, pipe: object) -> tuple[Owner, ...]:
        """Give the owners that still exist, but for one."""
        return tuple(owner for owner in self.owners if owner.pipe() not in (None, pipe))

    def __call__(self, *args: object, **kwargs: object) -> object:
        plain = self.compiled or self.module._call_impl
        if torch.compiler.is_compiling():
            return plain(*args, **kwargs)  # whoever wrapped the module wants it without Morse
        run = CURRENT_RUN.get()
        if run is None:
            return plain(*args, **kwargs)
        token = CURRENT_RUN.set(None)  # what runs inside, such as a Dot that calls Dash, is plain
        try:
            return run.answer(self.module, plain, args, kwargs)
        finally:
            CURRENT_RUN.reset(token)


def switch_of(module: nn.Module) -> _Switch | None:
    """Give the switch in place; None where there is none."""
    # By way of the dictionary: what `torch.compile` returns hands attributes on to its inside.
    switch = vars(module).get("_compiled_call_impl")
    return switch if isinstance(switch, _Switch) else None


def install_switch(module: nn.Module, owner: Owner) -> None:
    """Put the switch in place, on top of a compiled call where there is one; twice is safe.

    Args:
        module: A denoiser or ControlNet; the module that `torch.compile` returns has its own.
        owner: Whom it serves from now on, besides other pipelines.
    """
    switch = switch_of(module)
    if switch is None:
        if unwrap(module) is not module:
            release_switch(unwrap(module), owner.pipe())  # it would be compiled along
        switch = vars(module)["_compiled_call_impl"] = _Switch(module)
    switch.owners = (*switch.others(owner.pipe()), owner)


def switch_owner(module: nn.Module) -> Owner | None:
    """Tell whom the switch serves last, be it inside a compiled wrapper; None for nobody."""
    switch = switch_of(module) or switch_of(unwrap(module))
    return None if switch is None else switch.owners[-1]


def release_switch(module: nn.Module, pipe: object) -> bool:
    """Let one pipeline go; with the last goes the switch, and what was there before is left.

    Returns:
        Whether it served that pipeline.
    """
    switch = switch_of(module)
    if switch is None:
        return False
    served = any(owner.pipe() is pipe for owner in switch.owners)
    others = switch.others(pipe)
    if others:
        switch.owners = others
    else:
        vars(module)["_compiled_call_impl"] = switch.compiled
    return served
