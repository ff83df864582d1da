"""Captions and classes as what a pipeline's denoiser takes, encoded by the pipeline itself."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from morse.dot.fingerprint import quantization_of
from morse.training.guidance import Conditions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# So many captions are encoded once, at the start; of more, each batch's own.
MOST_KEPT = 1024
_BATCH_SIZE = 32
Kind = Literal["none", "text", "classes"]
Encode = Callable[[list[str] | list[int]], dict[str, Tensor]]


@dataclass(frozen=True)
class ConditionEncoder:
    """How one pipeline encodes conditions.

    Attributes:
        kind: What it is conditioned on.
        encode: Gives the denoiser's arguments for n captions or classes, (n, ...) each, on the
            pipeline's device; see `Conditions.positive` for their names.
        negative: The same for guidance's negative branch, (1, ...); None where there is none.
        models: The text encoders.
    """

    kind: Kind
    encode: Encode
    negative: dict[str, Tensor] | None
    models: tuple[nn.Module, ...] = ()

    def rest(self) -> None:
        """Move the text encoders to the CPU until `encode` is called again: they are large."""
        _move(self.models, "cpu")
        torch.cuda.empty_cache()  # does nothing without a GPU


def _move(models: tuple[nn.Module, ...], device: torch.device | str) -> None:
    """Move text encoders, but for quantized ones, which refuse it."""
    for model in models:
        if quantization_of(model) is None:
            model.to(device)


def make_encoder(pipe: "DiffusionPipeline", denoiser: nn.Module, size: int) -> ConditionEncoder:
    """Find out what a pipeline's denoiser is conditioned on.

    Args:
        pipe: The pipeline, on its device.
        denoiser: Its unet or transformer.
        size: Height and width of the images, which SDXL is told.

    Raises:
        ValueError: If it takes conditions that training does not know.
    """
    if denoiser.config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"{type(pipe).__name__}'s denoiser takes the guidance scale as an input, as latent "
            "consistency models do; train_dot does not handle it: give a pipeline with ordinary "
            "classifier-free guidance."
        )
    if denoiser.config.get("class_embed_type") is not None:
        raise ValueError(
            f"{type(pipe).__name__}'s denoiser has class_embed_type "
            f"{denoiser.config.class_embed_type!r}, but train_dot knows classes by their number "
            "only: give a pipeline whose denoiser has num_class_embeds alone, or takes no classes."
        )
    if hasattr(pipe, "encode_prompt"):
        return _text_encoder(pipe, denoiser, size)
    if type(denoiser).__name__ == "DiTTransformer2DModel":
        # The last embedding is that of no class (Peebles and Xie 2023), as DiTPipeline uses it.
        return _class_encoder(denoiser.device, null=denoiser.config.num_embeds_ada_norm)
    if denoiser.config.get("num_class_embeds") is not None:
        return _class_encoder(denoiser.device, null=None)
    if "encoder_hidden_states" in inspect.signature(type(denoiser).forward).parameters:
        raise ValueError(
            f"train_dot does not know how {type(pipe).__name__} encodes its conditions; give a "
            "text-to-image pipeline, such as StableDiffusionPipeline, a class-conditional or an "
            "unconditional one."
        )
    return ConditionEncoder("none", lambda values: {}, None)


def _class_encoder(device: torch.device, null: int | None) -> ConditionEncoder:
    def encode(classes: list[int]) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor(classes, device=device)}

    return ConditionEncoder("classes", encode, None if null is None else encode([null]))


@torch.no_grad()
def encode_prompts(
    pipe: "DiffusionPipeline", prompts: Sequence[str], device: torch.device
) -> tuple[Tensor, ...]:
    """Encode P prompts and, where the pipeline's kind has one, guidance's negative branch.

    Returns:
        What its `encode_prompt` returns: (P, ...) each, but for Flux's text ids.
    """
    parameters = inspect.signature(type(pipe).encode_prompt).parameters
    options: dict[str, object] = {"device": device, "num_images_per_prompt": 1}
    options |= {name: None for name in ("prompt_2", "prompt_3") if name in parameters}
    if "do_classifier_free_guidance" in parameters:
        options["do_classifier_free_guidance"] = True
    # T5 overflows under autocast to float16.
    with torch.autocast(device.type, enabled=False):
        return pipe.encode_prompt(prompt=list(prompts), **options)


def _text_encoder(pipe: "DiffusionPipeline", denoiser: nn.Module, size: int) -> ConditionEncoder:
    if pipe.text_encoder is None:
        raise ValueError(
            f"this {type(pipe).__name__} was saved without its text_encoder, which train_dot "
            "needs for captions; save the pipeline with it."
        )
    time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=denoiser.device).float()
    arrange = _arrangement(pipe, denoiser)
    parts = (getattr(pipe, f"text_encoder{number}", None) for number in ("", "_2", "_3"))
    models = tuple(part for part in parts if part is not None)

    def both(prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        _move(models, denoiser.device)
        named = arrange(encode_prompts(pipe, prompts, denoiser.device))
        if "added_cond_kwargs.text_embeds" in named[0]:
            for inputs in named:
                inputs["added_cond_kwargs.time_ids"] = time_ids.expand(len(prompts), -1)
        return named

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        chunks = [
            both(prompts[start : start + _BATCH_SIZE])[0]
            for start in range(0, len(prompts), _BATCH_SIZE)
        ]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    return ConditionEncoder("text", encode, both([""])[1], models)


def _arrangement(
    pipe: "DiffusionPipeline", denoiser: nn.Module
) -> Callable[[tuple[Tensor, ...]], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Give what sorts `encode_prompt`'s outputs into positive and negative arguments."""
    if type(denoiser).__name__ == "SD3Transformer2DModel":  # Flux's takes pooled text, too
        names = ("encoder_hidden_states", "pooled_projections")
    elif denoiser.config.get("addition_embed_type") == "text_time":  # SDXL
        names = ("encoder_hidden_states", "added_cond_kwargs.text_embeds")
    elif type(denoiser).__name__ == "UNet2DConditionModel" and not denoiser.config.get(
        "addition_embed_type"
    ):
        names = ("encoder_hidden_states",)
    else:
        raise ValueError(
            f"train_dot does not know the text conditions of {type(denoiser).__name__} in "
            f"{type(pipe).__name__}; known are those of Stable Diffusion, SDXL and Stable "
            "Diffusion 3."
        )

    def arrange(found: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        # Positive and negative embeddings alternate. In half precision, as caches keep them.
        halves = [tensor.half() for tensor in found[: 2 * len(names)]]
        return dict(zip(names, halves[::2], strict=True)), dict(
            zip(names, halves[1::2], strict=True)
        )

    return arrange


class ConditionTable:
    """The different captions or classes of a data set, by number.

    Args:
        encoder: The pipeline's.
        values: The captions or classes.
    """

    def __init__(self, encoder: ConditionEncoder, values: Sequence[str] | Sequence[int]) -> None:
        """Encode all of them if they are few."""
        self.encoder, self.values = encoder, list(values)
        self._all = self.encode(range(len(self.values))) if len(values) <= MOST_KEPT else None

    @property
    def is_encoded(self) -> bool:
        """Whether all of them are encoded, so that `look_up` has no more to encode."""
        return self._all is not None

    def encode(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Encode the captions or classes of these numbers, (n, ...) each."""
        return self.encoder.encode([self.values[number] for number in numbers])

    def look_up(self, numbers: Tensor, guidance_scale: Tensor | None = None) -> Conditions:
        """Give the conditions of numbers (B,), on the pipeline's device."""
        if self._all is not None:
            found, rows = self._all, numbers
        else:
            different, rows = numbers.cpu().unique(return_inverse=True)
            found = self.encode(different.tolist())
        positive = {name: value[rows.to(value.device)] for name, value in found.items()}
        return Conditions(positive, self.encoder.negative or {}, guidance_scale)
