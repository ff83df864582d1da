"""A pipeline's whole run as a network: noise in, samples out, and gradients for its Dot."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from morse.attach import enable_morse
from morse.denoisers import find_denoiser
from morse.evaluation.conditions import Conditions
from morse.saved_plans import SavedPlan, with_options
from morse.training.pruned import keep_zeros

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

    from morse.dot import MorseDot


def enable_with_gradients(pipe: "DiffusionPipeline", dot: "MorseDot") -> "DiffusionPipeline":
    """Attach a Dot as `enable_morse` does, so that gradients reach it through a call.

    diffusers' pipelines are decorated to compute none. All else than Dot is frozen, and a pruned
    Dot's zeros stay. Beside a Dash in half precision calls are under autocast of its kind.

    Args:
        pipe: A pipeline without Morse; its class is replaced.
        dot: Its Dot, whose LoRA will be beside Dash's weights.
    """
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    base, dash = type(pipe), find_denoiser(pipe)
    call = inspect.unwrap(base.__call__)
    if dash.dtype in (torch.float16, torch.bfloat16):
        call = torch.autocast(dash.device.type, dash.dtype)(call)
    members = {"__call__": call, "__module__": base.__module__}
    pipe.__class__ = type(base.__name__, (base,), members)
    enable_morse(pipe, dot, merge_lora=False)
    keep_zeros(dot.unmerge_lora().requires_grad_(True), dot)
    return pipe


class PlannedRun(NamedTuple):
    """How a run is made.

    Attributes:
        scheduler: Without the plan's own options.
        plan: Which evaluations, and on which grid.
        name: For messages and reports.
        guidance_scale: None for the pipeline's own default.
        target: The index of the targets that it is to come near to: one of each guidance scale.
    """

    scheduler: "SchedulerMixin"
    plan: SavedPlan
    name: str
    guidance_scale: float | None = None
    target: int = 0


class SampledRun(nn.Module):
    """Samples in one of several ways, the same noise for the same number.

    Args:
        pipe: From `enable_with_gradients`.
        runs: The ways, by their index.
        conditions: What samples are of, by their numbers; each run has its own guidance scale.
        seed: That of sample 0's noise; sample n's is n more.
        decode: Whether latents become images; without, samples are latents where there are any.
    """

    def __init__(
        self,
        pipe: "DiffusionPipeline",
        runs: Sequence[PlannedRun],
        conditions: Conditions,
        seed: int,
        decode: bool = False,
    ) -> None:
        """Take the pipeline's Dot as the part that is trained."""
        super().__init__()
        self.dot = pipe.dot
        self.pipe, self.runs, self.conditions, self.seed = pipe, tuple(runs), conditions, seed
        # Latents are compared as they are if they may: decoding them costs more than a run of Dot.
        # DiT's pipeline, which has no such processor, gives images alone.
        has_latents = getattr(pipe, "vae", None) is not None and hasattr(pipe, "image_processor")
        is_latent = has_latents and not decode
        self.output_type = "latent" if is_latent else "pt"

    def forward(self, numbers: Tensor, index: int) -> Tensor:
        """Sample the numbers (B,) by the run of this index.

        Returns:
            Images in [0, 1], or latents, (B, C, H, W).

        Raises:
            ValueError: If the pipeline gives no tensors.
        """
        wanted, run = numbers.tolist(), self.runs[index]
        generators = [torch.Generator().manual_seed(self.seed + number) for number in wanted]
        # A fresh one for each run: they hold on to estimates, here with all that led to them.
        self.pipe.scheduler = with_options(run.scheduler, run.plan.scheduler)
        conditions = replace(self.conditions, guidance_scale=run.guidance_scale)
        samples = self.pipe(
            generator=generators,
            output_type=self.output_type,
            plan=run.plan.plan,
            **conditions.arguments(wanted),
        ).images
        if not isinstance(samples, Tensor):
            raise ValueError(
                f"{type(self.pipe).__name__} gives no tensors for output_type="
                f"{self.output_type!r}, so that no Dot can be tuned through it."
            )
        return samples.float()
