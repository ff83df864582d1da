"""What the settings of all commands share: their options, checks of ranges, and their JSON.

Settings are frozen dataclasses, one a command.
"""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, field, fields
from typing import Any, Literal, TypeVar

Dtype = Literal["float32", "float16", "bfloat16"]  # of networks
MixedPrecision = Literal["no", "fp16", "bf16"]  # of autocast, as accelerate calls it
Config = TypeVar("Config")
Value = TypeVar("Value")
REQUIRED: Any = MISSING  # the default of an option that must be given
_GIVEN = "_given"  # attribute with the names of what was given


def option(default: Value, help: str, *, alias: str | None = None) -> Value:
    """Make a field of settings, which `morse.cli` turns into an option.

    Args:
        default: Its value where it is not given, or `REQUIRED`.
        help: What `--help` says of it.
        alias: Another name for it.
    """
    return field(default=default, metadata={"help": help, "alias": alias})


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise a `ValueError` that names the argument, what came and what is allowed."""
    if not ok:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def require_least(config: object, least: Mapping[str, float]) -> None:
    """Check that settings are not below their least values; of a tuple, that none of it is.

    Args:
        config: The settings; None is left out, and passes.
        least: Name -> least value.

    Raises:
        ValueError: For the first that is below.
    """
    for name, minimum in least.items():
        value = getattr(config, name)
        several = isinstance(value, tuple)
        values = value if several else () if value is None else (value,)
        allowed = f"{minimum} or more" + (" each" if several else "")
        require(all(each >= minimum for each in values), name, value, allowed)


def require_positive(config: object, names: Collection[str]) -> None:
    """Check that each of some numbers, unless it is None, is more than 0.

    Raises:
        ValueError: For the first that is not.
    """
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, name, value, "more than 0")


def require_places(
    config: object,
    folders: Collection[str] = (),
    files: Collection[str] = (),
    kept: Collection[str] = (),
) -> None:
    """Check that results can be written where settings say, before what may take hours.

    Args:
        config: The settings; None is left out, and passes.
        folders: Names of settings that are folders to write into; made if missing.
        files: Likewise files, whose folders are made if missing.
        kept: Likewise folders that may hold all that is needed: those may be read-only.

    Raises:
        ValueError: For the first that is, or lies in, what it cannot be written to.
    """
    for name in (*folders, *files, *kept):
        path = getattr(config, name)
        if path is None:
            continue
        if name in files and path.is_dir():
            raise ValueError(f"{name} is {path}, a folder; give the name of a file, in it or not")
        place = path.parent if name in files else path
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise ValueError(f"{name} is {path}, but {place} is a file; give another --{name}")
        if name not in kept and not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(
                f"{name} is {path}, but nothing can be written to {place}; give another --{name}"
            )


def make_given(config_class: type[Config], values: Mapping[str, object]) -> Config:
    """Make settings that know which of them were given, be they at their defaults (`given`)."""
    config = config_class.__new__(config_class)
    object.__setattr__(config, _GIVEN, frozenset(values))  # before its own checks ask
    config.__init__(**values)
    return config


def changed(config: object, names: Collection[str]) -> list[str]:
    """List those of some settings that are not at their defaults, in the dataclass' order."""
    return [
        each.name
        for each in fields(config)
        if each.name in names and getattr(config, each.name) != each.default
    ]


def given(config: object, names: Collection[str]) -> set[str]:
    """Name those of some settings that were given on a command line, or are `changed`."""
    return {*changed(config, names), *getattr(config, _GIVEN, frozenset()).intersection(names)}


def replace_defaults(config: object, values: Mapping[str, object]) -> None:
    """Give other values to those settings of a frozen dataclass that were not `given`."""
    kept = given(config, values)
    for each in fields(config):
        if each.name in values and each.name not in kept:
            object.__setattr__(config, each.name, values[each.name])


def as_json(config: object) -> dict[str, object]:
    """Return settings as a JSON file gives them back; what JSON has not, such as paths, as text."""
    return json.loads(json.dumps(asdict(config), default=str))
