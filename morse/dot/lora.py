"""Low-rank adapters (LoRA, Hu et al. 2022) that act in Dot and never in Dash.

PEFT injects into the model it is given, and Dash must stay as it is, so the two leaf types are
adapted here; names and shapes are PEFT's, so that its tools can read the weights.
"""

import math
from functools import cache

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """The update scale * B A x of one layer: `lora_A` starts random, `lora_B` at zero.

    Args:
        spec: Shape of the adapted layer, as from `describe_leaf`.
        rank: Inner dimension r, at least 1.
        alpha: The update is scaled by alpha / r.
    """

    def __init__(self, spec: dict[str, object], rank: int, alpha: float) -> None:
        """Create both factors for a Linear or Conv2d described by `spec`."""
        super().__init__()
        self.scale = alpha / rank
        if spec["kind"] == "linear":
            self.lora_A = nn.Linear(spec["in"], rank, bias=False)
            self.lora_B = nn.Linear(rank, spec["out"], bias=False)
        else:
            geometry = {key: tuple(spec[key]) for key in ("stride", "padding", "dilation")}
            kernel_size = tuple(spec["kernel_size"])
            self.lora_A = nn.Conv2d(spec["in"], rank, kernel_size, bias=False, **geometry)
            self.lora_B = nn.Conv2d(rank, spec["out"], 1, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the update for the layer's input."""
        return self.lora_B(self.lora_A(hidden)) * self.scale

    def merge(self, weight: Tensor) -> Tensor:
        """Return the layer's weight, (O, I, ...), with the update added, in one pass of float32.

        On a CPU a convolution's lies channels last in memory, as its features will.
        """
        parts = [each.float().movedim(1, -1) for each in (weight, self.lora_A.weight)]
        up = self.lora_B.weight.float().flatten(1)
        merged = torch.addmm(parts[0].flatten(1), up, parts[1].flatten(1), alpha=self.scale)
        merged = merged.to(weight.dtype).view(parts[0].shape).movedim(-1, 1)
        return merged if weight.device.type == "cpu" else merged.contiguous()


def describe_leaf(leaf: nn.Module) -> dict[str, object] | None:
    """Describe a Linear or ungrouped Conv2d for `LowRank`, as JSON; None for any other module."""
    if isinstance(leaf, nn.Linear):
        return {"kind": "linear", "in": leaf.in_features, "out": leaf.out_features}
    if isinstance(leaf, nn.Conv2d) and leaf.groups == 1 and leaf.padding_mode == "zeros":
        geometry = {
            key: list(getattr(leaf, key))
            for key in ("kernel_size", "stride", "padding", "dilation")
        }
        return {"kind": "conv", "in": leaf.in_channels, "out": leaf.out_channels, **geometry}
    return None


class _LoRALeaf:
    """Mixed into a leaf's class; acts on `__call__`, which no instance attribute can hide."""

    def __call__(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        return super().__call__(hidden, *args, **kwargs) + self.dot_lora(hidden)


@cache
def lora_class(leaf_class: type[nn.Module]) -> type[nn.Module]:
    """The leaf's class with the low-rank update of its child `dot_lora` added to its output."""
    return type(f"LoRA{leaf_class.__name__}", (_LoRALeaf, leaf_class), {})


def nest_adapter(root: nn.ModuleDict, name: str, module: LowRank) -> LowRank:
    """Put `module` under a dotted name, so that state-dict keys read as PEFT's do."""
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in root:
            root[parent] = nn.ModuleDict()
        root = root[parent]
    root[last] = module
    return module
