"""How a leapfrog run moves: what its schedulers share, whatever the path of noise."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from morse.spaces import Rates, from_clean, to_clean


class LeapfrogMoves:
    """The moves of `morse.LeapfrogScheduler`, where they are described.

    A DDIM step is the same on every path x_t = alpha * x_0 + sigma * epsilon but for the sample's
    scale, so that a scheduler has to say no more than where its grid lies: it lays one of 2n - 1
    points by `_lay_out` and gives their alpha and sigma as `_rates`. Its config has
    num_train_timesteps, timestep_power, clean_above and fitted_steps.
    """

    order = 1
    init_noise_sigma = 1.0

    def _check_options(self) -> None:
        """Raise ValueError for a config's steps that can't be made."""
        config = self.config
        if not config.timestep_power > 0:
            raise ValueError(f"timestep_power must be positive, got {config.timestep_power!r}.")
        if config.fitted_steps is not None:
            _check_steps(config.fitted_steps, config.num_train_timesteps)

    def _restart(self, weights: list[list[float]] | None = None) -> None:
        """Forget the last run; `weights` are the next one's extrapolations, if fitted."""
        self._weights = weights
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._anchor: Tensor | None = None
        self._handed: tuple[Tensor, Tensor] | None = None  # where to evaluate, over the anchor
        self._before: tuple[Tensor, Tensor] | None = None  # the latest epsilon and x_0

    @property
    def _predicts(self) -> str:
        """What the denoiser's output is, as `morse.spaces.to_clean` takes it."""
        return self.config.prediction_type

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

    def _lay_out(self, num_inference_steps: int) -> tuple[np.ndarray, list[list[float]] | None]:
        """Give a grid for so many evaluations, (2n - 1,), on which T - 1 is noise and -1 clean.

        With it come the extrapolations of fitted steps, (now, ahead) an evaluation.

        Raises:
            ValueError: If they are not between 1 and (T + 1) / 2.
        """
        total, steps = self.config.num_train_timesteps, 2 * num_inference_steps - 1
        if not 1 <= steps <= total:
            raise ValueError(
                f"num_inference_steps must be from 1 to {(total + 1) // 2}, got "
                f"{num_inference_steps!r}."
            )
        if self.config.fitted_steps is None:
            shares = np.arange(steps) / steps
            return total * (1 - shares) ** self.config.timestep_power - 1, None
        rows = resample_steps(self.config.fitted_steps, num_inference_steps)
        return interleave(rows[:, 0], rows[:-1, 1]), rows[:, 2:].tolist()

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Move on by one evaluation.

        Args:
            model_output: The estimate at `sample`, (B, C, H, W). Of 2 C channels the second half, a
                learned variance, is not used.
            timestep: Its timestep; where a run begins it tells where.
            sample: (B, C, H, W).
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
        if model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]
        here, dtype = 2 * self._step_index, model_output.dtype
        sample, model_output = (
            each.to(torch.promote_types(each.dtype, torch.float32))
            for each in (sample, model_output)
        )
        rates = self._rates(here)
        clean = to_clean(model_output, sample, rates, self._predicts)
        if clean is model_output:
            clean = clean.clone()  # kept, and graphs write their next output into the same memory
        # Where there is no signal, epsilon leads nowhere.
        is_clean = bool(rates[0] == 0 or rates[1] > self.config.clean_above * rates[0])
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
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)

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
        return int((self.timesteps.cpu() - float(timestep)).abs().argmin())

    def _rates(self, index: int) -> Rates:
        """Give alpha and sigma of a grid point, () each, on the CPU: no accelerator is awaited."""
        raise NotImplementedError

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
    found = np.stack([np.interp(wanted, at, column) for column in own.T], axis=1)
    # Beyond the last row's timestep too each evaluation keeps one of its own.
    found[:, 0] = np.maximum(found[:, 0], np.arange(count)[::-1])
    return found


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


def interleave(points: np.ndarray, landings: np.ndarray | float) -> np.ndarray:
    """Give the grid, (2n - 1,): points to evaluate at, (n,), and a landing after each but the last.

    Args:
        points: Where to evaluate.
        landings: How far each lies towards the next point, in (0, 1), (n - 1,) or one for all.
    """
    grid = np.empty(2 * len(points) - 1)
    grid[::2] = points
    grid[1::2] = points[:-1] + landings * np.diff(points)
    return grid
