"""What a network surgery is resumed and replayed from: its state, and the draws of a step.

`morse.compression.network_surgery` has the source and the names.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from morse.compression.surgery_mask import Thresholds


def draw_each(
    layers: Iterable[str], generator: torch.Generator, given: Mapping[str, float]
) -> dict[str, float]:
    """Draw a number in [0, 1) for each layer, but for those given.

    Raises:
        ValueError: If one is given for an unknown layer, or outside [0, 1].
    """
    layers = list(layers)
    for name, draw in given.items():
        if name not in layers:
            raise ValueError(f"draws has {name!r}; the layers are {layers}.")
        if not 0 <= draw <= 1:
            raise ValueError(f"draws must be in [0, 1], got {draw!r} for layer {name!r}.")
    drawn = torch.rand(len(layers), generator=generator, device=generator.device).tolist()
    return dict(zip(layers, drawn, strict=True)) | dict(given)


def check_state(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], layers: Iterable[str]
) -> None:
    """Raise ValueError unless the names and shapes of a surgery's state are its own ones.

    There are thresholds of no layer, as before the first step, or of all.
    """
    expected = {k: tuple(v.shape) for k, v in own.items() if not k.startswith("thresholds.")}
    if any(name.startswith("thresholds.") for name in given):
        expected |= {f"thresholds.{name}": (len(Thresholds._fields),) for name in layers}
    found = {name: tuple(value.shape) for name, value in given.items()}
    wrong = sorted(k for k in found | expected if found.get(k) != expected.get(k))
    if wrong:
        listed = ", ".join(f"{k} {found.get(k)} for {expected.get(k)}" for k in wrong)
        raise ValueError(
            "state_dict must be that of a surgery on the same parameters (shape got for shape "
            f"wanted, None if there is none: {listed})."
        )


def read_thresholds(state: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Thresholds]:
    """Return the thresholds in a surgery's state by layer; none before the first step."""
    found = {name: state.get(f"thresholds.{name}") for name in layers}
    return {k: Thresholds(*values.tolist()) for k, values in found.items() if values is not None}
