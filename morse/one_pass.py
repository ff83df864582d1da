"""One Dot pass under classifier-free guidance: what a Dot of guided estimates sees of a call.

diffusers' pipelines put the rows of the negative prompt before those of the prompt, evaluate the
denoiser once and go on with u + w (c - u). A Dot of guided estimates (`morse.dot.guidance`) is
evaluated on the second half of the rows. Its estimate g is returned for both halves, from which the
pipeline makes g + w (g - g) = g. Of Dash's evaluations their combination alone is kept.

That holds for pipelines known to do just this. In others Dash runs, with the reason counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from morse.denoisers import Call, result_of
from morse.estimates import LatestEstimate, keep_estimate
from morse.sampling import Dot
from morse.spaces import Rates

# Those read, by the class whose __call__ runs. Not there: SDXL's ControlNets, which keep a scale
# of their own, and whatever has more branches or combines them otherwise.
_KNOWN = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)


def combines_branches(pipe: DiffusionPipeline) -> bool:
    """Tell whether a pipeline is known to combine two branches in the way described above."""
    callers = (each for each in type(pipe).__mro__ if "__call__" in vars(each))
    caller = next(each for each in callers if not each.__module__.startswith("morse."))
    return caller.__module__.startswith("diffusers.") and caller.__name__ in _KNOWN


def read_guidance(pipe: DiffusionPipeline) -> float | str:
    """Give the scale that a pipeline guides with at present, 1 without guidance.

    Returns:
        Why one pass can't be made, where it can't.
    """
    if not combines_branches(pipe):
        return "it is not known how the pipeline combines guidance's branches"
    if pipe.unet.config.time_cond_proj_dim is not None:
        return "the denoiser takes the guidance scale as an input"
    if getattr(pipe, "guidance_rescale", 0.0):
        return "guidance_rescale changes the guided estimate"
    return float(pipe.guidance_scale) if pipe.do_classifier_free_guidance else 1.0


@dataclass(frozen=True, eq=False)
class DotView:
    """What Dot is given of a call of the denoiser.

    Attributes:
        call: The rows that Dot is evaluated on.
        scale: With a Dot of guided estimates the guidance scale; else None.
        doubled: Whether `call` is half of the denoiser's rows.
        problem: Why Dot can't be evaluated; None if it can.
    """

    call: Call
    scale: float | None = None
    doubled: bool = False
    problem: str | None = None

    def keep(
        self, output: object, timestep: Tensor, rates: Rates | None, earlier: object
    ) -> LatestEstimate | str:
        """Keep of Dash's output what Dot needs, as `keep_estimate` does."""
        if self.problem is not None:
            return self.problem
        if self.doubled:
            output = self._guided(output)
        kept = keep_estimate(output, self.call.sample, timestep, rates, earlier)
        if self.scale is None or isinstance(kept, str):
            return kept
        # Once for all Dot evaluations, of which each would copy it from the CPU.
        scale = torch.full((), self.scale, dtype=torch.float32, device=self.call.sample.device)
        return replace(kept, jump=replace(kept.jump, guidance_scale=scale), scale=self.scale)

    def _guided(self, output: object) -> object:
        found = result_of(output)
        if found is None:
            return output
        negative, positive = found[0].chunk(2)
        # As the pipelines compute it, in their precision.
        return found[1](negative + self.scale * (positive - negative))

    def why_not(self, kept: LatestEstimate) -> str | None:
        """Say why Dot can't correct what was kept; None if it can."""
        if self.problem is not None or self.scale is None:
            return self.problem
        return None if kept.scale == self.scale else "the guidance scale changed"

    def answer(self, output: object) -> object:
        """Turn Dot's output into one with all of the denoiser's rows."""
        if not self.doubled:
            return output
        tensor, container = result_of(output)
        return container(torch.cat([tensor, tensor]))


def view_call(dot: Dot | None, call: Call, read_scale: Callable[[], float | str]) -> DotView:
    """Find out what Dot sees of a call.

    Args:
        dot: A Dot with the attribute `guidance` "guided" gets the rows of the prompt.
        call: The denoiser's.
        read_scale: As `read_guidance`.
    """
    scale = _scale(dot, read_scale)
    if scale is None:
        return DotView(call)
    if isinstance(scale, str):
        return DotView(call, problem=scale)
    doubled = scale != 1
    positive = _second_half(call) if doubled else call
    if isinstance(positive, str):
        return DotView(call, problem=positive)
    return DotView(positive, scale, doubled)


def needs_dash(
    dot: Dot | None, read_scale: Callable[[], float | str], latest: float | None
) -> bool:
    """Tell, before a call, whether guidance makes Dash run in Dot's place.

    Args:
        dot: As for `view_call`.
        read_scale: As `read_guidance`.
        latest: `DotView.scale` of Dash's latest evaluation.
    """
    scale = _scale(dot, read_scale)
    return scale is not None and scale != latest


def _scale(dot: Dot | None, read_scale: Callable[[], float | str]) -> float | str | None:
    """Give what `read_scale` says, as a Dot of guided estimates needs it; None for another Dot."""
    return read_scale() if getattr(dot, "guidance", "branches") == "guided" else None


def _second_half(call: Call) -> Call | str:
    """Take the rows of the prompt, or say why they can't be told apart."""
    rows = len(call.sample)
    if rows % 2:
        return "the rows of guidance's branches can't be told apart"
    problems: list[str] = []

    def half(value: object, name: str, strict: bool) -> object:
        if isinstance(value, dict):
            return {key: half(each, f"{name}.{key}", strict) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(half(each, name, strict) for each in value)
        if not isinstance(value, Tensor):
            return value
        if not strict or value.ndim == 0 or len(value) != rows:
            problems.append(f"{name} has no rows for guidance's branches")
            return value
        return value[rows // 2 :]

    conditions = {
        # These may hold masks for all rows, of which there can be as many as there are rows.
        name: half(value, name, strict=not name.endswith("attention_kwargs"))
        for name, value in call.conditions.items()
    }
    timestep = call.timestep
    if isinstance(timestep, Tensor) and timestep.ndim and len(timestep) == rows:
        timestep = timestep[rows // 2 :]
    return problems[0] if problems else Call(call.sample[rows // 2 :], timestep, conditions)
