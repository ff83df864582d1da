"""The beginning of a run without a network: a Gaussian mixture's estimate in a pipeline."""

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from morse.denoisers import Call, Denoiser
from morse.dot.mixture import GaussianMixture
from morse.rates import find_family, noise_rates, prediction_type
from morse.spaces import from_clean


def guess_estimate(denoiser: Denoiser, call: Call, scheduler: object, index: int) -> object:
    """Answer a denoiser's call by the mixture that is saved with its Dot.

    Args:
        denoiser: What was called.
        call: Its arguments.
        scheduler: The pipeline's.
        index: Where it stands; below zero where it doesn't tell.

    Returns:
        What stands for the denoiser's output, or why there is nothing.
    """
    mixture = getattr(denoiser.dot, "mixture", None)
    if not isinstance(mixture, GaussianMixture):
        return "its Dot has no Gaussian mixture"
    if tuple(call.sample.shape[1:]) != mixture.sample_shape:
        return "the Gaussian mixture is of samples of another size"
    channels = getattr(denoiser.module.config, "out_channels", call.sample.shape[1])
    if call.return_dict is None or channels != call.sample.shape[1]:
        return "it returns more than an estimate of the sample"
    if index < 0 or find_family(scheduler) is None:
        return "the scheduler's noise rates are not known"
    timestep = torch.as_tensor(call.timestep, device=call.sample.device)
    noisy = call.sample.float()
    rates = noise_rates(scheduler, index, timestep, noisy)
    # The difference of large numbers, which autocast would round.
    with torch.autocast(noisy.device.type, enabled=False):
        clean = mixture(noisy, rates)
    output = from_clean(clean, noisy, rates, prediction_type(scheduler)).to(call.sample.dtype)
    return UNet2DOutput(output) if call.return_dict else (output,)
