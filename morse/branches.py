"""Tells the evaluations of one step apart: with and without text, say, or with a layer skipped.

Guidance evaluates a denoiser several times a step, in one batch or one call after the other. What
Dash estimated in one call says nothing about another, and their order is no clue where guidance
sets in or ends midway. So what is kept for a call is found again by the call's conditions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from morse.denoisers import Call

# Conditions that differ from step to step: features of ControlNets and T2I-Adapters, noise levels.
_VARYING = ("control", "residual", "timestep", "sigma")


def steady_conditions(call: Call) -> Call:
    """Leave out the conditions that may change from step to step."""
    steady = {
        name: value
        for name, value in call.conditions.items()
        if not any(word in name for word in _VARYING)
    }
    return Call(call.sample, call.timestep, steady)


@dataclass(frozen=True, eq=False)
class _Branch:
    owner: object
    shape: torch.Size
    conditions: dict[str, object]
    kept: object
    step: int


class Branches:
    """Keeps something for each call of the latest step that was evaluated in full."""

    def __init__(self) -> None:
        """Start with nothing kept."""
        self._branches: list[_Branch] = []
        self._earlier: list[_Branch] = []
        self._used: list[_Branch] = []
        self._num_earlier = 0
        self._step = 0

    def start_step(self, forget: bool, keep_earlier: bool = False) -> None:
        """Begin another step; `forget` what was kept where this one is evaluated in full.

        With `keep_earlier` it can still be found, by `find_earlier`, during this step.
        """
        self._earlier = self._branches if forget and keep_earlier else []
        if forget:
            self._branches = []
        self._used, self._num_earlier = [], len(self._branches)
        self._step += 1

    def keep(self, owner: object, call: Call, kept: object) -> None:
        """Keep something for a call of the module `owner`."""
        branch = _Branch(owner, call.sample.shape, call.conditions, kept, self._step)
        self._branches.append(branch)
        self._used.append(branch)

    def find(self, owner: object, call: Call) -> object | None:
        """Find what was kept for such a call; for equal calls of a step, in their order.

        The very same objects are looked for first: pipelines hand on the same ones at each step,
        and comparing values waits for the device.
        """
        return self._find(self._branches, owner, call)

    def find_earlier(self, owner: object, call: Call) -> object | None:
        """Find what was kept for such a call before this step, which is evaluated in full."""
        return self._find(self._earlier, owner, call)

    def _find(self, branches: list[_Branch], owner: object, call: Call) -> object | None:
        free = [
            branch
            for branch in branches
            if branch.owner is owner
            and branch.shape == call.sample.shape
            and not any(branch is used for used in self._used)
        ]
        # Dash may have run in Dot's place since: newest step first, and a step's in their order.
        free.sort(key=lambda branch: -branch.step)
        for same_tensor in (_same_memory, _same_values):
            for branch in free:
                if _agree(branch.conditions, call.conditions, same_tensor):
                    self._used.append(branch)
                    return branch.kept
        return None

    def why_missing(self, owner: object, call: Call) -> str:
        """Say why `find` found nothing."""
        earlier = self._branches[: self._num_earlier]
        kept = [branch for branch in earlier if branch.owner is owner]
        if not kept:
            return "no earlier Dash evaluation"
        if all(branch.shape != call.sample.shape for branch in kept):
            return "the sample changed its shape"
        return "no earlier Dash evaluation with these conditions"


def _agree(one: object, other: object, same_tensor: Callable[[Tensor, Tensor], bool]) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return same_tensor(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            _agree(value, other[name], same_tensor) for name, value in one.items()
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(
            _agree(*pair, same_tensor) for pair in zip(one, other, strict=True)
        )
    return isinstance(one, (bool, int, float, str)) and one == other


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return _layout(one) == _layout(other) and one.data_ptr() == other.data_ptr()


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _same_values(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
