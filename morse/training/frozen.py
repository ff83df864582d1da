"""The Dash of a training run: a pretrained denoiser that is evaluated and never changed."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from morse.spaces import PredictionType, check_prediction_type


@dataclass(frozen=True)
class FrozenDash:
    """A denoiser with its noise schedule; calling it gives the bare model output.

    Attributes:
        model: The denoiser, frozen and in evaluation mode.
        alphas_cumprod: (T,), on the denoiser's device.
        prediction_type: What it predicts.
    """

    model: nn.Module
    alphas_cumprod: Tensor
    prediction_type: PredictionType

    @torch.no_grad()
    def __call__(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Evaluate at `sample` (B, C, H, W) and `timestep` (B,)."""
        return self.model(sample, timestep, return_dict=False)[0].float()


def load_frozen_dash(path: str | os.PathLike, device: torch.device) -> FrozenDash:
    """Load the denoiser of a saved pipeline for training a Dot.

    Raises:
        ValueError: If the pipeline's noise schedule or prediction type is not handled.
    """
    from morse.denoisers import find_denoiser
    from morse.pipeline import MorsePipeline

    pipe = MorsePipeline.from_pretrained(path)
    alphas_cumprod = getattr(pipe.scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} has no alphas_cumprod; train_dot handles "
            "variance-preserving schedules, such as DDPM's."
        )
    check_prediction_type(pipe.scheduler.config.prediction_type)
    denoiser = find_denoiser(pipe).requires_grad_(False).eval().to(device)
    return FrozenDash(denoiser, alphas_cumprod.to(device), pipe.scheduler.config.prediction_type)
