"""Dash's own layers, run at low resolution inside Dot, without touching Dash.

A *shell* of a module is another object of the same class that shares its parameters, buffers and
settings but has its own table of children. A tree of shells can therefore carry LoRA and have its
entry and exit replaced while Dash itself stays bit for bit what it was, and Dash's own forward
method still handles class labels, extra conditions and attention masks.
"""

import hashlib
import math
import operator

import torch
from torch import Tensor, nn

from morse.dot.lora import LowRank, lora_class


class Provide(nn.Module):
    """Takes a layer's place and returns what was already computed for it."""

    def __init__(self, value: Tensor) -> None:
        """Keep the value."""
        super().__init__()
        self.value = value

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Return it, whatever comes in."""
        return self.value


def make_shell(module: nn.Module) -> nn.Module:
    """Make a shell of one module: shared tensors and settings, a children table of its own."""
    shell = object.__new__(type(module))
    shell.__dict__.update(module.__dict__)
    # Both would run the original module in place of its shell.
    shell.__dict__.pop("_compiled_call_impl", None)
    shell.__dict__["_modules"] = dict(module._modules)
    return shell


def with_replaced(root: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """Make a shell of `root` with other modules under some dotted names; `root` stays as it is."""
    shells = {"": make_shell(root)}
    for path, module in replacements.items():
        *parents, last = path.split(".")
        name, parent = "", shells[""]
        for part in parents:
            name = f"{name}.{part}"
            if name not in shells:
                shells[name] = parent._modules[part] = make_shell(parent._modules[part])
            parent = shells[name]
        parent._modules[last] = module
    return shells[""]


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


# What of a module may change after its shell was made, and must then be taken over.
_SETTINGS = ("processor", "gradient_checkpointing", "training")


def tree_state(dash: nn.Module) -> tuple[object, ...]:
    """What a tree of shells was made from; compares unequal once the tree would differ."""
    parameter = next(dash.parameters())
    modules = tuple(dash.modules())
    settings = tuple(vars(module).get(name) for module in modules for name in _SETTINGS)
    return parameter.device, parameter.dtype, _Identities(modules), _Identities(settings)


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
