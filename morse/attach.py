"""Attach Morse to a diffusers pipeline that exists, and take it off again.

Nothing of the pipeline is rewritten: its class is replaced by a subclass of the same name whose
`__call__` also takes `lsd=` and the like, plans the run and leaves the rest to the pipeline.
"""

import inspect
from functools import cache

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import FrozenDict

from morse.calls import MorseCalls
from morse.denoisers import find_controlnet, find_denoiser, find_denoisers
from morse.dot import MorseDot
from morse.sampling import Dot
from morse.switch import install_switch, remove_switch


def _register_dot(pipe: DiffusionPipeline, dot: Dot | None) -> None:
    pipe.register_modules(dot=dot)
    if isinstance(dot, MorseDot):
        # What model_index.json will say; diffusers would write the inner module's name.
        pipe.register_to_config(dot=("morse", "MorseDot"))


@cache
def morse_class(base: type[DiffusionPipeline], dot_is_component: bool) -> type:
    """Subclass a pipeline class under its own name, with an optional component `dot` if asked."""
    members: dict[str, object] = {"__module__": base.__module__, "_morse_base": base}
    if dot_is_component:
        signature = inspect.signature(base.__init__)
        dot = inspect.Parameter("dot", inspect.Parameter.KEYWORD_ONLY, default=None)

        def __init__(self: object, *args: object, dot: Dot | None = None, **kwargs: object) -> None:
            base.__init__(self, *args, **kwargs)
            _register_dot(self, dot)

        __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), dot])
        members["__init__"] = __init__
        members["_optional_components"] = [*base._optional_components, "dot"]
    return type(base.__name__, (MorseCalls, base), members)


def enable_morse(
    pipe: DiffusionPipeline, dot: Dot | None, merge_lora: bool = True
) -> DiffusionPipeline:
    """Let `pipe` make some of its evaluations with `dot`; returns the same pipeline.

    Args:
        pipe: A diffusers pipeline. A call without `lsd=` or another plan stays bit-identical.
        dot: A `MorseDot`, or any callable (sample, timestep, jump) -> residual; None for none.
        merge_lora: Merge a MorseDot's LoRA into a copy of Dash's weights: faster, at the memory
            of that copy.

    Raises:
        ValueError: If the Dot belongs to another Dash, or the pipeline has no denoiser.
    """
    disable_morse(pipe)
    denoiser = find_denoiser(pipe)
    if isinstance(dot, MorseDot):
        dot.eval().bind(denoiser)
        if merge_lora:
            dot.merge_lora()
    is_component = isinstance(dot, ModelMixin)
    pipe.__class__ = morse_class(type(pipe), is_component)
    if is_component:
        _register_dot(pipe, dot)
    else:
        pipe.dot = dot
    pipe.speed_ratio = dot.config.speed_ratio if isinstance(dot, MorseDot) else None
    pipe.measured = pipe.last_run = None
    for module in find_denoisers(pipe).values():
        install_switch(module)
    return pipe


def disable_morse(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Undo `enable_morse`; returns the same pipeline, which is safe to pass when it had none."""
    base = getattr(type(pipe), "_morse_base", None)
    if base is None:
        return pipe
    for module in filter(None, (*find_denoisers(pipe).values(), find_controlnet(pipe))):
        remove_switch(module)
    pipe.__class__ = base
    for name in ("dot", "speed_ratio", "measured", "last_run"):
        vars(pipe).pop(name, None)
    config = {name: value for name, value in pipe.config.items() if name != "dot"}
    pipe._internal_dict = FrozenDict(config)
    return pipe
