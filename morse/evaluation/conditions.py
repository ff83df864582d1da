"""What a pipeline is asked for beside the noise: a prompt or a class, and how strongly.

An image's prompt depends on its number alone, so that every method, batch size and number of
processes asks for the same images.
"""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morse.denoisers import find_denoiser
from morse.signatures import find_signature

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


_BOTH = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
# What `encode_prompt` returns, as arguments of the call; text ids are no argument.
_ENCODED = {
    "StableDiffusionPipeline": _BOTH,
    "StableDiffusionXLPipeline": (*_BOTH, *_POOLED),
    "StableDiffusion3Pipeline": (*_BOTH, *_POOLED),
    "FluxPipeline": (_BOTH[0], _POOLED[0]),
}
_PROMPTS_AT_ONCE = 32
_OF_IMAGES = "ControlNet|Kontext|Inpaint"  # though diffusers lists them with those of text
_ASKED_FOR = ("prompt", "class_labels", "batch_size")  # what a call may take beside noise


@dataclass(frozen=True, eq=False)
class Conditions:
    """What images are asked for; image i takes prompt, label or row i modulo their number.

    Attributes:
        prompts: Texts.
        class_labels: Numbers of classes.
        embeds: A call's argument, such as "prompt_embeds" -> one row a prompt, (P, ...); a tensor
            of one row belongs to every prompt.
        guidance_scale: Handed to the pipeline; None for the pipeline's own default.
    """

    prompts: tuple[str, ...] = ()
    class_labels: tuple[int, ...] = ()
    embeds: Mapping[str, Tensor] = field(default_factory=dict)
    guidance_scale: float | None = None

    def arguments(self, images: Sequence[int]) -> dict[str, object]:
        """Return what the pipeline's call takes for images of these numbers."""
        arguments: dict[str, object] = {}
        if self.guidance_scale is not None:
            arguments["guidance_scale"] = self.guidance_scale
        if self.embeds:
            return arguments | {
                name: rows[[i % len(rows) for i in images]] for name, rows in self.embeds.items()
            }
        if self.prompts:
            return arguments | {"prompt": [self.prompts[i % len(self.prompts)] for i in images]}
        if self.class_labels:
            labels = [self.class_labels[i % len(self.class_labels)] for i in images]
            return arguments | {"class_labels": labels}
        return arguments | {"batch_size": len(images)}


UNCONDITIONAL = Conditions()


def make_conditions(
    pipe: "DiffusionPipeline",
    prompts: tuple[str, ...] = (),
    class_names: tuple[str, ...] = (),
    prompt_embeds: Path | None = None,
    guidance_scale: float | None = None,
) -> Conditions:
    """Find out what a pipeline is called with, and check that it was given.

    Args:
        pipe: With or without Morse.
        prompts: For a pipeline that takes text.
        class_names: The same as prompts there; for a class-conditional pipeline names that its
            `labels` know, or numbers.
        prompt_embeds: A safetensors file for a pipeline without a text encoder: "prompt_embeds"
            and what else its call takes, "negative_prompt_embeds" for example, one row a prompt.
        guidance_scale: As in `Conditions`.

    Raises:
        ValueError: If the pipeline takes none of what was given, or needs something else.
        FileNotFoundError: If there is no file `prompt_embeds`.
    """
    given = {"prompts": prompts, "class_names": class_names, "prompt_embeds": prompt_embeds}
    named = [name for name, value in given.items() if value]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} were given, but only one of them can be used")
    parameters, name = call_parameters(pipe), type(pipe).__name__
    if guidance_scale is not None and "guidance_scale" not in parameters:
        raise ValueError(f"guidance_scale was given, but {name} takes none; leave it out")
    if "prompt" in parameters:
        return _of_text(pipe, prompts or class_names, prompt_embeds, guidance_scale)
    if prompts or prompt_embeds:
        raise ValueError(f"prompts were given, but {name} takes none; leave out --{named[0]}")
    if "class_labels" in parameters:
        return Conditions(
            class_labels=_class_numbers(pipe, class_names), guidance_scale=guidance_scale
        )
    if class_names:
        raise ValueError(f"class_names were given, but {name} takes none; leave them out")
    return Conditions(guidance_scale=guidance_scale)


