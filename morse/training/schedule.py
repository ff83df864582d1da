"""The path of noise that a Dash was trained on, as a table over its training steps."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from morse.rates import find_family
from morse.spaces import Rates, check_prediction_type


@dataclass(frozen=True)
class NoiseSchedule:
    """x = alpha * x_0 + sigma * epsilon at T positions, the cleanest first.

    Training draws positions, integers from 0 to T - 1; -1 is the clean end. On variance-preserving
    paths a position is the training timestep itself.

    Attributes:
        alphas: (T,), decreasing.
        sigmas: (T,), increasing.
        timesteps: What the denoiser is told there, (T,); fractional for flow matching.
    """

    alphas: Tensor
    sigmas: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        """Give T."""
        return len(self.alphas)

    @property
    def device(self) -> torch.device:
        """Give the device of the table."""
        return self.alphas.device

    def to(self, device: torch.device) -> "NoiseSchedule":
        """Give the table on another device."""
        return NoiseSchedule(
            self.alphas.to(device), self.sigmas.to(device), self.timesteps.to(device)
        )

    def rates(self, position: Tensor, like: Tensor) -> Rates:
        """Look up alpha and sigma at positions, (B,) or (), shaped to multiply `like` (B, ...)."""
        index = position.reshape(-1).clamp(min=0)
        shape = (-1, *(1,) * (like.ndim - 1))
        clean = (position < 0).reshape(shape)
        alpha, sigma = self.alphas[index].reshape(shape), self.sigmas[index].reshape(shape)
        return torch.where(clean, 1.0, alpha), torch.where(clean, 0.0, sigma)

    @classmethod
    def variance_preserving(cls, alphas_cumprod: Tensor) -> "NoiseSchedule":
        """Make the table of a schedule with alpha^2 + sigma^2 = 1 (Ho et al. 2020)."""
        squared = alphas_cumprod.float()
        timesteps = torch.arange(len(squared), device=squared.device)
        return cls(squared.sqrt(), (1 - squared).sqrt(), timesteps)

    @classmethod
    def flow_matching(cls, scheduler: object, image_seq_len: int) -> "NoiseSchedule":
        """Make the table of a flow, x = (1 - sigma) * x_0 + sigma * epsilon (Lipman et al. 2023).

        The scheduler itself shifts the noise levels, as it will when sampling.

        Args:
            scheduler: A flow-matching scheduler.
            image_seq_len: Patches of a picture, on which a dynamic shift depends.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        shifting = FlowMatchEulerDiscreteScheduler.from_config(copy.deepcopy(scheduler.config))
        total = shifting.config.num_train_timesteps
        mu = None
        if shifting.config.use_dynamic_shifting:
            mu = _dynamic_shift(shifting.config, image_seq_len)
        shifting.set_timesteps(sigmas=[n / total for n in range(total, 0, -1)], mu=mu)
        sigmas, timesteps = shifting.sigmas[:-1].flip(0), shifting.timesteps.flip(0)
        return cls(1 - sigmas, sigmas, timesteps)


def _dynamic_shift(config: dict[str, object], image_seq_len: int) -> float:
    """Interpolate the shift linearly in the picture's patches, as diffusers' pipelines do."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    share = (image_seq_len - low) / (high - low)
    return config["base_shift"] + share * (config["max_shift"] - config["base_shift"])


def read_schedule(scheduler: object, image_seq_len: int) -> tuple[NoiseSchedule, str]:
    """Give a scheduler's noise schedule and what it takes the denoiser's output for.

    Raises:
        ValueError: If its path or its prediction type is not handled.
    """
    if find_family(scheduler) == "flow":
        return NoiseSchedule.flow_matching(scheduler, image_seq_len), "flow_prediction"
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None or scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"the pipeline's scheduler is {type(scheduler).__name__}, whose noise schedule "
            "train_dot does not know; save the pipeline with a scheduler that has alphas_cumprod, "
            "such as DDIMScheduler, or for flow matching with FlowMatchEulerDiscreteScheduler."
        )
    check_prediction_type(scheduler.config.prediction_type)
    return NoiseSchedule.variance_preserving(alphas_cumprod), scheduler.config.prediction_type
