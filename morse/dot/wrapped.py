"""Dash's layers by the names and with the weights that they had before others wrapped them.

PEFT puts a user's adapters around a layer and moves the layer to `base_layer`; `torch.compile`
moves a module to `_orig_mod`; accelerate takes offloaded weights out of it. A Dot is made for what
lies beneath, so names, shapes and the fingerprint are the same with and without all that.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def unwrap(module: nn.Module) -> nn.Module:
    """Give the module that `torch.compile` wrapped, or the module itself."""
    return module._modules.get("_orig_mod", module)


def base_layer(module: nn.Module) -> nn.Module:
    """Give the layer that a user's adapter wraps, or the module itself."""
    return module._modules.get("base_layer", module)


def named_layers(dash: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Give all modules of Dash as `named_modules` would without wrappers, each once."""
    return ((name, layer) for name, layer, _ in _walk(dash, "", None, set()))


def _walk(
    module: nn.Module, name: str, wrapper: nn.Module | None, seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    module = unwrap(module)
    inner = base_layer(module)
    if inner is not module:
        yield from _walk(inner, name, module, seen)
    elif module not in seen:
        seen.add(module)
        yield name, module, wrapper
        for child_name, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{name}.{child_name}".lstrip("."), None, seen)


def named_weights(dash: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module, nn.Module | None]]:
    """Give Dash's own parameters as `named_parameters` would without wrappers.

    Returns:
        Name, parameter (without values where it is offloaded), its layer, and the user's adapter
        around that layer or None; `read_weight` takes the last three.
    """
    seen: set[int] = set()
    for name, layer, wrapper in _walk(dash, "", None, set()):
        for own_name, parameter in layer._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{name}.{own_name}".lstrip("."), parameter, layer, wrapper


def read_weight(parameter: Tensor, layer: nn.Module, wrapper: nn.Module | None) -> Tensor | None:
    """Read a parameter's values as Dash was loaded; None where there are none ("meta").

    An offloaded parameter is read where accelerate keeps it, and adapters that were fused into a
    weight (`fuse_lora`) are subtracted as long as PEFT still knows them.
    """
    value = parameter.detach()
    name = next(name for name, own in layer._parameters.items() if own is parameter)
    if value.is_meta:
        kept = getattr(vars(layer).get("_hf_hook"), "weights_map", None)
        return None if kept is None else kept[name]
    if name == "weight":
        with torch.no_grad():
            for adapter in getattr(wrapper, "merged_adapters", ()):
                value = value - wrapper.get_delta_weight(adapter).to(value)
    return value


def is_ip_adapter(name: str) -> bool:
    """Whether a module or parameter came with an IP-Adapter, which can be loaded at any time."""
    return (
        "encoder_hid_proj.image_projection_layers" in name
        or ".processor." in name
        or name.split(".")[0] == "image_proj"  # Stable Diffusion 3's
    )
