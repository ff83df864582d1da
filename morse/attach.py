"""Attach Morse to a diffusers pipeline that exists, and take it off again.

Nothing of the pipeline is rewritten: its class is replaced by a subclass of the same name whose
`__call__` also takes `lsd=` and the like, plans the run and leaves the rest to the pipeline.
"""

import inspect
import json
import os
from functools import cache
from pathlib import Path
from types import FunctionType

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import FrozenDict

from morse.calls import MorseCalls
from morse.denoisers import find_denoiser
from morse.dot import MorseDot
from morse.prepare import DOT_IN_CONFIG, check_dot, forget, prepare_dot, recall, remember
from morse.sampling import Dot


class _Attached(MorseCalls):
    """What all classes made by `morse_class` have."""

    def __reduce_ex__(self, protocol: int) -> tuple | str:
        """Pickle and copy by what the class was made of, for no module has it."""
        made_of = vars(type(self)).get("_made_of")
        if made_of is None:  # a subclass with a home of its own
            return super().__reduce_ex__(protocol)
        return _new, made_of, {**vars(self), "last_run": None}

    def __setattr__(self, name: str, value: object) -> None:
        """Set a component; the first Dot that can be saved makes `dot` one."""
        made_of = vars(type(self)).get("_made_of")  # a subclass with a home of its own has none
        if name == "dot" and isinstance(value, ModelMixin) and made_of and not made_of[1]:
            self.__class__ = morse_class(self._morse_base, True)
            self.register_modules(dot=value)
        else:
            super().__setattr__(name, value)


class _KeepsDot:
    """Writes `dot` into `model_index.json` without a library, and reads it as ours.

    diffusers downloads no pipeline from the hub with a component of a library unknown to it, unless
    its code comes along and is trusted. One without a library it leaves aside.
    """

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write the config, for `save_pretrained`."""
        index = json.loads(self.to_json_string())
        if index["dot"] == list(DOT_IN_CONFIG):
            index["dot"][0] = None
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        Path(json_file_path).write_text(text, encoding="utf-8")

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, object], **kwargs: object) -> tuple:
        """Tell diffusers which components to load, when it loads a pipeline of this class."""
        if (config_dict.get("dot") or (None, None))[1] == DOT_IN_CONFIG[1]:
            config_dict = {**config_dict, "dot": DOT_IN_CONFIG}
        return super().extract_init_dict(config_dict, **kwargs)


def _new(base: type[DiffusionPipeline], dot_is_component: bool) -> DiffusionPipeline:
    attached = morse_class(base, dot_is_component)
    return attached.__new__(attached)


def _call_of(base: type[DiffusionPipeline]) -> FunctionType:
    """Copy Morse's call under the signature of a pipeline's own, with what Morse adds to it."""
    call = MorseCalls.__call__
    added = inspect.signature(call).parameters.values()
    parameters = {
        **inspect.signature(base.__call__).parameters,
        **{each.name: each for each in added if each.kind is each.KEYWORD_ONLY},
    }
    # Not a wrapper around it: warnings name the line that is so many frames up.
    copied = FunctionType(call.__code__, call.__globals__, call.__name__, closure=call.__closure__)
    copied.__kwdefaults__, copied.__doc__ = call.__kwdefaults__, call.__doc__
    by_kind = sorted(parameters.values(), key=lambda each: each.kind)
    copied.__signature__ = inspect.Signature(by_kind)
    return copied


@cache
def morse_class(base: type[DiffusionPipeline], dot_is_component: bool) -> type:
    """Subclass a pipeline class under its own name, with an optional component `dot` if asked."""
    members: dict[str, object] = {"__module__": base.__module__, "_morse_base": base}
    members |= {"_made_of": (base, dot_is_component), "__call__": _call_of(base)}
    parents: tuple[type, ...] = (_Attached, base)

    def from_pipe(cls: type, pipeline: DiffusionPipeline, **kwargs: object) -> DiffusionPipeline:
        if getattr(pipeline, "dot", None) is not None:
            remember(pipeline, pipeline.dot)  # others of the same parts may have set theirs since
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
            self.register_modules(dot=dot)

        __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), dot])
        members["__init__"] = __init__
        members["_optional_components"] = [*base._optional_components, "dot"]
        parents = (_Attached, _KeepsDot, base)
    return type(base.__name__, parents, members)


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
        TypeError: If `dot` is none of these, or what `torch.compile` made of one: compile it in
            place (`dot.compile()`). A Dot that the pipeline has stays on every error.
        ValueError: If the Dot belongs to another Dash, Dash is quantized, or the pipeline has no
            denoiser.
    """
    check_dot(dot)
    denoiser = find_denoiser(pipe)
    if isinstance(dot, MorseDot):
        dot.check_dash(denoiser)  # before its weights are rounded to another precision
        prepare_dot(pipe, dot, denoiser)
        dot.eval().adopt(denoiser)
        if merge_lora is not None:
            dot.merge_lora() if merge_lora else dot.unmerge_lora()
    disable_morse(pipe)
    pipe.__class__ = morse_class(type(pipe), False)
    pipe.dot = dot
    pipe.last_run = None
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
    forget(pipe)
    pipe.__class__ = base
    for name in ("dot", "speed_ratio", "measured", "last_run"):
        vars(pipe).pop(name, None)
    _drop_from_config(pipe, "dot")
    return pipe


def _drop_from_config(pipe: DiffusionPipeline, name: str) -> None:
    pipe._internal_dict = FrozenDict({k: v for k, v in pipe.config.items() if k != name})
