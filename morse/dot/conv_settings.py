"""Which kind of convolution Dot's extra blocks have, and the settings of that kind."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from morse.modules.kernel_warehouse_plan import checked_budget

Conv = Literal["conv", "odconv", "kernel_warehouse", "gridconv"]
Condition = Literal["features", "time"]


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"conv_options[{name!r}] must be {allowed}, got {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_one_of(value: object, allowed: tuple[str, ...]) -> bool:
    return isinstance(value, str) and value in allowed


def _check_attention(condition: object, reduction: object) -> None:
    names = get_args(Condition)
    _require(_is_one_of(condition, names), "condition", condition, f"one of {names}")
    fits = _is_number(reduction) and 0 < reduction < math.inf
    _require(fits, "reduction", reduction, "a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class ODConvSettings:
    """Settings of `conv="odconv"` (`morse.modules.ODConv2d`).

    Attributes:
        condition: What the attention reads: the convolution's pooled input ("features", as
            published: a kernel for every sample), or the embedding of t_i and t_s ("time": one
            kernel for a batch that shares its timesteps, as in sampling).
        num_kernels: Candidate kernels, which each cost as much as a plain convolution.
        reduction: Width of the attention's hidden layer relative to the input channels.
    """

    condition: Condition = "features"
    num_kernels: int = 1
    reduction: float = 1 / 16

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_attention(self.condition, self.reduction)
        count = self.num_kernels
        _require(_is_count(count), "num_kernels", count, "a whole number of at least 1")


@dataclass(frozen=True, kw_only=True)
class KernelWarehouseSettings:
    """Settings of `conv="kernel_warehouse"` (`morse.modules.Warehouse`).

    Attributes:
        condition: As in `ODConvSettings`.
        budget: b, cells of a bank for each of its mixtures: a whole number, or 1 divided by one.
        cell_ratio: Channels of a cell relative to the greatest common divisor of the layers', on
            both axes. Attentions grow with the square of the number of cells in a bank.
        sharing: Which convolutions share a bank: those of equal "shapes", in all blocks, or "all".
        reduction: As in `ODConvSettings`.
    """

    condition: Condition = "features"
    budget: float = 1 / 2
    cell_ratio: float = 1 / 2
    sharing: Literal["shapes", "all"] = "shapes"
    reduction: float = 1 / 16

    def __post_init__(self) -> None:
        """Check ranges; whether budget and ratio fit the shapes is known once there are layers."""
        _check_attention(self.condition, self.reduction)
        ratio, shares = self.cell_ratio, ("shapes", "all")
        _require(_is_number(ratio) and 0 < ratio <= 1, "cell_ratio", ratio, "a number in (0, 1]")
        _require(_is_one_of(self.sharing, shares), "sharing", self.sharing, f"one of {shares}")
        _require(_is_number(self.budget), "budget", self.budget, "a number")
        try:
            checked_budget(self.budget)
        except ValueError as error:
            raise ValueError(f"conv_options['budget']: {error}") from error


PADDINGS = ("circular", "zeros", "replicate")


@dataclass(frozen=True, kw_only=True)
class GridConvSettings:
    """Settings of `conv="gridconv"` (`morse.modules.GridConv2d` with its attention).

    Attributes:
        sample_size: Height and width (one number for both) of the only samples that the Dot then
            takes, as pictures: of Flux, rows and columns of its tokens. `MorseDot.from_dash` takes
            Dash's own where it has one.
        paddings: Those of both branches: "circular", "zeros" or "replicate".
    """

    sample_size: int | tuple[int, int] | None = None
    paddings: tuple[str, str] = ("circular", "replicate")

    condition = "features"

    def __post_init__(self) -> None:
        """Check both."""
        pads, size = self.paddings, self.sample_size
        pair = isinstance(pads, (tuple, list)) and len(pads) == 2
        known = pair and all(_is_one_of(padding, PADDINGS) for padding in pads)
        _require(known, "paddings", pads, f"two of {PADDINGS}")
        sides = size if isinstance(size, (tuple, list)) else (size, size)
        fits = len(sides) == 2 and all(map(_is_count, sides))
        _require(size is None or fits, "sample_size", size, "a size or (height, width), above 0")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width; ValueError if they are not known."""
        if self.sample_size is None:
            raise ValueError(
                "conv='gridconv' is tied to one size of samples, which Dash's config does not "
                "tell: set conv_options={'sample_size': (height, width)}."
            )
        given = self.sample_size
        return (given, given) if isinstance(given, int) else tuple(given)


ConvSettings = ODConvSettings | KernelWarehouseSettings | GridConvSettings
_SETTINGS = {
    "odconv": ODConvSettings,
    "kernel_warehouse": KernelWarehouseSettings,
    "gridconv": GridConvSettings,
}


def conv_settings(conv: Conv, options: Mapping[str, Any] | None) -> ConvSettings | None:
    """Check the options of a kind of convolution; None for the plain one, which has none.

    Raises:
        ValueError: If kind or option is unknown, or a value is out of its range.
    """
    if conv not in get_args(Conv):
        raise ValueError(f"conv must be one of {get_args(Conv)}, got {conv!r}.")
    if conv == "conv":
        if options:
            raise ValueError(
                f"conv_options is {dict(options)}, but conv='conv', a plain convolution, has none: "
                f"choose another conv ({', '.join(_SETTINGS)}) or leave conv_options out."
            )
        return None
    names = [field.name for field in dataclasses.fields(_SETTINGS[conv])]
    for name in options or ():
        if name not in names:
            raise ValueError(f"conv_options has {name!r}, but conv={conv!r} takes {names} alone.")
    return _SETTINGS[conv](**options or {})
