"""Dash's own layers, run at low resolution inside Dot, without touching Dash.

A *shell* of a module is another object of the same class that shares its parameters, buffers and
settings but has its own table of children. A tree of shells can therefore carry LoRA and have its
entry and exit replaced while Dash itself stays bit for bit what it was, and Dash's own forward
method still handles class labels, extra conditions and attention masks.
"""

import hashlib
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from morse.dot.lora import LowRank, describe_leaf, lora_class
from morse.dot.shell import make_shell
from morse.dot.wrapped import base_layer, named_layers, named_weights, read_weight, unwrap


@dataclass(frozen=True)
class Ports:
    """Names of the layers of a denoiser class that Dot replaces or reuses.

    Attributes:
        entry: First layer, from the sample to features.
        exit: Last layer, from features to the model output.
        time_projection: From timesteps to sinusoids.
        time_embedding: From sinusoids to the embedding that the blocks take.
        any_size: Whether its up-sampling blocks follow sizes that its levels don't divide.
    """

    entry: str
    exit: str
    time_projection: str
    time_embedding: str
    any_size: bool


_UNET_PORTS = ("conv_in", "conv_out", "time_proj", "time_embedding")
PORTS = {
    "UNet2DModel": Ports(*_UNET_PORTS, any_size=False),
    "UNet2DConditionModel": Ports(*_UNET_PORTS, any_size=True),
}


def find_ports(dash: nn.Module) -> Ports:
    """Look up the ports of a denoiser's class or of the class that it derives from.

    Raises:
        ValueError: If a weight-shared Dot is not supported for the class; the known ones are named.
    """
    for cls in type(dash).__mro__:
        if cls.__name__ in PORTS:
            return PORTS[cls.__name__]
    raise ValueError(
        f"A weight-shared Dot is not supported for {type(dash).__name__}; supported: "
        f"{sorted(PORTS)}. Your own Dot can still be attached with enable_morse(pipe, dot)."
    )


def lora_targets(dash: nn.Module) -> dict[str, dict[str, object]]:
    """Describe every Linear and Conv2d of Dash that Dot shares, by name."""
    ports = find_ports(dash)
    leaves = {
        name: describe_leaf(module)
        for name, module in named_layers(dash)
        if name not in (ports.entry, ports.exit) and not _is_ip_adapter(name)
    }
    return {name: spec for name, spec in leaves.items() if spec is not None}


def _is_ip_adapter(name: str) -> bool:
    """Whether a module or parameter came with an IP-Adapter, which can be loaded at any time."""
    return "encoder_hid_proj.image_projection_layers" in name or ".processor." in name


def describe_dash(dash: nn.Module, num_down_blocks: int) -> dict[str, object]:
    """Give the options of a `MorseDot` with `num_down_blocks` that follow from its Dash."""
    ports = find_ports(dash)
    entry, last = (base_layer(getattr(dash, name)) for name in (ports.entry, ports.exit))
    halvings = 0 if ports.any_size else len(dash.config.block_out_channels) - 1
    return {
        "dash_fingerprint": fingerprint(dash),
        "sample_channels": entry.in_channels,
        "output_channels": last.out_channels,
        "feature_channels": entry.out_channels,
        "time_embed_dim": getattr(dash, ports.time_embedding).linear_2.out_features,
        "size_multiple": 2 ** (num_down_blocks + halvings),
    }


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
        return done[module]

    return copy(dash)


def merge_shared_tree(dash: nn.Module, adapters: dict[str, LowRank]) -> nn.Module:
    """Make the same tree with the low-rank updates added to copies of the weights: faster."""
    tree = make_shared_tree(dash, {})
    layers = dict(named_layers(tree))
    for name, adapter in adapters.items():
        leaf = layers[name]
        merged = leaf.weight.detach().float() + adapter.delta_weight().detach()
        leaf.__dict__["_parameters"] = dict(leaf._parameters)
        leaf._parameters["weight"] = nn.Parameter(merged.to(leaf.weight), requires_grad=False)
    return tree


class TreeState:
    """What a tree of shells was made from; unequal to a later state once the tree would differ.

    A merged tree also differs when Dash's weights do (`.to()` another precision, a fused LoRA), so
    sixteen values of every merged weight are looked at.
    """

    def __init__(self, dash: nn.Module, merged: Iterable[str] | None) -> None:
        """Take the state of Dash; `merged` names the layers with merged weights, if there are."""
        # Holding the modules keeps their addresses from being used again.
        self.modules = tuple(dash.modules())
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


def fingerprint(dash: nn.Module) -> dict[str, object]:
    """Identify a Dash by its structure and by projections of a few of its weights.

    The projections are onto fixed cosines and change little with the dtype, so that the same
    weights in float16 still match.
    """
    parameters = [place for place in named_weights(dash) if not _is_ip_adapter(place[0])]
    shapes = [(name, tuple(value.shape)) for name, value, *_ in parameters]
    digest = hashlib.sha256(f"{type(dash).__name__} {shapes}".encode()).hexdigest()[:12]
    weights = [place for _, *place in parameters if place[0].ndim > 1]
    sampled = [read_weight(*place) for place in weights[:: max(1, len(weights) // 8)][:8]]
    return {
        "class": type(dash).__name__,
        "parameters": sum(math.prod(shape) for _, shape in shapes),
        "structure": digest,
        # On "meta", where only shapes count, there are no values to look at.
        "weights": [round(_project(weight), 3) for weight in sampled if weight is not None],
    }


def _project(weight: Tensor) -> float:
    flat = weight.detach().double().flatten()
    direction = torch.cos(torch.arange(flat.numel(), device=flat.device, dtype=torch.float64))
    return float(flat @ direction / flat.norm().clamp(min=1e-12))


def check_fingerprint(dash: nn.Module, expected: dict[str, object]) -> None:
    """Raise `ValueError`, showing both fingerprints, unless `dash` is the expected one."""
    found = fingerprint(dash)
    pairs = zip(found["weights"], expected["weights"], strict=False)
    # A bfloat16 copy moves a projection by about 0.002, other weights by about 0.7. Where weights
    # have no values ("meta"), the structure alone must do.
    alike = len(found["weights"]) != len(expected["weights"]) or all(
        abs(one - other) < 0.05 for one, other in pairs
    )
    same = found["structure"] == expected["structure"] and alike
    if not same:
        raise ValueError(
            f"dot was trained for another Dash.\n  expected: {expected}\n  found:    {found}\n"
            "Load the model it was trained for (without a LoRA fused into its weights), or train a "
            "Dot for this one (train_dot.py)."
        )
