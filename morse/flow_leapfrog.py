"""FlowMatchLeapfrogScheduler: the leapfrog solver for models trained by flow matching."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from morse.leapfrog_moves import LeapfrogMoves, interleave
from morse.spaces import Rates


class FlowMatchLeapfrogScheduler(LeapfrogMoves, SchedulerMixin, ConfigMixin):
    """`morse.LeapfrogScheduler` on the path x = (1 - sigma) * x_0 + sigma * epsilon.

    That is the path of rectified flows (Liu et al. 2023; Lipman et al. 2023), which SD3 and Flux
    were trained on. Its steps are those of a variance-preserving path at the same sigma / alpha.

    The noise levels are shifted, by the picture's size or not, as `FlowMatchEulerDiscreteScheduler`
    does it; both take the same configs, but for the spacings of sigmas and fresh noise, which this
    solver has no use for.

    Args:
        num_train_timesteps: T; the denoiser is told T * sigma.
        shift: Unshifted levels s become shift * s / (1 + (shift - 1) * s).
        use_dynamic_shifting: Whether `mu`, which pipelines give with a call, shifts them instead.
        base_shift: With the next three, what pipelines compute `mu` from.
        max_shift: See `base_shift`.
        base_image_seq_len: See `base_shift`.
        max_image_seq_len: See `base_shift`.
        shift_terminal: Stretch the levels so that the last evaluation is made at this one (LTX).
        time_shift_type: "exponential" or "linear", of the dynamic shift.
        timestep_power: Grid point j of k lies at the unshifted level (1 - j / k)^timestep_power.
        clean_above: See `LeapfrogScheduler`, as for `fitted_steps`.
        fitted_steps: Its timesteps are T * s - 1 of unshifted levels s, from T - 1 to the clean
            end at -1, so that one fit can be used at all sizes.

    Example:
        >>> scheduler = FlowMatchLeapfrogScheduler(shift=3.0)
        >>> scheduler.set_timesteps(2)
        >>> scheduler.timesteps  # of sigmas 1, 6/7, 3/5, 0
        tensor([1000.,  600.])
    """

    _compatibles: ClassVar = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
        timestep_power: float = 1.0,
        clean_above: float = 4.0,
        fitted_steps: list[list[float]] | None = None,
    ) -> None:
        """Take over how noise levels are shifted."""
        self._check_options()
        self._shifting = FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            shift_terminal=shift_terminal,
            time_shift_type=time_shift_type,
        )
        self.sigmas, self.timesteps = self._shifting.sigmas, self._shifting.timesteps
        self.num_inference_steps: int | None = None
        self._restart()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay out the grid for `num_inference_steps` evaluations and forget the last run.

        Args:
            num_inference_steps: n; as many as `sigmas` if those are given.
            device: Where `timesteps` will be.
            sigmas: Unshifted levels in (0, 1] to evaluate at, instead of this scheduler's own.
                Flux's pipelines give 1 to 1 / n where their caller chose none; that is no choice.
            mu: The dynamic shift.

        Raises:
            ValueError: If the evaluations are not between 1 and (T + 1) / 2, `sigmas` don't fall
                within (0, 1], or `mu` is wanted and missing.
        """
        if sigmas is not None:
            sigmas = np.asarray(sigmas, dtype=np.float64)
            if num_inference_steps not in (None, len(sigmas)):
                raise ValueError(
                    f"num_inference_steps is {num_inference_steps}, but there are {len(sigmas)} "
                    "sigmas: give one of the two."
                )
            num_inference_steps = len(sigmas)
        if num_inference_steps is None:
            raise ValueError("num_inference_steps is None and no sigmas are given: give either.")
        grid, weights = self._lay_out(num_inference_steps)
        grid = np.minimum((grid + 1) / self.config.num_train_timesteps, 1)
        if sigmas is not None and not _is_no_choice(sigmas):
            grid, weights = _around(sigmas), None
        self._shifting.set_timesteps(sigmas=grid.tolist(), mu=mu)
        levels = self._shifting.sigmas
        self._grid = levels.tolist()
        self.num_inference_steps = num_inference_steps
        self.sigmas = torch.cat([levels[:-1:2], levels[-1:]])
        self.timesteps = self._shifting.timesteps[::2].to(device)
        self._restart(weights)

    @property
    def shift(self) -> float:
        """What noise levels are shifted by where that is not dynamic: the config's, or as set."""
        return self._shifting.shift

    def set_shift(self, shift: float) -> None:
        """Shift noise levels by another factor from the next `set_timesteps` on."""
        self._shifting.set_shift(shift)

    @property
    def _predicts(self) -> str:
        return "flow_prediction"

    def _rates(self, index: int) -> Rates:
        """Give alpha and sigma of a grid point."""
        sigma = torch.tensor(self._grid[index])
        return 1 - sigma, sigma

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noise clean samples (B, ...) to timesteps (B,) or (1,), for image-to-image."""
        shape = (-1, *(1,) * (sample.ndim - 1))
        sigma = (timestep / self.config.num_train_timesteps).reshape(shape).to(sample)
        return (1 - sigma) * sample + sigma * noise


def _is_no_choice(sigmas: np.ndarray) -> bool:
    count = len(sigmas)
    return np.allclose(sigmas, np.linspace(1, 1 / count, count), rtol=0, atol=1e-6)


def _around(sigmas: np.ndarray) -> np.ndarray:
    """Give the grid, (2n - 1,), with levels (n,) to evaluate at and landings midway."""
    if not (sigmas[0] <= 1 and (np.diff(sigmas) < 0).all() and sigmas[-1] > 0):
        raise ValueError(f"sigmas must fall and lie in (0, 1], got {sigmas.tolist()}.")
    return interleave(sigmas, 0.5)
