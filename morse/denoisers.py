"""Which models of a pipeline are its denoisers, and how they are called.

Most pipelines have one, `unet` or `transformer`. Some have two: Wan 2.2's experts take turns,
Ideogram 4 has one without conditions. Each is switched on its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from morse.dot.wrapped import unwrap
from morse.sampling import Dot
from morse.signatures import find_signature

# What a pipeline has of the first group that it has anything of.
_GROUPS = (
    ("unet",),
    ("transformer", "transformer_2", "unconditional_transformer"),
    ("prior",),  # Kandinsky, Stable Cascade, Shap-E
    ("decoder",),  # Stable Cascade
)
_SAMPLE_NAMES = ("sample", "hidden_states", "latents", "x")
_TIMESTEP_NAMES = ("timestep", "timesteps", "timestep_ratio", "t")


@dataclass(frozen=True, eq=False)
class Denoiser:
    """One of a pipeline's denoisers: its name there, the model, and the Dot made for it if any."""

    name: str
    module: nn.Module
    dot: Dot | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call of a denoiser, taken apart; None conditions are left out.

    `return_dict` is as given or the model's default; None where it does not know it.
    """

    sample: Tensor
    timestep: Tensor | float
    conditions: dict[str, object]
    return_dict: bool | None = None


def find_denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Give a pipeline's denoisers by their names in it, the one that starts first.

    Raises:
        ValueError: If it has none that one scheduler steps; what it has is named.
    """
    for group in _GROUPS:
        found = {name: getattr(pipe, name, None) for name in group}
        found = {name: model for name, model in found.items() if isinstance(model, nn.Module)}
        if found and getattr(pipe, "scheduler", None) is not None:
            return found
    models = [name for name, part in vars(pipe).items() if isinstance(part, nn.Module)]
    raise ValueError(
        f"{type(pipe).__name__} has no unet or transformer to speed up, nor a prior or decoder, "
        f"that a `scheduler` steps; its models are {models}. Morse can't be attached to it."
    )


def find_denoiser(pipe: DiffusionPipeline) -> nn.Module:
    """Give the denoiser that starts, which a weight-shared Dot belongs to.

    Raises:
        ValueError: As `find_denoisers`.
    """
    return next(iter(find_denoisers(pipe).values()))


def find_controlnet(pipe: DiffusionPipeline) -> nn.Module | None:
    """Give a pipeline's `controlnet`, one or several in one module, or None."""
    controlnet = getattr(pipe, "controlnet", None)
    return controlnet if isinstance(controlnet, nn.Module) else None


def take_apart(module: nn.Module, args: tuple, kwargs: dict) -> Call | None:
    """Split the arguments of a call of a denoiser or ControlNet.

    Returns:
        None where there is no sample or no timestep among them, or the sample is no tensor.
    """
    signature = find_signature(type(unwrap(module)), "forward")
    given = dict(signature.bind(module, *args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    given.pop("self", None)
    known = signature.parameters.get("return_dict")
    return_dict = given.pop("return_dict", None if known is None else known.default)
    sample_name = next((name for name in _SAMPLE_NAMES if name in given), None)
    timestep_name = next((name for name in _TIMESTEP_NAMES if name in given), None)
    if timestep_name is None or not isinstance(given.get(sample_name), Tensor):
        return None
    sample, timestep = given.pop(sample_name), given.pop(timestep_name)
    conditions = {name: value for name, value in given.items() if value is not None}
    return Call(sample, timestep, conditions, return_dict)


def result_of(output: object) -> tuple[Tensor, Callable[[Tensor], object]] | None:
    """Give a denoiser's result and what puts another one into the same kind of container.

    Returns:
        None where there are several results, such as sound beside a video.
    """
    if isinstance(output, Tensor):
        return output, lambda tensor: tensor
    is_tuple = isinstance(output, tuple)
    results = [value for value in (output if is_tuple else output.values()) if value is not None]
    if len(results) != 1 or not isinstance(results[0], Tensor):
        return None
    if is_tuple:
        return results[0], lambda tensor: (tensor,)
    name = next(name for name, value in output.items() if value is results[0])
    return results[0], lambda tensor: type(output)(**{name: tensor})
