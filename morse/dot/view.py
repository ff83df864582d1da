"""Dash's own layers, run at low resolution inside Dot, without touching Dash.

A *shell* of a module is another object of the same class that shares its parameters, buffers and
settings but has its own table of children. A tree of shells can therefore carry LoRA and have its
entry and exit replaced while Dash itself stays bit for bit what it was, and Dash's own forward
method still handles class labels, extra conditions and attention masks.
"""

import hashlib
import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from morse.dot.lora import LowRank, describe_leaf, lora_class


@dataclass(frozen=True)
class Ports:
    """Names of the layers of a denoiser class that Dot replaces or reuses.

    Attributes:
        entry: First layer, from the sample to features.
        exit: Last layer, from features to the model output.
        time_projection: From timesteps to sinusoids.
        time_embedding: From sinusoids to the embedding that the blocks take.
    """

    entry: str
    exit: str
    time_projection: str
    time_embedding: str


_UNET_PORTS = Ports("conv_in", "conv_out", "time_proj", "time_embedding")
PORTS = {"UNet2DModel": _UNET_PORTS, "UNet2DConditionModel": _UNET_PORTS}


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


def make_shell(module: nn.Module) -> nn.Module:
    """Make a shell of one module: shared tensors and settings, a children table of its own."""
    shell = object.__new__(type(module))
    shell.__dict__.update(module.__dict__)
    # Both would run the original module in place of its shell.
    shell.__dict__.pop("_compiled_call_impl", None)
    shell.__dict__["_modules"] = dict(module._modules)
    return shell


def lora_targets(dash: nn.Module) -> dict[str, dict[str, object]]:
    """Describe every Linear and Conv2d of Dash that Dot shares, by name."""
    ports = find_ports(dash)
    leaves = {
        name: describe_leaf(module)
        for name, module in dash.named_modules()
        if name not in (ports.entry, ports.exit)
    }
    return {name: spec for name, spec in leaves.items() if spec is not None}


def make_shared_tree(dash: nn.Module, adapters: dict[str, LowRank]) -> nn.Module:
    """Make shells of Dash and all it contains, with `adapters` (by module name) on its leaves."""
    names = {module: name for name, module in dash.named_modules()}
    done: dict[nn.Module, nn.Module] = {}

    def copy(module: nn.Module) -> nn.Module:
        if module not in done:
            shell = done[module] = make_shell(module)
            for child_name, child in module._modules.items():
                shell._modules[child_name] = None if child is None else copy(child)
            adapter = adapters.get(names[module])
            if adapter is not None:
                shell.__class__ = lora_class(type(module))
                shell._modules["dot_lora"] = adapter
        return done[module]

    return copy(dash)


def merge_shared_tree(dash: nn.Module, adapters: dict[str, LowRank]) -> nn.Module:
    """Make the same tree with the low-rank updates added to copies of the weights: faster."""
    tree = make_shared_tree(dash, {})
    for name, adapter in adapters.items():
        leaf = tree.get_submodule(name)
        merged = leaf.weight.detach().float() + adapter.delta_weight().detach()
        leaf.__dict__["_parameters"] = dict(leaf._parameters)
        leaf._parameters["weight"] = nn.Parameter(merged.to(leaf.weight), requires_grad=False)
    return tree


def tree_state(dash: nn.Module) -> tuple[object, ...]:
    """What a tree of shells was made from; compares unequal once the tree would differ."""
    parameter = next(dash.parameters())
    modules = tuple(dash.modules())
    processors = tuple(vars(module).get("processor") for module in modules)
    return parameter.device, parameter.dtype, _Identities(modules), _Identities(processors)


class _Identities:
    """Objects compared by identity; holding them keeps their addresses from being reused."""

    def __init__(self, objects: tuple[object, ...]) -> None:
        self.objects = objects

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Identities)
            and len(self.objects) == len(other.objects)
            and all(map(operator.is_, self.objects, other.objects))
        )

    __hash__ = None


class _Provide(nn.Module):
    """Takes a layer's place and returns what was already computed for it."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.value


def embed_time(tree: nn.Module, timestep: Tensor, batch_size: int) -> Tensor:
    """Embed timesteps, () or (B,), with the tree's own layers; returns (B, time_embed_dim)."""
    ports = find_ports(tree)
    timestep = timestep.reshape(-1).expand(batch_size)
    projected = getattr(tree, ports.time_projection)(timestep)
    embedding = getattr(tree, ports.time_embedding)
    return embedding(projected.to(next(embedding.parameters()).dtype))


def run_body(
    tree: nn.Module, features: Tensor, timestep: Tensor, time_embedding: Tensor, **kwargs: object
) -> Tensor:
    """Run the shared layers between entry and exit with Dash's own forward method.

    Args:
        tree: A tree of shells.
        features: In place of what the entry returns, (B, C, h, w).
        timestep: Handed on to the forward method, () or (B,).
        time_embedding: In place of the tree's time embedding, (B, time_embed_dim).
        kwargs: Further conditions that Dash's forward method takes.

    Returns:
        What would go into the exit, (B, C, h, w).
    """
    ports = find_ports(tree)
    body = make_shell(tree)
    # Dash's hooks (offloading, Morse's own switch) belong to Dash's calls alone.
    body.__dict__.pop("forward", None)
    body._modules[ports.entry] = _Provide(features)
    body._modules[ports.time_embedding] = _Provide(time_embedding)
    body._modules[ports.exit] = nn.Identity()
    # The features stand in for the sample, of which the forward method reads only size and dtype.
    return type(body).forward(body, features, timestep, return_dict=False, **kwargs)[0]


def fingerprint(dash: nn.Module) -> dict[str, object]:
    """Identify a Dash by its structure and by projections of a few of its weights.

    The projections are onto fixed cosines and change little with the dtype, so that the same
    weights in float16 still match.
    """
    shapes = [(name, tuple(value.shape)) for name, value in dash.named_parameters()]
    digest = hashlib.sha256(f"{type(dash).__name__} {shapes}".encode()).hexdigest()[:12]
    weights = [value for _, value in dash.named_parameters() if value.ndim > 1]
    # On "meta", where only shapes count, there are no values to look at.
    sampled = [w for w in weights[:: max(1, len(weights) // 8)][:8] if not w.is_meta]
    return {
        "class": type(dash).__name__,
        "parameters": sum(math.prod(shape) for _, shape in shapes),
        "structure": digest,
        "weights": [round(_project(weight), 3) for weight in sampled],
    }


def _project(weight: Tensor) -> float:
    flat = weight.detach().double().flatten()
    direction = torch.cos(torch.arange(flat.numel(), device=flat.device, dtype=torch.float64))
    return float(flat @ direction / flat.norm().clamp(min=1e-12))


def check_fingerprint(dash: nn.Module, expected: dict[str, object]) -> None:
    """Raise `ValueError`, showing both fingerprints, unless `dash` is the expected one."""
    found = fingerprint(dash)
    same = found["structure"] == expected["structure"] and all(
        # A bfloat16 copy moves a projection by about 0.002, other weights by about 0.7.
        abs(one - other) < 0.05
        for one, other in zip(found["weights"], expected["weights"], strict=True)
    )
    if not same:
        raise ValueError(
            f"dot was trained for another Dash.\n  expected: {expected}\n  found:    {found}\n"
            "Load the model it was trained for, or train a Dot for this one (train_dot.py)."
        )
