"""Which parameters a network surgery prunes, and the settings of each of their layers.

Names are those of `named_modules` and `named_parameters`. A pattern is a name or a glob; it matches
a parameter by that parameter's name or by the name of a module that holds it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import accumulate
from numbers import Real
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from morse.compression.surgery_mask import check_unmasked

PerLayer = float | Mapping[str, float]


class Target(NamedTuple):
    """A layer, and the parameters to prune: full name -> name in the layer."""

    layer: nn.Module
    parameters: dict[str, str]


def check_settings(gamma: float, power: float, low: float, high: float) -> None:
    """Raise ValueError if a setting that all layers share is out of its range."""
    for name, value in (("gamma", gamma), ("power", power), ("low", low)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value!r}.")
    if not low <= high < math.inf:
        raise ValueError(f"high must be finite and at least low={low}, got {high!r}.")


def find_targets(
    module: nn.Module,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    prune_bias: bool,
) -> dict[str, Target]:
    """Find the parameters to prune, by layer, in the order of `named_modules`.

    Without `include`: the trainable weights and, with `prune_bias`, biases of convolutions and
    linear layers. With it, those of them that it matches, and any parameter that it names in full.

    Raises:
        ValueError: For a module under another surgery, a pattern that matches nothing, a frozen
            parameter asked for by name, a parameter that two layers share, or if nothing is left.
    """
    check_unmasked(module, "finalize() that one before")
    include, exclude = _patterns(include), _patterns(exclude) or ()
    entries = list(_entries(module))
    _check_known(exclude, module)
    uses = Counter(id(parameter) for *_, parameter in entries)
    hits: set[str] = set()
    targets: dict[str, Target] = {}
    for name, layer, own, parameter in entries:
        full = f"{name}.{own}" if name else own
        usual = (
            isinstance(layer, nn.Linear | _ConvNd) and own in ("weight", "bias")[: 1 + prune_bias]
        )
        asked = [p for p in include or () if p == full or (usual and _fits(p, name, own))]
        if any(_fits(p, name, own) for p in exclude) or not (usual if include is None else asked):
            continue
        if not parameter.requires_grad:
            _check_not_named(asked, full)
            continue
        if uses[id(parameter)] > 1:
            raise ValueError(
                f"{full!r} is shared with another layer, where no mask would reach it; exclude it."
            )
        targets.setdefault(name, Target(layer, {})).parameters[full] = own
        hits.update(asked)
    idle = [pattern for pattern in include or () if pattern not in hits]
    if targets and idle:
        raise ValueError(
            f"include has {idle}, which match nothing to prune: no trainable parameter of a Conv* "
            "or Linear layer that is not excluded; name one of another layer in full."
        )
    if not targets:
        raise ValueError(
            f"No target matched: include={include} and exclude={exclude} leave no trainable "
            "weight of a Conv* or Linear layer in the module."
        )
    return targets


def per_layer(
    name: str, value: PerLayer, layers: Iterable[str], default: float
) -> dict[str, float]:
    """Spread a setting over the layers.

    A layer's own name goes before patterns, of which the first that matches counts; a layer that
    none matches has the default.

    Raises:
        ValueError: If a key matches no layer, or a value is no number or, for "iter_stop", not
            above 0.
    """
    layers = list(layers)
    given = value if isinstance(value, Mapping) else {"*": value}
    for pattern, number in given.items():
        if not isinstance(number, Real) or math.isnan(number):
            raise ValueError(f"{name} must be a number, got {number!r} for {pattern!r}.")
        if name == "iter_stop" and number <= 0:
            raise ValueError(f"iter_stop must be above 0, got {number!r} for {pattern!r}.")
        if not any(_fits(pattern, layer) for layer in layers):
            raise ValueError(f"{name} has {pattern!r}, which matches none of the layers {layers}.")
    return {
        layer: given[layer]
        if layer in given
        else next((number for p, number in given.items() if _fits(p, layer)), default)
        for layer in layers
    }


def _patterns(patterns: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _entries(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for name, layer in module.named_modules():
        for own, parameter in layer.named_parameters(recurse=False):
            yield name, layer, own, parameter


def _fits(pattern: str, layer: str, own: str | None = None) -> bool:
    names = list(accumulate(layer.split("."), "{}.{}".format))  # the layer and what holds it
    if own is not None:
        names.append(f"{layer}.{own}" if layer else own)
    return any(fnmatchcase(name, pattern) for name in names)


def _check_known(patterns: Iterable[str], module: nn.Module) -> None:
    parameters = module.named_parameters(remove_duplicate=False)
    names = [name for name, _ in (*module.named_modules(), *parameters)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"exclude has {pattern!r}, which matches no name in the module; see "
                "module.named_parameters()."
            )


def _check_not_named(patterns: Iterable[str], name: str) -> None:
    for pattern in patterns:
        if not any(sign in pattern for sign in "*?["):
            raise ValueError(
                f"include has {pattern!r}, but {name!r} is frozen, and frozen parameters are never "
                "pruned; leave it out, or set its requires_grad before."
            )
