"""Which pipelines, sizes of images and guidance scales can be trained for."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from morse.one_pass import combines_branches
from morse.training.conditions import ConditionEncoder
from morse.training.latents import LatentCodec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEFAULT_GUIDANCE = (2.0, 10.0)  # Morse, section 4.2


def frozen_dtypes(dtype: str, device: torch.device) -> dict[str, torch.dtype]:
    """Give the precision of a pipeline's components by name, as diffusers takes it.

    Raises:
        ValueError: If it is none that the device trains in.
    """
    if dtype == "float16" and device.type == "cpu":
        raise ValueError(
            "dtype is float16, in which a CPU does not train; give --dtype bfloat16 "
            "--mixed_precision bf16, or leave both out"
        )
    # Said of text encoders too, which else come in the precision that they were saved in. Some
    # autoencoders, SDXL's for one, overflow in float16.
    return {"default": getattr(torch, dtype), "vae": torch.float32}


def check_one_pass(pipe: "DiffusionPipeline", guidance_scale: tuple[float, float]) -> None:
    """Check that a pipeline is guided in a way that one pass can learn.

    Raises:
        ValueError: If it is not known how, or if there is no guidance.
    """
    if not combines_branches(pipe):
        raise ValueError(
            f"guidance is 'guided', but it is not known how {type(pipe).__name__} combines "
            "guidance's branches when sampling; use --guidance branches."
        )
    if guidance_scale[1] == 1:
        raise ValueError(
            f"guidance is 'guided', but guidance_scale is {guidance_scale}, which is none; give "
            "a range such as --guidance_scale 2 10, or --guidance branches."
        )


def check_channels(denoiser: nn.Module, codec: LatentCodec | None) -> None:
    """Check that a denoiser takes latents, or images, as they are and nothing beside them.

    Raises:
        ValueError: If it takes more channels.
    """
    given = denoiser.config.in_channels
    latents = given if codec is None else codec.vae.config.latent_channels
    if given == latents:
        return
    if given == 4 * latents:
        raise ValueError(
            f"the denoiser takes {given} channels, but the pipeline's latents have {latents}: it "
            "takes patches of 2 x 2, as Flux does. train_dot does not handle packed latents; give "
            "a pipeline whose denoiser packs them itself, such as StableDiffusion3Pipeline."
        )
    raise ValueError(
        f"the denoiser takes {given} channels, but the pipeline's latents have {latents}; "
        "train_dot does not handle packed latents, nor masks or images as further input, so train "
        "for the text-to-image pipeline."
    )


def choose_resolution(wanted: int | None, denoiser: nn.Module, factor: int, patch_size: int) -> int:
    """Give the height and width of images.

    Args:
        wanted: What was asked for; what the denoiser is made for if None.
        denoiser: The denoiser.
        factor: How many times smaller its samples are.
        patch_size: Side of its patches.

    Raises:
        ValueError: If the denoiser is not made for squares, or the size is no multiple of a patch.
    """
    if wanted is None:
        size = denoiser.config.get("sample_size")
        sides = set(size) if isinstance(size, (list, tuple)) else {size}
        if len(sides) != 1 or None in sides:
            raise ValueError(
                f"resolution is not given, and the denoiser's sample_size is {size}, but images "
                "are squares; give their height and width, such as --resolution 512."
            )
        wanted = sides.pop() * factor
    multiple = factor * patch_size
    if wanted < 1 or wanted % multiple:
        nearest = max(1, round(wanted / multiple)) * multiple
        raise ValueError(
            f"resolution is {wanted}; it must be a positive multiple of {multiple}, the side of "
            f"what the denoiser sees as one position: give --resolution {nearest}."
        )
    return wanted


def choose_guidance(
    wanted: tuple[float, ...] | None, encoder: ConditionEncoder
) -> tuple[float, float]:
    """Give the lowest and the highest scale; (1, 1) where there is nothing to guide away from.

    Raises:
        ValueError: If a scale was asked for there.
    """
    if encoder.negative is None:
        if wanted is not None and wanted[1] > 1:
            raise ValueError(
                f"guidance_scale is {wanted}, but this pipeline has no negative prompt or class "
                "to guide away from; leave --guidance_scale out."
            )
        return (1.0, 1.0)
    return DEFAULT_GUIDANCE if wanted is None else (wanted[0], wanted[1])
