"""What methods take that classes of a user's own put around others'."""

import inspect
from collections.abc import Callable
from functools import cache

from torch import nn

_OPEN = {inspect.Parameter.VAR_POSITIONAL: "args", inspect.Parameter.VAR_KEYWORD: "kwargs"}


def find_signature(kind: type, method: str) -> inspect.Signature:
    """Give what a class's method takes, `self` first, with what it only hands on by name.

    A subclass that puts something around diffusers' own method may take `*args` and `**kwargs`:
    what these stand for is in the class that it derives from.

    Args:
        kind: The class.
        method: Name of the method.

    Returns:
        What is handed on by `**kwargs` alone is keyword-only; arguments that no class names are
        left as "args" and "kwargs".
    """
    # An `nn.Module` has a `forward` that raises.
    owners = [each for each in kind.__mro__ if method in vars(each) and each is not nn.Module]
    return _join_signatures(*(vars(each)[method] for each in owners))


@cache  # by the functions, for a class's method may be put in another's place at any time
def _join_signatures(*methods: Callable) -> inspect.Signature:
    named: dict[str, inspect.Parameter] = {}
    handed_on = set(_OPEN)
    for method in methods:
        own = inspect.signature(method).parameters.values()
        for parameter in own:
            if parameter.kind in _OPEN or parameter.name in named:
                continue
            optional = any(before.default is not before.empty for before in named.values())
            # Python has no required arguments behind optional ones.
            misplaced = parameter.default is parameter.empty and optional
            if misplaced or inspect.Parameter.VAR_POSITIONAL not in handed_on:
                parameter = parameter.replace(kind=parameter.KEYWORD_ONLY)
            named[parameter.name] = parameter
        handed_on &= {parameter.kind for parameter in own}
        if not handed_on:
            break
    rest = [inspect.Parameter(_OPEN[each], each) for each in handed_on]
    return inspect.Signature(sorted([*named.values(), *rest], key=lambda each: each.kind))
