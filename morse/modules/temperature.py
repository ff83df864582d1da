"""The temperature that dynamic layers begin training with: one schedule, one setter for all."""

import math

import torch
from torch import Tensor, nn


def set_temperature(module: nn.Module, temperature: float) -> int:
    """Set the temperature of every dynamic layer in `module`, itself included.

    A moving average of a network is to have the network's temperature. torch's `AveragedModel`
    takes it over in each update, since it is a buffer; with `use_buffers=True` it averages it, and
    a copy whose parameters alone are averaged keeps its own: call this for such a model too.

    Returns how many there are (none in a `Warehouse`, whose layers are the network's); ValueError
    if one cannot take `temperature`, and then none has it: `ODConv2d` takes any finite one above 0,
    `GridConv2d` an infinite one too, the layers of a `Warehouse` those in [0, 1].
    """
    layers = [part for part in module.modules() if isinstance(part, WithTemperature)]
    for layer in layers:
        layer.checked_temperature(temperature)
    for layer in layers:
        layer.set_temperature(temperature)
    return len(layers)


class WithTemperature(nn.Module):
    """A layer whose temperature is a buffer: files, copies and averages of models know these.

    Attributes:
        temperature: Of the layer now, ().
        final_temperature: What state dicts without a temperature, such as the authors', were
            trained to; None if that is not known, and the layer's own stays.
        own_weight: The name of a weight, by which whole dicts are told from parts.
    """

    temperature: Tensor
    final_temperature: float | None = None
    own_weight: str

    @staticmethod
    def checked_temperature(temperature: float) -> float:
        """Return the temperature as a float; ValueError if the layer cannot take it."""
        raise NotImplementedError

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature; ValueError if the layer cannot take it."""
        self.temperature.fill_(self.checked_temperature(temperature))

    def _begin_at(self, temperature: float) -> None:
        self.register_buffer("temperature", torch.tensor(self.checked_temperature(temperature)))

    def _read_temperature(self) -> Tensor:
        # A copy for the backward pass, which may follow after another `set_temperature`.
        return self.temperature.clone() if torch.is_grad_enabled() else self.temperature

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        name, weight = prefix + "temperature", state_dict.get(prefix + self.own_weight)
        value = state_dict.pop(prefix + "_extra_state", None)  # where earlier files have it
        if value is None and weight is not None and self.final_temperature is not None:
            value = torch.tensor(self.final_temperature, device=weight.device)
        value = self.temperature.clone() if value is None else value.to(self.temperature.dtype)
        state_dict.setdefault(name, value)
        super()._load_from_state_dict(state_dict, prefix, *args)


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
