"""LeapfrogScheduler: a second-order solver that spends one evaluation on two steps of its grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from torch import Tensor

from morse.spaces import Rates, check_prediction_type, from_clean, signal_and_noise, to_clean


@dataclass
class LeapfrogSchedulerOutput(BaseOutput):
    """What `LeapfrogScheduler.step` returns: `prev_sample`, where the next evaluation is made."""

    prev_sample: Tensor


class LeapfrogScheduler(SchedulerMixin, ConfigMixin):
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

    Deterministic; made for variance-preserving schedules. In a run of Morse, Dot's estimates are
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
    order = 1

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
        if not timestep_power > 0:
            raise ValueError(f"timestep_power must be positive, got {timestep_power!r}.")
        if fitted_steps is not None:
            _check_steps(fitted_steps, num_train_timesteps)
        if trained_betas is not None:
            betas = torch.tensor(trained_betas, dtype=torch.float32)
        elif beta_schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, num_train_timesteps)
        elif beta_schedule == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
        elif beta_schedule == "squaredcos_cap_v2":
            betas = betas_for_alpha_bar(num_train_timesteps)
        else:
            raise ValueError(
                "beta_schedule must be 'linear', 'scaled_linear' or 'squaredcos_cap_v2', got "
                f"{beta_schedule!r}; give others as trained_betas."
            )
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if rescale_betas_zero_snr:
            # As DPMSolverMultistepScheduler has it: what is divided by alpha must stay finite.
            self.alphas_cumprod[-1] = 2**-24
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._begin_index: int | None = None
        self._restart()

    def _restart(self) -> None:
        self._step_index: int | None = None
        self._anchor: Tensor | None = None
        self._handed: tuple[Tensor, Tensor] | None = None  # where to evaluate, over the anchor
        self._before: tuple[Tensor, Tensor] | None = None  # the latest epsilon and x_0

    @property
    def step_index(self) -> int | None:
        """How many evaluations were made; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where a run begins, as an image-to-image pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the next run at this entry of `timesteps`."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Return the sample as it is; there for pipelines that scale it for other schedulers."""
        return sample

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Lay out the grid for `num_inference_steps` evaluations and forget the last run.

        Raises:
            ValueError: If they are not between 1 and (T + 1) / 2.
        """
        total, steps = self.config.num_train_timesteps, 2 * num_inference_steps - 1
        if not 1 <= steps <= total:
            raise ValueError(
                f"num_inference_steps must be from 1 to {(total + 1) // 2}, got "
                f"{num_inference_steps!r}."
            )
        fitted = self.config.fitted_steps
        rows = None if fitted is None else resample_steps(fitted, num_inference_steps)
        if rows is None:
            grid = total * (1 - np.arange(steps) / steps) ** self.config.timestep_power - 1
        else:
            grid = _interleave(rows)
        self._weights = None if rows is None else rows[:, 2:].tolist()
        # Rounding may bring points together; each keeps one timestep of its own.
        grid = torch.from_numpy(np.maximum(grid.round(), np.arange(steps)[::-1])).long()
        self._grid = [*grid.tolist(), -1]
        self.num_inference_steps = num_inference_steps
        self.timesteps = grid[::2].to(device)
        self._begin_index = None
        self._restart()

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> LeapfrogSchedulerOutput | tuple[Tensor]:
        """Move on by one evaluation.

        Args:
            model_output: The estimate at `sample`, (B, C, H, W).
            timestep: Its timestep; where a run begins it tells where.
            sample: Like `model_output`.
            generator: Not used; some pipelines give one.
            return_dict: Whether to return an object rather than a tuple.

        Returns:
            `prev_sample`: where to evaluate next, or after the last evaluation the clean sample.

        Raises:
            ValueError: If `set_timesteps` was not called.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step.")
        if self._step_index is None:
            self._step_index = self._find_beginning(timestep)
        here, dtype = 2 * self._step_index, model_output.dtype
        sample, model_output = (
            each.to(torch.promote_types(each.dtype, torch.float32))
            for each in (sample, model_output)
        )
        rates = self._rates(here)
        clean = to_clean(model_output, sample, rates, self.config.prediction_type)
        if clean is model_output:
            clean = clean.clone()  # kept, and graphs write their next output into the same memory
        is_clean = bool(rates[1] > self.config.clean_above * rates[0])
        now, ahead = self._weigh(clean, sample, rates, is_clean)
        start, anchor = (here, sample) if self._anchor is None else (here - 1, self._anchor)
        if self._handed is not None:
            # Where the caller has changed it, by a mask or a callback, the anchor moves along.
            handed, ratio = self._handed
            anchor = anchor + (sample - handed) / ratio
        own, of_fixed = self._shares(start, here + 1, is_clean)
        self._anchor = own * anchor + of_fixed * now
        self._step_index += 1
        prev_sample = self._anchor
        if self._step_index < self.num_inference_steps:
            own, of_fixed = self._shares(here + 1, here + 2, is_clean)
            prev_sample = (own * self._anchor + of_fixed * ahead).to(dtype)
            # Cloned, for callers also change it in place.
            self._handed = prev_sample.clone(), own
        prev_sample = prev_sample.to(dtype)
        return LeapfrogSchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _weigh(
        self, clean: Tensor, sample: Tensor, rates: Rates, is_clean: bool
    ) -> tuple[Tensor, Tensor]:
        """Give what is held fixed, x_0 (`is_clean`) or epsilon, in each of the two moves."""
        if self._weights is None:
            fixed = clean if is_clean else from_clean(clean, sample, rates, "epsilon")
            return fixed, fixed
        before, self._before = self._before, (from_clean(clean, sample, rates, "epsilon"), clean)
        fixed = self._before[is_clean]
        if before is None:
            return fixed, fixed
        change = fixed - before[is_clean]
        now, ahead = self._weights[self._step_index]
        return fixed + now * change, fixed + ahead * change

    def _find_beginning(self, timestep: Tensor | int) -> int:
        if self._begin_index is not None:
            return self._begin_index
        return int((self.timesteps.cpu() - int(timestep)).abs().argmin())

    def _rates(self, index: int) -> Rates:
        """Give alpha and sigma on the CPU, as () each, for which no accelerator is awaited."""
        at = torch.tensor(self._grid[index])
        alpha, sigma = signal_and_noise(self.alphas_cumprod.cpu(), at, torch.empty(1, device="cpu"))
        return alpha[0], sigma[0]

    def _shares(self, start: int, end: int, is_clean: bool) -> tuple[Tensor, Tensor]:
        """Give the factors of a DDIM step between grid points.

        They are the sample's and that of what is held fixed: an x_0 (`is_clean`) or an epsilon.
        """
        (alpha, sigma), (next_alpha, next_sigma) = map(self._rates, (start, end))
        if is_clean:
            ratio = next_sigma / sigma
            return ratio, next_alpha - ratio * alpha
        ratio = next_alpha / alpha
        return ratio, next_sigma - ratio * sigma

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean samples (B, ...) to timesteps (B,), as image-to-image pipelines do."""
        alpha, sigma = signal_and_noise(self.alphas_cumprod, timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def __len__(self) -> int:
        """Give T."""
        return self.config.num_train_timesteps


def resample_steps(rows: Sequence[Sequence[float]], count: int) -> np.ndarray:
    """Give rows of another number of evaluations, (count, 4), at even shares of the run.

    Args:
        rows: See `LeapfrogScheduler`'s fitted_steps.
        count: How many evaluations.
    """
    if count == len(rows):
        return np.array(rows, dtype=np.float64)
    own = np.array([*rows, rows[-1]], dtype=np.float64)
    own[-1, 0] = -1  # the end of the run, to which the last evaluation goes in one move, not two
    at = np.append(np.arange(len(rows)), len(rows) - 0.5)
    if len(rows) > 1:
        own[-2:, 1] = rows[-2][1]  # the last row's own means nothing
    wanted = np.arange(count) * (len(rows) - 0.5) / (count - 0.5)
    return np.stack([np.interp(wanted, at, column) for column in own.T], axis=1)


def _check_steps(rows: Sequence[Sequence[float]], num_train_timesteps: int) -> None:
    if not rows or any(len(row) != 4 for row in rows):
        raise ValueError(
            f"fitted_steps must hold rows (timestep, landing, now, ahead), got {rows!r}."
        )
    timesteps = [row[0] for row in rows]
    falling = all(later < earlier for earlier, later in pairwise(timesteps))
    if not (falling and timesteps[-1] >= 0 and timesteps[0] < num_train_timesteps):
        raise ValueError(
            f"the timesteps of fitted_steps must fall and lie in [0, {num_train_timesteps}), got "
            f"{timesteps}."
        )
    landings = [row[1] for row in rows[:-1]]
    if not all(0 < landing < 1 for landing in landings):
        raise ValueError(f"the landings of fitted_steps must lie in (0, 1), got {landings}.")


def _interleave(rows: np.ndarray) -> np.ndarray:
    """Give the grid, (2 n - 1,): the timesteps of (n, 4) rows and between them the landings."""
    timesteps, landings = rows[:, 0], rows[:-1, 1]
    grid = np.empty(2 * len(rows) - 1)
    grid[::2] = timesteps
    grid[1::2] = timesteps[:-1] + landings * np.diff(timesteps)
    return grid
