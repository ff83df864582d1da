"""The switch at the denoiser: inside a planned run Dash or Dot, otherwise plain Dash.

A ControlNet gets one too: it is not evaluated where Dot comes next.

Calls come here from `morse.slot`, where a context variable says which run is going on. So an
interrupted run leaves nothing behind, the denoiser called outside the pipeline is plain Dash, and
threads do not disturb each other.
"""

import inspect
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from morse.clock import scheduler_index
from morse.controlnet import LatestFeatures
from morse.dot.wrapped import unwrap
from morse.plan import ModelName, MorsePlan
from morse.rates import noise_rates, prediction_type
from morse.sampling import Dot, JumpPoint, dot_estimate, estimate
from morse.spaces import BaseSpace, Rates, rebase

_SAMPLE_NAMES = ("sample", "hidden_states")


@dataclass
class MorseRun:
    """What was planned for one pipeline call and what happened (`pipe.last_run`).

    Attributes:
        plan: What was planned.
        speed_ratio: N, with which the cost is counted; None where it is not known yet.
        num_dash: Dash evaluations made.
        num_dot: Dot evaluations made.
        fallbacks: Why evaluations planned for Dot were made by Dash -> how many.
        seconds: Wall time of the call.
        timings: (model, seconds) of each evaluation, where the call was timed.
        base_space: What of Dash's latest estimate Dot's residual was added to.
    """

    plan: MorsePlan
    speed_ratio: float | None
    num_dash: int = 0
    num_dot: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    timings: list[tuple[ModelName, float]] | None = None
    base_space: BaseSpace = "raw"
    denoiser: nn.Module | None = field(default=None, repr=False)
    controlnet: nn.Module | None = field(default=None, repr=False)
    dot: Dot | None = field(default=None, repr=False)
    scheduler: object = field(default=None, repr=False)
    _jumps: dict[int, JumpPoint] = field(default_factory=dict, repr=False)
    _rates: dict[int, Rates | None] = field(default_factory=dict, repr=False)
    _features: LatestFeatures = field(default_factory=LatestFeatures, repr=False)
    _container: Callable[[Tensor], object] = field(default=lambda tensor: (tensor,), repr=False)
    _index: int = field(default=-1, repr=False)
    _step: int = field(default=-1, repr=False)
    _branch: int = field(default=-1, repr=False)

    @property
    def lsd(self) -> float | None:
        """Cost of the evaluations made: 1 for Dash's, 1/N for Dot's; None where N is not known."""
        if self.speed_ratio is None:
            return None if self.num_dot else float(self.num_dash)
        return self.num_dash + self.num_dot / self.speed_ratio

    @property
    def num_steps(self) -> int:
        """How many of the plan's evaluations were reached, one a step however many branches."""
        return self._step + 1

    def finish(self, seconds: float) -> None:
        """Note the wall time and let go of models and samples."""
        self.seconds = seconds
        self.denoiser = self.controlnet = self.dot = self.scheduler = None
        self._jumps.clear()
        self._rates.clear()
        self._features = LatestFeatures()

    def evaluate(self, plain: Callable[..., object], args: tuple, kwargs: dict) -> object:
        """Answer one call of the denoiser as planned (Equation 5).

        Args:
            plain: Calls Dash itself.
            args: The call's arguments.
            kwargs: The call's keyword arguments.

        Returns:
            What Dash would return: its own output, or Dot's estimate in the same container.
        """
        sample, timestep, conditions = _take_apart(self.denoiser, args, kwargs)
        model = self._choose(sample, timestep)
        started = self._now(sample)
        timestep = torch.as_tensor(timestep, device=getattr(sample, "device", None))
        here = self._rates_at(sample, timestep)
        output = None

        def dash(sample: Tensor, timestep: Tensor) -> Tensor:
            nonlocal output
            output = plain(*args, **kwargs)
            return output[0]

        def residual(sample: Tensor, timestep: Tensor, jump: JumpPoint) -> Tensor:
            return self.dot(sample, timestep, jump, **conditions)

        def dot(sample: Tensor, timestep: Tensor, jump: JumpPoint) -> Tensor:
            return dot_estimate(residual, sample, timestep, jump, self._base(jump, sample, here))

        residual.independent = getattr(self.dot, "independent", False)
        dot.independent = True  # the base is in it
        model_output, self._jumps[self._branch] = estimate(
            model, sample, timestep, self._jumps.get(self._branch), dash, dot
        )
        if model == "dot":
            self.num_dot += 1
            output = self._container(model_output)
        else:
            self.num_dash += 1
            self._rates[self._branch] = here
            self._container = _container_of(output)
        if self.timings is not None:
            self.timings.append((model, self._now(sample) - started))
        return output

    def steer(self, plain: Callable[..., object], args: tuple, kwargs: dict) -> object:
        """Answer one call of the ControlNet; its features are those of Dash where Dot is next."""
        sample, timestep, _ = _take_apart(self.controlnet, args, kwargs)
        index = scheduler_index(self.scheduler, timestep)
        model: ModelName = "dash"
        if index is not None and index >= self._index:
            model = self._planned(self._step + (index > self._index))
        settings = sample.shape, kwargs.get("conditioning_scale")
        return self._features.answer(index, model, settings, lambda: plain(*args, **kwargs))

    def _planned(self, step: int) -> ModelName:
        return self.plan[step] if 0 <= step < len(self.plan) else "dash"

    def _rates_at(self, sample: Tensor, timestep: Tensor) -> Rates | None:
        if self.base_space == "raw" or self._index < 0:
            return None
        return noise_rates(self.scheduler, self._index, timestep, sample)

    def _base(self, jump: JumpPoint, sample: Tensor, here: Rates | None) -> Tensor | None:
        if here is None:
            return None
        then = jump.sample, self._rates[self._branch]
        kind = prediction_type(self.scheduler)
        return rebase(self.base_space, jump.model_output, then, (sample, here), kind)

    def _choose(self, sample: object, timestep: object) -> ModelName:
        obstacle = self._advance(sample, timestep)
        if self._step >= len(self.plan):
            self.fallbacks["the plan has ended"] += 1
            return "dash"
        planned = self._planned(self._step)
        if planned == "dot" and obstacle is not None:
            self.fallbacks[obstacle] += 1
            return "dash"
        return planned

    def _advance(self, sample: object, timestep: object) -> str | None:
        """Follow the scheduler by one evaluation; returns why Dot can't make it, or None."""
        index = scheduler_index(self.scheduler, timestep)
        if index is None:
            self.fallbacks["the scheduler does not tell its step"] += 1
            self._index = self._step = -1
            return None
        # A step may evaluate several branches, such as separate guidance, one after the other.
        self._branch = self._branch + 1 if index == self._index else 0
        if index < self._index:  # another pass over the timesteps
            self._jumps.clear()
            self._step = 0
        elif index > self._index:
            # Counted, not taken from the index: image-to-image starts in the middle.
            self._step += 1
        self._index = index
        jump = self._jumps.get(self._branch)
        if jump is None:
            return "no earlier Dash evaluation"
        if jump.sample.shape != getattr(sample, "shape", None):
            return "the sample changed its shape"
        return None

    def _now(self, sample: Tensor) -> float:
        if self.timings is not None and sample.device.type != "cpu":
            torch.accelerator.synchronize(sample.device)
        return time.perf_counter()


@cache
def _signature(denoiser_class: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(denoiser_class.forward)


def _take_apart(
    denoiser: nn.Module, args: tuple, kwargs: dict
) -> tuple[Tensor, Tensor | float, dict[str, object]]:
    """Split a denoiser's arguments into sample, timestep and the conditions that remain."""
    given = dict(_signature(type(unwrap(denoiser))).bind(denoiser, *args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    given.pop("self", None)
    given.pop("return_dict", None)
    sample_name = next(name for name in _SAMPLE_NAMES if name in given)
    return given.pop(sample_name), given.pop("timestep"), given


def _container_of(output: object) -> Callable[[Tensor], object]:
    """Give the constructor of a denoiser's kind of output: a tuple, or a class of one field."""
    if isinstance(output, tuple):
        return lambda tensor: (tensor,)
    return lambda tensor: type(output)(**{next(iter(output.keys())): tensor})
