"""The temperature that dynamic layers begin training with: one schedule, one setter for all."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def set_temperature(module: nn.Module, temperature: float) -> int:
    """Set the temperature of every dynamic layer in `module`, itself included.

    Returns how many there are (none in a `Warehouse`, whose layers are the network's); ValueError
    if one cannot take `temperature`, and then none has it: `ODConv2d` takes any finite one above 0,
    the layers of a `Warehouse` those in [0, 1].
    """
    layers = list(dict.fromkeys(_dynamic_layers(module)))
    before = [float(layer.temperature) for layer in layers]
    try:
        for layer in layers:
            layer.set_temperature(temperature)
    except ValueError:
        for layer, old in zip(layers, before, strict=True):
            layer.set_temperature(old)
        raise
    return len(layers)


def _dynamic_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Find the layers with a temperature, but not the parts of them that hold it."""
    if hasattr(module, "set_temperature") and hasattr(module, "temperature"):
        if module.temperature is not None:
            yield module
    else:
        for child in module.children():
            yield from _dynamic_layers(child)


class TemperatureInState(nn.Module):
    """A layer whose state dicts hold its temperature too, as the tensor `_extra_state`.

    Attributes:
        temperature: Of the layer now.
        final_temperature: Where the schedule ends: what dicts without one, such as the authors',
            were trained to.
        own_weight: The name of a weight, by which whole dicts are told from parts.
    """

    temperature: float
    final_temperature: float
    own_weight: str

    def get_extra_state(self) -> Tensor:
        """Return the temperature as a tensor, which safetensors can hold."""
        return _as_state(self.temperature)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the temperature."""
        self.set_temperature(float(state))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        whole = prefix + self.own_weight in state_dict
        temperature = self.final_temperature if whole else self.temperature
        state_dict.setdefault(prefix + "_extra_state", _as_state(temperature))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _as_state(temperature: float) -> Tensor:
    """Hold a temperature exactly, and on the CPU whatever the default device."""
    return torch.tensor(temperature, dtype=torch.float64, device="cpu")


def linear_temperature(step: int, total: int, start: float = 30.0, end: float = 1.0) -> float:
    """Anneal a temperature in a straight line (ODConv, section 3.2, and KernelWarehouse).

    The defaults are ODConv's; KernelWarehouse goes from `start=1.0` to `end=0.0`.

    Args:
        step: Optimizer steps taken so far, counting the coming one, so that the last of `total`
            lands on `end`; at least 0. Steps beyond `total` stay at `end`.
        total: Steps of annealing, at least 1 (10 epochs of ImageNet for ODConv; 20 of 300 or 15
            of 150 for KernelWarehouse).
        start: Temperature at step 0, above 0.
        end: Temperature from `total` on, at least 0.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}; to stay at {end} call nothing")
    if not 0 < start < math.inf:
        raise ValueError(f"start must be a finite temperature above 0, got {start}")
    if not 0 <= end < math.inf:
        raise ValueError(f"end must be a finite temperature of at least 0, got {end}")
    return end + (start - end) * (max(0, total - step) / total)
