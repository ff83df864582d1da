"""MorsePipeline: any diffusers pipeline together with its Dot, loaded and saved as one."""

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline

from morse.attach import enable_morse, inherit_dot, morse_class
from morse.calls import MorseCalls
from morse.dot import MorseDot
from morse.dot.loading import FETCH_OPTIONS, loading_from, safetensors_only
from morse.sampling import Dot
from morse.schedulers import check_scheduler, make_scheduler

EMBEDDED = {"fashion-mnist": "fashion_mnist", "fashion-mnist-text": "fashion_mnist_text"}

_HUB_OPTIONS = (*FETCH_OPTIONS, "torch_dtype", "dtype", "variant")


class _IsAttached(type):
    """Makes every pipeline with Morse attached an instance."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, MorseCalls)


class MorsePipeline(metaclass=_IsAttached):
    """Loads pipelines with their Dots; what it returns is the diffusers pipeline, sped up.

    The pipeline keeps its class's name and everything that its call takes; what is new is described
    in `morse.calls.MorseCalls`. `save_pretrained` writes a folder that plain diffusers opens too,
    without the Dot; where its scheduler is leapfrog, after `from morse import LeapfrogScheduler` or
    `FlowMatchLeapfrogScheduler`.
    """

    def __new__(cls, *args: object, **kwargs: object) -> object:
        """Refuse: a MorsePipeline is always made from another pipeline."""
        raise TypeError("use MorsePipeline.from_pretrained(path) or MorsePipeline.from_pipe(pipe).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        dot: MorseDot | str | os.PathLike | None = None,
        scheduler: str | object | None = None,
        merge_lora: bool = True,
        **kwargs: object,
    ) -> DiffusionPipeline:
        """Load a pipeline and its Dot.

        Args:
            pretrained_model_name_or_path: "fashion-mnist" or "fashion-mnist-text" (both come with
                the package), a folder, or the id of a pipeline on the hub. A component that it was
                saved without, such as the largest text encoder of SD3, is None.
            dot: A Dot, or where one is saved (see `load_dot`); None for the one saved with the
                pipeline, if any.
            scheduler: A scheduler, or the name of one (`morse.schedulers.SCHEDULERS`), made with
                the pipeline's own scheduler's config, but for a `timestep_spacing` left at its
                default, and without clipping where that has none. For models trained by flow
                matching names mean its schedulers.
            merge_lora: See `enable_morse`.
            kwargs: As for `DiffusionPipeline.from_pretrained`; only safetensors are read. Of these
                `revision` is the pipeline's, and with it of a Dot that is saved there.

        Returns:
            A pipeline of the class that was saved, which is also a `MorsePipeline` to `isinstance`.

        Raises:
            OSError: If something is missing there, or weights are not in safetensors.
            ValueError: If the Dot belongs to another Dash, the scheduler is unknown, or a Dot of
                the user's own class is saved with the pipeline and `dot` is not given.
        """
        path = _resolve(pretrained_model_name_or_path)
        kwargs = safetensors_only(kwargs)
        hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        config = DiffusionPipeline.load_config(path, **hub_options)
        dot_class = config.get("dot", (None, None))[1]
        dot = _find_dot(dot, path, dot_class, **hub_options)
        loader = DiffusionPipeline
        if dot_class is not None and hasattr(diffusers, config["_class_name"]):
            # Plain diffusers would load the folder too, with warnings about its `dot`.
            loader = morse_class(getattr(diffusers, config["_class_name"]), True)
            kwargs["dot"] = None
        kwargs = _absent_components(config) | kwargs
        try:
            pipe = loader.from_pretrained(path, **kwargs)
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            raise OSError(
                f"{path} has not all its weights in safetensors, and pickles are not read; convert "
                f"it once with diffusers, {config['_class_name']}.from_pretrained({str(path)!r})"
                '.save_pretrained("converted"), and give that folder.'
            ) from error
        return cls.from_pipe(pipe, dot, scheduler, merge_lora)

    @classmethod
    def from_pipe(
        cls,
        pipe: DiffusionPipeline,
        dot: Dot | str | os.PathLike | None = None,
        scheduler: str | object | None = None,
        merge_lora: bool = True,
    ) -> DiffusionPipeline:
        """Equip a pipeline in memory, as `enable_morse` does, and change its scheduler if asked.

        Args:
            pipe: A diffusers pipeline; on every error it stays as it is.
            dot: A Dot, or where one is saved (see `load_dot`); None for the one that the pipeline
                has or, where diffusers' `from_pipe` made it of another pipeline's parts, the one
                that had, with N as set or measured there.
            scheduler: As for `from_pretrained`.
            merge_lora: See `enable_morse`; of no effect on a Dot that is in use.

        Returns:
            The same pipeline, changed. `disable_morse` takes Dot off again; the scheduler stays.

        Raises:
            OSError: If no Dot is saved there.
            TypeError: If `scheduler` is a class.
            ValueError: As `from_pretrained`.
        """
        if isinstance(dot, (str, os.PathLike)):
            dot = load_dot(dot)
        if isinstance(scheduler, type):
            name = scheduler.__name__
            raise TypeError(f"scheduler is the class {name}; give its name or an object.")
        if isinstance(scheduler, str):
            scheduler = make_scheduler(scheduler, pipe.scheduler.config)
        if scheduler is not None:
            check_scheduler(pipe, scheduler)
        if dot is not None or getattr(inherit_dot(pipe), "dot", None) is None:
            enable_morse(pipe, dot, merge_lora)
        if scheduler is not None:
            pipe.scheduler = scheduler
        return pipe


def load_dot(path: str | os.PathLike, **kwargs: object) -> MorseDot:
    """Load a Dot that lies by itself or in the `dot` folder of a pipeline.

    Args:
        path: A folder, or the id of a Dot or a pipeline on the hub. For another subfolder or
            revision, load it by `MorseDot.from_pretrained(path, subfolder=..., revision=...)`.
        kwargs: As for `MorseDot.from_pretrained`.

    Raises:
        OSError: If neither holds a Dot.
    """
    with loading_from("dot", path):
        return _load_either(path, **kwargs)


def _find_dot(
    dot: MorseDot | str | os.PathLike | None,
    path: str | os.PathLike,
    dot_class: str | None,
    **hub_options: object,
) -> MorseDot | None:
    """Load the Dot that was asked for, or else the one of `dot_class` saved with a pipeline."""
    for name in ("torch_dtype", "dtype"):
        if not isinstance(hub_options.get(name), torch.dtype):
            hub_options.pop(name, None)  # one for each component, say: Dot follows its Dash
    if isinstance(dot, (str, os.PathLike)):
        # A revision is one of the pipeline's repository.
        hub_options.pop("revision", None)
        return load_dot(dot, **hub_options)
    if dot is not None or dot_class is None:
        return dot
    if dot_class == MorseDot.__name__:
        return _load_variant(path, "dot", **hub_options)
    raise ValueError(
        f"{path} was saved with a Dot of the class {dot_class!r}, which only its own code can "
        "load; load it there and pass dot=..., or a callable, or a saved MorseDot."
    )


def _load_either(path: str | os.PathLike, **kwargs: object) -> MorseDot:
    if (Path(path) / "dot").is_dir():
        return _load_variant(path, "dot", **kwargs)
    try:
        return _load_variant(path, None, **kwargs)
    except OSError as error:
        if Path(path).exists() or "config.json" not in str(error):
            raise
        try:
            return _load_variant(path, "dot", **kwargs)
        except OSError:
            raise OSError(
                'no Dot was found in its root, nor in the subfolder "dot"; for another place '
                "pass dot=MorseDot.from_pretrained(id, subfolder=..., revision=...). In its root: "
                f"{error}"
            ) from error


def _load_variant(
    path: str | os.PathLike, subfolder: str | None, variant: str | None = None, **kwargs: object
) -> MorseDot:
    """Load a Dot in a variant ("fp16") if it was saved so, else its main weights, as diffusers."""
    if variant is not None:
        try:
            return MorseDot.from_pretrained(path, subfolder=subfolder, variant=variant, **kwargs)
        except OSError as error:
            if variant not in str(error):
                raise
    return MorseDot.from_pretrained(path, subfolder=subfolder, **kwargs)


def _absent_components(config: Mapping[str, object]) -> dict[str, None]:
    """Name the components that a pipeline was saved without, by its model_index.json.

    diffusers opens it only if it is told that each of them is None, as the result does.
    """
    return {name: None for name, value in config.items() if value == [None, None]}


def _resolve(path: str | os.PathLike) -> str | os.PathLike:
    if path in EMBEDDED:
        return str(files("morse") / "assets" / EMBEDDED[path])
    return path
