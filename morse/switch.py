"""The switch at the denoiser: in a planned run Dash, Dot or a mixture, otherwise plain Dash.

Each of several denoisers gets one, and a ControlNet too: it is not evaluated where Dot comes next.

Calls come here from `morse.slot`, where a context variable says which run is going on. So an
interrupted run leaves nothing behind, the denoiser called outside the pipeline is plain Dash, and
threads do not disturb each other.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from morse.branches import Branches, steady_conditions
from morse.clock import scheduler_index
from morse.controlnet import LatestFeatures
from morse.denoisers import Call, Denoiser, take_apart
from morse.dot import MorseDot
from morse.estimates import LatestEstimate, correct_estimate
from morse.guess import guess_estimate
from morse.one_pass import DotView, needs_dash, view_call
from morse.plan import ModelName
from morse.rates import find_family, noise_rates
from morse.sampling import Dot
from morse.spaces import Rates
from morse.summary import MorseRun

Rebinds = Literal["never", "each of Dash", "each evaluation"]


class Dispatcher:
    """Has each call of a run's denoisers answered by Dash, Dot or a mixture, and notes by which.

    It holds models, samples and conditions, and so lives only as long as the pipeline's call.

    Args:
        run: The record that it fills in; its plan is followed.
        denoisers: The pipeline's, each with the Dot made for it.
        scheduler: The pipeline's.
        read_guidance: As `morse.one_pass.read_guidance`, of the pipeline.
        controlnet: The pipeline's, if it has one.
        rebinds: When Dash may have changed during the run, as by the call's callback.
    """

    def __init__(
        self,
        run: MorseRun,
        denoisers: Sequence[Denoiser],
        scheduler: object,
        read_guidance: Callable[[], float | str],
        controlnet: nn.Module | None = None,
        rebinds: Rebinds = "never",
    ) -> None:
        """Stand before the first step."""
        self.run, self.denoisers, self.scheduler = run, denoisers, scheduler
        self.read_guidance, self.controlnet, self.rebinds = read_guidance, controlnet, rebinds
        self._branches, self._features = Branches(), LatestFeatures()
        self._bound: set[str] = set()  # names of denoisers whose Dots have looked at Dash
        self._scale: float | None = None  # of guidance, at Dash's latest evaluation
        self._index = self._step = -1  # of the scheduler and of the plan

    def answer(
        self, module: nn.Module, plain: Callable[..., object], args: tuple, kwargs: dict
    ) -> object:
        """Answer one call of a denoiser or ControlNet as planned (Equation 5).

        Args:
            module: What was called.
            plain: Calls it without Morse.
            args: The call's arguments.
            kwargs: The call's keyword arguments.

        Returns:
            What it would return: its own output, or Dot's estimate in the same container.
        """

        def compute() -> object:
            return plain(*args, **kwargs)

        denoiser = next((each for each in self.denoisers if each.module is module), None)
        if denoiser is None and module is not self.controlnet:
            return compute()
        call = take_apart(module, args, kwargs)
        if call is None:
            if denoiser is not None:
                self.run.fallbacks["the denoiser is not given one sample and one timestep"] += 1
                self.run.steps.append(Counter())
                self._count("dash")
            return compute()
        if denoiser is None:
            return self._steer(call, compute)
        return self._evaluate(denoiser, call, compute)

    def _evaluate(self, denoiser: Denoiser, call: Call, compute: Callable[[], object]) -> object:
        self._advance(call.timestep)
        if self._planned(self._step) == "gaussian":
            guessed = guess_estimate(denoiser, call, self.scheduler, self._index)
            if not isinstance(guessed, str):
                self._count("gaussian")
                return guessed
            self.run.fallbacks[guessed] += 1
        started, steady = self._now(call.sample), steady_conditions(call)
        view = view_call(denoiser.dot, call, self.read_guidance)
        timestep = torch.as_tensor(view.call.timestep, device=call.sample.device)
        rates = self._rates_at(view.call.sample, timestep)
        latest = self._latest(denoiser, steady, view)
        if latest is not None:
            here = (timestep, rates, self.run.base_space, self.scheduler)
            corrected = correct_estimate(latest, self._bind(denoiser), view.call, *here)
            output = view.answer(corrected)
        else:
            output = compute()
            earlier = self._branches.find_earlier(denoiser, steady)
            self._branches.keep(denoiser, steady, view.keep(output, timestep, rates, earlier))
            self._scale = view.scale
            if self.rebinds == "each of Dash":
                self._bound.discard(denoiser.name)
        model: ModelName = "dash" if latest is None else "dot"
        self._count(model)
        if self.run.timings is not None:
            self.run.timings.append((model, self._now(call.sample) - started))
        return output

    def _latest(self, denoiser: Denoiser, call: Call, view: DotView) -> LatestEstimate | None:
        """Give what Dot is to correct; None where Dash runs, with the reason if not planned."""
        if self._step >= len(self.run.plan):
            self.run.fallbacks["the plan has ended"] += 1
            return None
        if self._planned(self._step) != "dot":
            return None
        if denoiser.dot is None:
            kept: object = "it has no Dot"
        else:
            kept = self._branches.find(denoiser, call)
        if isinstance(kept, LatestEstimate):
            problem = view.why_not(kept)
            if problem is None:
                return kept
            kept = problem
        reason = kept or self._branches.why_missing(denoiser, call)
        if len(self.denoisers) > 1:
            reason = f"{denoiser.name}: {reason}"
        self.run.fallbacks[reason] += 1
        return None

    def _bind(self, denoiser: Denoiser) -> Dot:
        """Let a weight-shared Dot look at Dash once a run, as it is when Dot is first needed.

        Not before the run: some pipelines give Dash other attention processors meanwhile. Callbacks
        may change its adapters, so that with them Dot looks again after each evaluation of Dash; at
        each of its own where the pipeline sets Dash otherwise.
        """
        known = denoiser.name in self._bound and self.rebinds != "each evaluation"
        if isinstance(denoiser.dot, MorseDot) and not known:
            denoiser.dot.bind(denoiser.module)
            self._bound.add(denoiser.name)
        return denoiser.dot

    def _steer(self, call: Call, compute: Callable[[], object]) -> object:
        """Answer one call of the ControlNet; its features are those of Dash where Dot is next."""
        index = scheduler_index(self.scheduler, call.timestep)
        model: ModelName = "dash"
        if index is not None and index >= self._index:
            model = self._planned(self._step + (index > self._index))
        dots = [denoiser.dot for denoiser in self.denoisers]
        if model == "dot" and any(needs_dash(dot, self.read_guidance, self._scale) for dot in dots):
            model = "dash"
        return self._features.answer(index, model, call, compute)

    def _planned(self, step: int) -> ModelName:
        plan = self.run.plan
        return plan[step] if 0 <= step < len(plan) else "dash"

    @property
    def _has_history(self) -> bool:
        """Whether a Dot uses the Dash evaluation before the latest too."""
        return any(getattr(denoiser.dot, "history", 0) for denoiser in self.denoisers)

    def _rates_at(self, sample: Tensor, timestep: Tensor) -> Rates | None:
        extrapolated = self._has_history and find_family(self.scheduler) is not None
        if self._index < 0 or (self.run.base_space == "raw" and not extrapolated):
            return None
        return noise_rates(self.scheduler, self._index, timestep, sample)

    def _advance(self, timestep: object) -> None:
        """Follow the scheduler by one evaluation."""
        index = scheduler_index(self.scheduler, timestep)
        if index is not None and index == self._index:
            return  # another branch of the step, such as separate guidance
        if index is None:
            self.run.fallbacks["the scheduler does not tell its step"] += 1
            index = self._step = -1
        elif index < self._index:  # another pass over the timesteps
            self._step = 0
        else:
            # Counted, not taken from the index: image-to-image starts in the middle.
            self._step += 1
        self._index = index
        self.run.num_steps = self._step + 1
        self.run.steps.append(Counter())
        is_dash = self._planned(self._step) == "dash"
        self._branches.start_step(forget=is_dash, keep_earlier=self._has_history)

    def _count(self, model: ModelName) -> None:
        self.run.num_dash += model == "dash"
        self.run.num_dot += model == "dot"
        self.run.num_gaussian += model == "gaussian"
        self.run.steps[-1][model] += 1

    def _now(self, sample: Tensor) -> float:
        if self.run.timings is not None and sample.device.type != "cpu":
            torch.accelerator.synchronize(sample.device)
        return time.perf_counter()
