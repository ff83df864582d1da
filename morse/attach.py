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
from morse.prepare import prepare_dot, recall, remember
from morse.sampling import Dot
from morse.slot import remove_switch


def _register_dot(pipe: DiffusionPipeline, dot: Dot | None) -> None:
    pipe.register_modules(dot=dot)
    pipe.speed_ratio = dot.config.speed_ratio if isinstance(dot, MorseDot) else None
    if isinstance(dot, MorseDot):
        # What model_index.json will say; diffusers would write the inner module's name.
        pipe.register_to_config(dot=("morse", "MorseDot"))


@cache
def morse_class(base: type[DiffusionPipeline], dot_is_component: bool) -> type:
    """Subclass a pipeline class under its own name, with an optional component `dot` if asked."""
    members: dict[str, object] = {"__module__": base.__module__, "_morse_base": base}

    def from_pipe(cls: type, pipeline: DiffusionPipeline, **kwargs: object) -> DiffusionPipeline:
        return inherit_dot(base.from_pipe(pipeline, **kwargs))

    members["from_pipe"] = classmethod(from_pipe)
    if dot_is_component:
        signature = inspect.signature(base.__init__)
        dot = inspect.Parameter("dot", inspect.Parameter.KEYWORD_ONLY, default=None)

        # Not `Dot`: diffusers checks components by these hints and can't read a Callable's.
        def __init__(
            self: object, *args: object, dot: ModelMixin | None = None, **kwargs: object
        ) -> None:
            base.__init__(self, *args, **kwargs)
            _register_dot(self, dot)

        __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), dot])
        members["__init__"] = __init__
        members["_optional_components"] = [*base._optional_components, "dot"]
    return type(base.__name__, (MorseCalls, base), members)


def enable_morse(
    pipe: DiffusionPipeline, dot: Dot | None, merge_lora: bool | None = True
) -> DiffusionPipeline:
    """Let `pipe` make some of its evaluations with `dot`; returns the same pipeline.

    Args:
        pipe: A diffusers pipeline. A call without `lsd=` or another plan stays bit-identical.
        dot: A `MorseDot`, or any callable (sample, timestep, jump, **conditions) -> residual, with
            the conditions as the pipeline gives them to Dash: a text's embedding, say. None for
            none.
        merge_lora: Merge a MorseDot's LoRA into a copy of Dash's weights: faster, at the memory
            of that copy. False takes a merged one apart; None leaves it as it is.

    Raises:
        TypeError: If `dot` is none of these. A Dot that the pipeline has stays on every error.
        ValueError: If the Dot belongs to another Dash, or the pipeline has no denoiser.
    """
    if dot is not None and not callable(dot):
        raise TypeError(
            f"dot is {dot!r}, but must be a MorseDot, a callable (sample, timestep, jump, "
            "**conditions) -> residual, or None; load a saved one by "
            "MorseDot.from_pretrained(path), or give its path to MorsePipeline.from_pipe."
        )
    denoiser = find_denoiser(pipe)
    prepare_dot(pipe, dot, denoiser)
    if isinstance(dot, MorseDot):
        dot.eval().bind(denoiser)
        if merge_lora is not None:
            dot.merge_lora() if merge_lora else dot.unmerge_lora()
    disable_morse(pipe)
    is_component = isinstance(dot, ModelMixin)
    pipe.__class__ = morse_class(type(pipe), is_component)
    if is_component:
        _register_dot(pipe, dot)
    else:
        pipe.dot, pipe.speed_ratio = dot, None
    pipe.measured = pipe.last_run = None
    remember(pipe, dot)
    return pipe


def inherit_dot(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Attach the Dot that was attached last to this pipeline's denoiser, with its settings.

    diffusers' `from_pipe` makes a bare pipeline of the same parts; this gives it its Dot again.
    A pipeline whose denoiser knows of no Dot, or that has a Dot already, stays as it is.
    """
    dot, other = recall(find_denoiser(pipe))
    if dot is None or getattr(pipe, "dot", None) is not None:
        return pipe
    _drop_from_config(pipe, "_dot")  # where `from_pipe` notes what the new class does not take
    enable_morse(pipe, dot, merge_lora=None)
    if other is not None:
        pipe.speed_ratio, pipe.measured = other.speed_ratio, other.measured
    return pipe


def disable_morse(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Undo `enable_morse`; returns the same pipeline, which is safe to pass when it had none."""
    base = getattr(type(pipe), "_morse_base", None)
    if base is None:
        return pipe
    for module in (*find_denoisers(pipe).values(), find_controlnet(pipe)):
        if module is not None:
            remove_switch(module)
    pipe.__class__ = base
    for name in ("dot", "speed_ratio", "measured", "last_run"):
        vars(pipe).pop(name, None)
    _drop_from_config(pipe, "dot")
    return pipe


def _drop_from_config(pipe: DiffusionPipeline, name: str) -> None:
    pipe._internal_dict = FrozenDict({k: v for k, v in pipe.config.items() if k != name})
