"""Conversions between what denoisers predict, on any path x_t = alpha * x_0 + sigma * epsilon.

The variance-preserving path has alpha^2 + sigma^2 = 1 and alpha^2 = `alphas_cumprod[t]`. The
prediction types are diffusers': "epsilon" (Ho et al. 2020), "sample" (x_0), "v_prediction"
(v = alpha * epsilon - sigma * x_0; Salimans and Ho 2022), and "flow_prediction" (epsilon - x_0;
Lipman et al. 2023), which is for other paths.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "sample", "v_prediction"]
BaseSpace = Literal["raw", "x0", "v"]
Rates = tuple[Tensor, Tensor]  # alpha and sigma

_ON_THIS_PATH = get_args(PredictionType)
_ON_ANY_PATH = (*_ON_THIS_PATH, "flow_prediction")


def check_prediction_type(prediction_type: str, allowed: tuple[str, ...] = _ON_THIS_PATH) -> None:
    """Raise `ValueError` unless `prediction_type` is allowed, as on variance-preserving paths."""
    if prediction_type not in allowed:
        raise ValueError(f"prediction_type must be one of {allowed}, got {prediction_type!r}.")


def check_base_space(base_space: str | None) -> None:
    """Raise `ValueError` unless `base_space` is known, or None (the scheduler decides)."""
    if base_space is not None and base_space not in get_args(BaseSpace):
        raise ValueError(
            f"base_space must be one of {get_args(BaseSpace)} or None, got {base_space!r}."
        )


def signal_and_noise(alphas_cumprod: Tensor, timestep: Tensor, like: Tensor) -> Rates:
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


def to_clean(model_output: Tensor, sample: Tensor, rates: Rates, prediction_type: str) -> Tensor:
    """Express a model's output as x_0.

    Args:
        model_output: (B, ...).
        sample: x_t, like `model_output`.
        rates: alpha and sigma, which broadcast to it.
        prediction_type: One of the four.

    Raises:
        ValueError: If it is another.
    """
    alpha, sigma = rates
    if prediction_type == "sample":
        return model_output
    if prediction_type == "v_prediction":
        return (alpha * sample - sigma * model_output) / (alpha**2 + sigma**2)
    if prediction_type == "flow_prediction":
        return (sample - sigma * model_output) / (alpha + sigma)
    check_prediction_type(prediction_type, _ON_ANY_PATH)
    return (sample - sigma * model_output) / alpha


def from_clean(clean: Tensor, sample: Tensor, rates: Rates, prediction_type: str) -> Tensor:
    """Express x_0 as a model of `prediction_type` would; the inverse of `to_clean`."""
    alpha, sigma = rates
    if prediction_type == "sample":
        return clean
    epsilon = (sample - alpha * clean) / sigma
    if prediction_type == "v_prediction":
        return alpha * epsilon - sigma * clean
    if prediction_type == "flow_prediction":
        return epsilon - clean
    check_prediction_type(prediction_type, _ON_ANY_PATH)
    return epsilon


def rebase(
    base_space: BaseSpace,
    model_output: Tensor,
    jump: tuple[Tensor, Rates],
    here: tuple[Tensor, Rates],
    prediction_type: str,
) -> Tensor:
    """Carry Dash's latest estimate to another sample, keeping what it says in `base_space`.

    After one DDIM step the x_0 of an epsilon is still the same epsilon, so that "x0" and "raw"
    agree there; once fresh noise has been added they don't, and x_0 is the better guess.

    Args:
        base_space: What stays: the output as it is, the x_0 that it implies, or the velocity
            v = alpha * epsilon - sigma * x_0.
        model_output: Dash's, (B, C_out, ...), or packed as Flux has it, (B, L, C_out).
        jump: The sample where Dash was evaluated, (B, C_in, ...) or (B, L, C_in), and its rates.
        here: The sample to express it at, and its rates.
        prediction_type: What `model_output` is.

    Returns:
        Like `model_output`. Where C_in and C_out differ, the sample is the first channels of both
        (an inpainting mask or a control picture follows it, or the learned variance follows the
        estimate).
    """
    if base_space == "raw":
        return model_output
    # Where their numbers agree, both dimensions are whole, whichever has the channels.
    dim = 1 if model_output.shape[1] != here[0].shape[1] else -1
    channels = min(model_output.shape[dim], here[0].shape[dim])
    kept, rest = model_output.tensor_split([channels], dim)
    then, now = (each.narrow(dim, 0, channels).float() for each in (jump[0], here[0]))
    kept = kept.float()
    clean = to_clean(kept, then, jump[1], prediction_type)
    if base_space == "v":
        velocity = from_clean(clean, then, jump[1], "v_prediction")
        clean = to_clean(velocity, now, here[1], "v_prediction")
    carried = from_clean(clean, now, here[1], prediction_type).to(model_output.dtype)
    return torch.cat([carried, rest], dim)


def ddim_step(
    model_output: Tensor,
    sample: Tensor,
    start: Rates,
    end: Rates,
    prediction_type: PredictionType = "epsilon",
) -> Tensor:
    """Take one deterministic DDIM step (Song et al. 2021, Equation 12 with eta = 0).

    Args:
        model_output: What the denoiser says, (B, ...), like `sample`.
        sample: Where the step starts.
        start: alpha and sigma there, as from `signal_and_noise`.
        end: alpha and sigma where it lands.
        prediction_type: What `model_output` is.

    Raises:
        ValueError: If `prediction_type` is not of variance-preserving paths.
    """
    check_prediction_type(prediction_type)
    clean = to_clean(model_output, sample, start, prediction_type)
    noise_pred = model_output
    if prediction_type != "epsilon":
        noise_pred = from_clean(clean, sample, start, "epsilon")
    return end[0] * clean + end[1] * noise_pred
