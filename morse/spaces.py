"""Conversions between what denoisers predict, on the variance-preserving path.

A noisy sample is x_t = alpha * x_0 + sigma * epsilon with alpha^2 + sigma^2 = 1 and
alpha^2 = `alphas_cumprod[t]`. The prediction types are diffusers': "epsilon" (Ho et al. 2020),
"sample" (x_0) and "v_prediction" (v = alpha * epsilon - sigma * x_0; Salimans and Ho 2022).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "sample", "v_prediction"]


def check_prediction_type(prediction_type: str) -> None:
    """Raise `ValueError` unless `prediction_type` is one of the three handled here."""
    if prediction_type not in get_args(PredictionType):
        raise ValueError(
            f"prediction_type must be one of {get_args(PredictionType)}, got {prediction_type!r}."
        )


def signal_and_noise(
    alphas_cumprod: Tensor, timestep: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Look up alpha and sigma, shaped to multiply `like`.

    Args:
        alphas_cumprod: The noise schedule, (T,), decreasing, in (0, 1).
        timestep: Integer training steps, (B,) or (); -1 is the clean end (alpha = 1, sigma = 0).
        like: A tensor (B, ...) whose device, dtype and number of dimensions to take.
    """
    index = timestep.to(like.device).long().reshape(-1)
    table = alphas_cumprod.to(like.device, torch.float32)
    squared = torch.where(index < 0, torch.ones((), device=like.device), table[index.clamp(min=0)])
    shape = (-1, *(1,) * (like.ndim - 1))
    return (
        squared.sqrt().reshape(shape).to(like.dtype),
        (1 - squared).sqrt().reshape(shape).to(like.dtype),
    )


def to_noise_pred(
    model_output: Tensor,
    sample: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """Express a model's output as epsilon; all tensors broadcast to `sample`'s shape (B, ...)."""
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return model_output
    if prediction_type == "sample":
        return (sample - alpha * model_output) / sigma
    return alpha * model_output + sigma * sample


def from_noise_pred(
    noise_pred: Tensor,
    sample: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """Express epsilon as a model of `prediction_type` would; the inverse of `to_noise_pred`."""
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return noise_pred
    if prediction_type == "sample":
        return (sample - sigma * noise_pred) / alpha
    return (noise_pred - sigma * sample) / alpha


def ddim_step(
    noise_pred: Tensor, sample: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]
) -> Tensor:
    """Take one deterministic DDIM step (Song et al. 2021, Equation 12 with eta = 0).

    Args:
        noise_pred: Predicted epsilon, (B, ...), like `sample`.
        sample: Where the step starts.
        start: (alpha, sigma) there, as from `signal_and_noise`.
        end: (alpha, sigma) where it lands.
    """
    clean = (sample - start[1] * noise_pred) / start[0]
    return end[0] * clean + end[1] * noise_pred