def encode_once(pipes: Iterable["DiffusionPipeline"], conditions: Conditions) -> Conditions:
    """Encode prompts for all runs to come, and let the text encoders go.

    Those of Stable Diffusion 3 and Flux take more memory than most GPUs have beside the denoiser.

    Args:
        pipes: They share their text encoders, which they have no more afterwards.
        conditions: Of these pipelines.

    Returns:
        The conditions with embeddings for prompts; as they were, and the encoders in place, where
        there are none or the pipelines' class is none of Stable Diffusion, SDXL, SD3 and Flux.
    """
    from morse.training.conditions import encode_prompts

    pipes = list(pipes)
    names = _ENCODED.get(base_class(pipes[0]).__name__)
    if names is None or not conditions.prompts:
        return conditions
    prompts, device = conditions.prompts, pipes[0]._execution_device
    chunks = [
        encode_prompts(pipes[0], prompts[start : start + _PROMPTS_AT_ONCE], device)
        for start in range(0, len(prompts), _PROMPTS_AT_ONCE)
    ]
    rows = (torch.cat(each) for each in zip(*chunks, strict=True))
    for pipe in pipes:
        encoders = [name for name in pipe.components if name.startswith("text_encoder")]
        pipe.register_modules(**dict.fromkeys(encoders))
    return replace(conditions, prompts=(), embeds=dict(zip(names, rows, strict=False)))


def base_class(pipe: "DiffusionPipeline") -> type:
    """Return a pipeline's class without what Morse adds."""
    return getattr(type(pipe), "_morse_base", type(pipe))


def call_parameters(pipe: "DiffusionPipeline") -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline's own call, without what Morse adds."""
    return find_signature(base_class(pipe), "__call__").parameters


def check_starts_from_noise(pipe: "DiffusionPipeline", name: str) -> None:
    """Raise `ValueError` for a pipeline, loaded as `name`, that takes images or other input."""
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as FROM_TEXT

    kind, parameters = base_class(pipe), call_parameters(pipe)
    # Some that make images of text take a picture beside it, if one likes.
    may_do_without = kind in FROM_TEXT.values() and not re.search(_OF_IMAGES, kind.__name__)
    takes_image = "image" in parameters and not (
        may_do_without and parameters["image"].default is None
    )
    if takes_image or not set(_ASKED_FOR) & set(parameters):
        raise ValueError(
            f"pipeline {name!r} is a {kind.__name__}, which takes "
            f"{list(parameters)[1:6]}; only pipelines that sample from noise and one of "
            f"{list(_ASKED_FOR)} are measured. Make the images of others by a script of your own "
            "and give their folder to `morse eval fid --fake`"
        )


def _of_text(
    pipe: "DiffusionPipeline",
    prompts: tuple[str, ...],
    file: Path | None,
    guidance_scale: float | None,
) -> Conditions:
    if file is not None:
        return Conditions(embeds=_read_embeds(pipe, file), guidance_scale=guidance_scale)
    name = type(pipe).__name__
    if not prompts:
        raise ValueError(
            f"{name} makes images from text; give --prompts, or --prompt_embeds FILE where it has "
            "no text encoder"
        )
    if "text_encoder" in pipe.components and pipe.text_encoder is None:
        raise ValueError(
            f"prompts were given, but this {name} has no text encoder; give --prompt_embeds FILE"
        )
    return Conditions(prompts=prompts, guidance_scale=guidance_scale)


def _read_embeds(pipe: "DiffusionPipeline", file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise FileNotFoundError(f"prompt_embeds is {file}, which does not exist")
    try:
        embeds = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"prompt_embeds is {file}, which is no safetensors file") from error
    unknown = sorted(set(embeds) - set(call_parameters(pipe)))
    if "prompt_embeds" not in embeds or unknown:
        raise ValueError(
            f"prompt_embeds is {file}, which holds {sorted(embeds)}; it must hold prompt_embeds "
            f"(P, L, D), and beside it only what a call of {type(pipe).__name__} takes"
        )
    dtype = pipe.dtype
    return {name: rows.to(pipe.device, dtype) for name, rows in embeds.items()}


def _class_numbers(pipe: "DiffusionPipeline", names: tuple[str, ...]) -> tuple[int, ...]:
    """Translate names of classes, or numbers written out, into numbers."""
    if not names:
        raise ValueError(
            f"{type(pipe).__name__} makes images of classes; give --class_names, names or numbers"
        )
    labels: Mapping[str, int] = getattr(pipe, "labels", None) or {}
    unknown = [name for name in names if name not in labels and not name.isdecimal()]
    if unknown:
        some = f"such as {list(labels)[:5]}" if labels else "and the pipeline has no names: numbers"
        raise ValueError(f"class_names has {unknown}, which are no classes; choose some, {some}")
    numbers = tuple(labels[name] if name in labels else int(name) for name in names)
    settings = find_denoiser(pipe).config
    count = settings.get("num_class_embeds") or settings.get("num_embeds_ada_norm")
    if count is not None and max(numbers) >= count:
        raise ValueError(
            f"class_names has {max(numbers)}, but {type(pipe).__name__} knows {count} classes; "
            f"choose numbers from 0 to {count - 1}"
        )
    return numbers
