"""LeapfrogScheduler: a second-order solver that spends one evaluation on two steps of its grid."""

from typing import ClassVar

import numpy as np
import torch
from diffusers import ConfigMixin, DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from morse.leapfrog_moves import LeapfrogMoves
from morse.spaces import Rates, check_prediction_type, signal_and_noise

_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


class LeapfrogScheduler(LeapfrogMoves, SchedulerMixin, ConfigMixin):
    """Leaps over the point where the denoiser is evaluated (explicit two-step midpoint rule).

    n evaluations walk a grid of 2n - 1 steps. The first step is a plain DDIM step. From then on
    x_i first moves to t_{i+1} with the latest estimate, which is a step old; there the denoiser is
    evaluated, and with its estimate x_i itself moves to t_{i+2}. An estimate in the middle of a
    step is right to second order, with an error constant a tenth of that of extrapolating from the
    past (1/24 against 5/12; Hairer, Norsett, Wanner 1993, section III.1), which DPM-Solver++ 2M
    does. Of diffusion solvers PFDiff-1 (Wang et al. 2025, arXiv 2408.08822) makes the same moves
    with epsilon held fixed. At high noise that fails for few evaluations, since sigma / alpha
    changes by orders of magnitude within a step; there x_0 is held fixed instead, as
    DPM-Solver++ does (Lu et al. 2022). Every move is a DDIM step for one of the two.

    Deterministic; made for variance-preserving schedules (for flow matching there is
    `morse.FlowMatchLeapfrogScheduler`). In a run of Morse, Dot's estimates are
    used as Dash's are.

    Args:
        num_train_timesteps: T.
        beta_start: The first beta.
        beta_end: The last beta.
        beta_schedule: "linear", "scaled_linear" (Stable Diffusion's) or "squaredcos_cap_v2".
        trained_betas: All betas, instead of a schedule.
        prediction_type: "epsilon", "sample" or "v_prediction".
        timestep_power: Grid point j of k lies at T (1 - j / k)^timestep_power; 1 spaces timesteps
            evenly ("trailing"), more puts more of them at low noise.
        clean_above: x_0 is held fixed where sigma / alpha is larger than this, else epsilon.
            A huge number, with timestep_power 1, gives PFDiff-1.
        fitted_steps: Instead of timestep_power, what `morse plan` fitted to a denoiser, as bespoke
            solvers are (Shaul et al. 2023, arXiv 2310.19075; Frankel et al. 2025, arXiv
            2502.17423): one row (timestep, landing, now, ahead) an evaluation. It is made at
            `timestep`; x_i itself then moves the share `landing` of the way to the next one. Of
            the estimate's change since the evaluation before, `now` times is added to it for that
            move, `ahead` times for the one to where the denoiser is evaluated next. The last row's
            landing is the end. Another number of evaluations takes rows in between.
        rescale_betas_zero_snr: Take all signal from the last timestep (Lin et al. 2024, Algorithm
            1), for denoisers that were trained so.

    Example:
        >>> scheduler = LeapfrogScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
        >>> scheduler.set_timesteps(3)
        >>> scheduler.timesteps  # of a grid 999, 799, 599, 399, 199, -1
        tensor([999, 599, 199])
    """

    _compatibles: ClassVar = [each.name for each in KarrasDiffusionSchedulers]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_power: float = 1.0,
        clean_above: float = 4.0,
        fitted_steps: list[list[float]] | None = None,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        """Make the noise schedule."""
        check_prediction_type(prediction_type)
        self._check_options()
        if trained_betas is None and beta_schedule not in _BETA_SCHEDULES:
            raise ValueError(
                f"beta_schedule must be one of {_BETA_SCHEDULES}, got {beta_schedule!r}; give "
                "others as trained_betas."
            )
        # Without signal its last alpha stays above zero: what is divided by alpha must stay finite.
        self.alphas_cumprod = DPMSolverMultistepScheduler(
            num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        ).alphas_cumprod  # fmt: skip
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._restart()

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Lay out the grid for `num_inference_steps` evaluations and forget the last run.

        Raises:
            ValueError: If they are not between 1 and (T + 1) / 2.
        """
        grid, weights = self._lay_out(num_inference_steps)
        # Rounding may bring points together; each keeps one timestep of its own.
        grid = torch.from_numpy(np.maximum(grid.round(), np.arange(len(grid))[::-1])).long()
        self._grid = [*grid.tolist(), -1]
        self.num_inference_steps = num_inference_steps
        self.timesteps = grid[::2].to(device)
        self._restart(weights)

    def _rates(self, index: int) -> Rates:
        """Give alpha and sigma on the CPU, as () each, for which no accelerator is awaited."""
        at = torch.tensor(self._grid[index])
        alpha, sigma = signal_and_noise(self.alphas_cumprod.cpu(), at, torch.empty(1, device="cpu"))
        return alpha[0], sigma[0]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean samples (B, ...) to timesteps (B,), as image-to-image pipelines do."""
        alpha, sigma = signal_and_noise(self.alphas_cumprod, timesteps, original_samples)
        return alpha * original_samples + sigma * noise
