"""A model that peers change and give back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

REPLACED = {"forward", "_diffusers_hook"}  # attributes that peers put others in the place of


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Give modules the attributes and sub-modules back that they had, where peers change them.

    What peers leave behind as attributes of the objects would hide what is set on the classes
    later, so that is removed too. Hooks are theirs to remove.
    """
    before = {m: {**vars(m), "_modules": dict(m._modules)} for m in model.modules()}
    try:
        yield
    finally:
        for module, attributes in before.items():
            for name in set(vars(module)) - set(attributes):
                delattr(module, name)
            for name in set(module._modules) - set(attributes["_modules"]):
                del module._modules[name]
            for name in REPLACED & set(attributes):
                setattr(module, name, attributes[name])
