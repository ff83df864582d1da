"""Dash's own layers, run at low resolution inside Dot, without touching Dash.

A *shell* of a module is another object of the same class that shares its parameters, buffers and
settings but has its own table of children. A tree of shells can therefore carry LoRA and have its
entry and exit replaced while Dash itself stays bit for bit what it was, and Dash's own forward
method still handles class labels, extra conditions and attention masks.
"""

import operator
from collections.abc import Iterable
from functools import cache

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from morse.dot.lora import LowRank, lora_class
from morse.dot.shell import make_shell
from morse.dot.wrapped import named_layers, unwrap


def make_shared_tree(dash: nn.Module, adapters: dict[str, LowRank]) -> nn.Module:
    """Make shells of Dash and all it contains, with `adapters` (by module name) on its leaves."""
    names = {module: name for name, module in named_layers(dash)}
    done: dict[nn.Module, nn.Module] = {}

    def copy(module: nn.Module) -> nn.Module:
        if module not in done:
            shell = done[module] = make_shell(module)
            for child_name, child in module._modules.items():
                shell._modules[child_name] = None if child is None else copy(unwrap(child))
            adapter = adapters.get(names.get(module))
            if adapter is not None:
                shell.__class__ = lora_class(type(module))
                shell._modules["dot_lora"] = adapter
            if isinstance(module, Attention) and module.group_norm is not None:
                norm = shell._modules["group_norm"]
                norm.__class__ = token_norm_class(type(norm))
        return done[module]

    return copy(dash)


class _TokenNorm:
    """Mixed into the class of a norm of (B, C, L) whose output attention reads as (B, L, C).

    In that order it is one matrix for the projections. As the norm lays it out they would be B
    small products, which of Dot's few positions took up to a sixth of its time.
    """

    def __call__(self, hidden: Tensor) -> Tensor:
        return super().__call__(hidden).transpose(1, 2).contiguous().transpose(1, 2)


@cache
def token_norm_class(norm_class: type[nn.Module]) -> type[nn.Module]:
    """The norm's class with its output's values ordered so; they are the same."""
    return type(f"Token{norm_class.__name__}", (_TokenNorm, norm_class), {})


def merge_shared_tree(dash: nn.Module, adapters: dict[str, LowRank]) -> nn.Module:
    """Make the same tree with the low-rank updates added to copies of the weights: faster.

    On a CPU the copies of convolutions' weights lie channels last, for features that do.
    """
    tree = make_shared_tree(dash, {})
    layers = dict(named_layers(tree))
    for name, adapter in adapters.items():
        leaf = layers[name]
        leaf.__dict__["_parameters"] = dict(leaf._parameters)
        with torch.no_grad():
            merged = adapter.merge(leaf.weight)
        leaf._parameters["weight"] = nn.Parameter(merged, requires_grad=False)
    return tree


def place_channels_last(tensor: Tensor) -> Tensor:
    """Order (B, C, H, W) in memory as a CPU's convolutions take it; the values are the same.

    Attention hands on features in that order, so that in the usual one every later convolution
    would reorder its weights in each call.
    """
    suits = tensor.ndim == 4 and tensor.device.type == "cpu"
    return tensor.contiguous(memory_format=torch.channels_last) if suits else tensor


class TreeState:
    """What a tree of shells was made from; unequal to a later state once the tree would differ.

    A merged tree also differs when Dash's weights do (`.to()` another precision, a fused LoRA), so
    sixteen values of every merged weight are looked at.
    """

    def __init__(self, dash: nn.Module, merged: Iterable[str] | None) -> None:
        """Take the state of Dash; `merged` names the layers with merged weights, if there are."""
        # Holding the modules keeps their addresses from being used again.
        self.modules = tuple(dash.modules())
        self.is_merged = merged is not None
        self.weights: Tensor | None = None
        if merged is not None:
            layers = dict(named_layers(dash))
            self.weights = torch.cat([_some_values(layers[name].weight) for name in merged])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TreeState)
            and len(self.modules) == len(other.modules)
            and all(map(operator.is_, self.modules, other.modules))
            and _same(self.weights, other.weights)
        )

    __hash__ = None


def _some_values(weight: Tensor) -> Tensor:
    count = min(16, weight.numel())
    return weight.detach().as_strided((count,), (weight.numel() // count,), weight.storage_offset())


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)


def check_projections(dash: nn.Module) -> None:
    """Raise `ValueError` if attention uses fused projections, in which Dot's LoRA has no part."""
    for name, module in dash.named_modules():
        if not getattr(module, "fused_projections", False):
            continue
        processor = type(getattr(module, "processor", None)).__name__
        # Classes that can't take the fused layer away again only change their processor.
        if processor.startswith("Fused") or hasattr(module, "unfuse_projections"):
            raise ValueError(
                f"Dash's attention {name!r} uses fused projections, but Dot shares and adapts the "
                "separate ones: call unfuse_qkv_projections() on it, or load it without fusing."
            )
