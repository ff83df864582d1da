"""The masks of one layer of a network surgery: how they act, when entries flip, by what thresholds.

`morse.compression.network_surgery` has the source and the names.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Thresholds(NamedTuple):
    """A weight is pruned at |w| <= a, spliced at |w| > b; mean and standard deviation of |w|."""

    prune_below: float
    splice_above: float
    mu: float
    std: float


class Flips(NamedTuple):
    """How many entries of a parameter an update switched off and on."""

    pruned: int
    spliced: int


class WeightMask(nn.Module):
    """Parametrization that masks a raw weight, yet lets the whole gradient reach it."""

    def __init__(self, like: Tensor) -> None:
        """Create a mask of ones, shaped like the weight."""
        super().__init__()
        self.register_buffer("mask", torch.ones_like(like, dtype=torch.bool, requires_grad=False))

    def forward(self, raw: Tensor) -> Tensor:
        """Return the raw weight where the mask is 1, and 0 elsewhere, exactly."""
        with torch.no_grad():
            difference = raw * self.mask - raw
        return raw + difference


def check_unmasked(module: nn.Module, first: str) -> None:
    """Raise ValueError, saying what to do first, if the module has masks."""
    if any(isinstance(part, WeightMask) for part in module.modules()):
        raise ValueError(
            f"the module is under surgery; {first}. Is it a copy, such as a moving average, load "
            "its state dict into the module of a copy of the surgery: see NetworkSurgery."
        )


class MaskedLayer:
    """A layer, some of whose parameters are masked.

    Args:
        name: The layer's name, for messages.
        module: The layer.
        parameters: Full name -> name in the layer, of the parameters to mask.
        c_rate: Where the thresholds lie, in standard deviations from the mean.
        iter_stop: Iteration from which the masks stay.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        parameters: dict[str, str],
        c_rate: float,
        iter_stop: float,
    ) -> None:
        """Give every parameter a mask of ones."""
        self.name, self.module, self.parameters = name, module, parameters
        self.c_rate, self.iter_stop = c_rate, iter_stop
        self._order = [own for own, _ in module.named_parameters(recurse=False)]
        self._warned: set[str] = set()
        self._masks = {full: WeightMask(getattr(module, own)) for full, own in parameters.items()}
        for full, own in parameters.items():
            parametrize.register_parametrization(module, own, self._masks[full])

    @property
    def masks(self) -> dict[str, Tensor]:
        """The live masks by full name."""
        return {full: mask.mask for full, mask in self._masks.items()}

    @property
    def raw(self) -> dict[str, nn.Parameter]:
        """The raw weights by full name, while the masks are there."""
        lists = self.module.parametrizations
        return {full: lists[own].original for full, own in self.parameters.items()}

    def measure(self, low: float, high: float) -> Thresholds:
        """Compute the thresholds from the kept entries of all masked parameters together.

        Raises:
            ValueError: If all of them are zero, or some not finite.
        """
        masks = self.masks
        kept = [raw[masks[full] & (raw != 0)].abs() for full, raw in self.raw.items()]
        # On the CPU, since not every accelerator has float64.
        sizes = torch.cat([part.to("cpu", torch.float64) for part in kept])
        if not len(sizes):
            raise ValueError(
                f"layer {self.name!r} has only zeros, from which no thresholds follow; train it "
                "before, or exclude it."
            )
        mu = sizes.mean().item()
        if not math.isfinite(mu):
            raise ValueError(f"layer {self.name!r} has weights that are not finite.")
        # Rounding can make the variance of equal entries negative.
        std = math.sqrt(max(sizes.square().mean().item() - mu**2, 0.0))
        # Without spread an infinite c_rate would give NaN.
        threshold = max(mu + self.c_rate * std, 0.0) if std > 0 else mu
        # So would an infinite threshold times zero.
        below, above = (share * threshold if share else 0.0 for share in (low, high))
        return Thresholds(below, above, mu, std)

    def update(self, thresholds: Thresholds) -> dict[str, Flips]:
        """Prune and splice; warns once of a matrix or kernel with fewer entries than outputs."""
        flips = {}
        for full, raw in self.raw.items():
            # In a lower precision, thresholds would be rounded before they are compared with.
            size = raw.abs().to(torch.promote_types(raw.dtype, torch.float32))
            mask = self.masks[full]
            pruned = mask & (size <= thresholds.prune_below)
            spliced = ~mask & (size > thresholds.splice_above)
            mask.logical_xor_(pruned | spliced)
            flips[full] = Flips(int(pruned.sum()), int(spliced.sum()))
            left = int(mask.sum())
            if mask.ndim > 1 and left < len(mask) and full not in self._warned:
                self._warned.add(full)
                warnings.warn(
                    f"{left} of the {mask.numel()} entries of {full!r} are left, fewer than its "
                    f"{len(mask)} outputs; lower c_rate for {self.name!r} if they don't come back.",
                    stacklevel=4,
                )
        return flips

    @torch.no_grad()
    def bake(self) -> None:
        """Write the zeros into the parameters and remove the masks."""
        _own_class(self.module)
        for full, raw in self.raw.items():
            raw.copy_(self._masks[full](raw))
            own = self.parameters[full]
            parametrize.remove_parametrizations(self.module, own, leave_parametrized=False)
        # Put all back in their order, by which optimizers and their checkpoints count.
        for own in self._order:
            parameter = getattr(self.module, own)
            delattr(self.module, own)
            self.module.register_parameter(own, parameter)


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    A copy shares the class that torch has made for it, from which removing masks takes properties.
    """
    shared = type(module)
    content = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, content)
