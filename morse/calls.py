"""What a pipeline with Morse attached does when it is called: plan, run, measure."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from diffusers import DiffusionPipeline
from torch import nn

from morse.dot import MorseDot
from morse.plan import MorsePlan
from morse.sampling import Dot
from morse.switch import CURRENT_RUN, MorseRun, install_switch

DEFAULT_PLAN_RATIO = 2.0


@dataclass(frozen=True)
class SpeedRatio:
    """How long evaluations take: N, and the quartiles of Dash's and Dot's seconds."""

    speed_ratio: float
    dash_seconds: tuple[float, float, float]
    dot_seconds: tuple[float, float, float]


class MorseCalls:
    """What `enable_morse` adds to a pipeline.

    Attributes:
        dot: The Dot in use.
        speed_ratio: N, with which plans for `lsd=` are made. It starts as what Dot's config says,
            so that the same call gives the same image on every machine; None until first needed
            where the config says nothing. Set it, or measure it with `measure_speed_ratio`.
        last_run: What the latest planned call did; None after a call without a plan.
    """

    dot: Dot | None
    speed_ratio: float | None
    last_run: MorseRun | None

    def __call__(
        self,
        *args: object,
        lsd: float | None = None,
        num_dash_steps: int | None = None,
        num_dot_steps: int | None = None,
        plan: MorsePlan | str | Sequence[bool] | None = None,
        **kwargs: object,
    ) -> object:
        """Call the pipeline, with Dot where planned.

        Args:
            args: The pipeline's own arguments.
            lsd: Budget in evaluations of Dash; Dot's count for 1/`speed_ratio` each.
            num_dash_steps: Dash evaluations, with `num_dot_steps` or `num_inference_steps`.
            num_dot_steps: Dot evaluations.
            plan: Every evaluation's model: a `MorsePlan`, a string such as "DooDoo", or booleans
                (True for Dash).
            kwargs: The pipeline's own keyword arguments.

        Returns:
            What the pipeline returns; without a plan exactly what it returns without Morse.

        Raises:
            ValueError: If the arguments contradict each other.
        """
        steps = kwargs.get("num_inference_steps")
        chosen = self._make_plan(lsd, num_dash_steps, num_dot_steps, plan, steps, (args, kwargs))
        if chosen is None:
            self.last_run = None
            return super().__call__(*args, **kwargs)
        return self._run(chosen, args, {**kwargs, "num_inference_steps": len(chosen)})

    def _run(self, plan: MorsePlan, args: tuple, kwargs: dict, timed: bool = False) -> object:
        denoiser = find_denoiser(self)
        if isinstance(self.dot, MorseDot):
            self.dot.bind(denoiser)
        install_switch(denoiser)
        run = MorseRun(plan, self.speed_ratio, timings=[] if timed else None)
        run.denoiser, run.dot, run.scheduler = denoiser, self.dot, self.scheduler
        self.last_run, started = run, time.perf_counter()
        token = CURRENT_RUN.set(run)
        try:
            output = super().__call__(*args, **kwargs)
            if self._execution_device.type != "cpu":
                torch.accelerator.synchronize(self._execution_device)
            return output
        finally:
            CURRENT_RUN.reset(token)
            run.finish(time.perf_counter() - started)
            _warn_unless_engaged(run)

    def _make_plan(
        self,
        lsd: float | None,
        num_dash: int | None,
        num_dot: int | None,
        plan: MorsePlan | str | Sequence[bool] | None,
        steps: int | None,
        call: tuple[tuple, dict],
    ) -> MorsePlan | None:
        counts = num_dash is not None or num_dot is not None
        if (lsd is not None) + counts + (plan is not None) > 1:
            raise ValueError(
                "give only one of lsd, plan, and num_dash_steps with num_dot_steps; got "
                f"lsd={lsd}, plan={plan}, num_dash_steps={num_dash}, num_dot_steps={num_dot}."
            )
        if lsd is not None:
            if self.dot is None:
                warnings.warn("lsd was given but the pipeline has no dot: all Dash.", stacklevel=3)
            chosen = MorsePlan.from_budget(lsd, self._known_speed_ratio(*call), self.plan_ratio)
        elif counts:
            chosen = _plan_from_counts(num_dash, num_dot, steps)
        elif plan is not None:
            chosen = MorsePlan.parse(plan)
        else:
            return None
        if steps is not None and steps != len(chosen):
            raise ValueError(
                f"num_inference_steps={steps} but the plan has {len(chosen)} evaluations; leave "
                "num_inference_steps away."
            )
        if chosen.num_dot and self.dot is None:
            raise ValueError("the plan has Dot evaluations but the pipeline has no dot.")
        return chosen

    @property
    def plan_ratio(self) -> float:
        """Evaluations per LSD that plans for `lsd=` aim at, by Dot's config and the scheduler."""
        config = self.dot.config if isinstance(self.dot, MorseDot) else {}
        ratios = config.get("plan_ratio") or {}
        default = ratios.get("default", DEFAULT_PLAN_RATIO)
        return ratios.get(type(self.scheduler).__name__, default)

    def _known_speed_ratio(self, args: tuple = (), kwargs: dict | None = None) -> float:
        if self.dot is None:
            return 1.0
        if self.speed_ratio is None:
            self.measure_speed_ratio(*args, **{**(kwargs or {}), "generator": None})
        return self.speed_ratio

    def measure_speed_ratio(self, *args: object, repeats: int = 5, **kwargs: object) -> SpeedRatio:
        """Measure N by a run that alternates Dash and Dot, and plan with it from now on.

        Args:
            args: Arguments of the pipeline's call: a prompt, say.
            repeats: Timed evaluations of each model; two more of each warm up.
            kwargs: Its keyword arguments: the batch size that you will use, say.

        Returns:
            The ratio of the medians, and the quartiles of both times.
        """
        if self.dot is None:
            raise ValueError("the pipeline has no dot whose speed could be measured.")
        plan = MorsePlan.from_string("Do" * (repeats + 2))
        previous = self.last_run
        self._run(plan, args, {**kwargs, "num_inference_steps": len(plan)}, timed=True)
        run, self.last_run = self.last_run, previous
        seconds = {
            model: [time for name, time in run.timings if name == model][2:]
            for model in ("dash", "dot")
        }
        if not seconds["dot"]:
            raise ValueError(f"Dot was never evaluated: {dict(run.fallbacks)}.")
        self.speed_ratio = median(seconds["dash"]) / median(seconds["dot"])
        dash, dot = (tuple(quantiles(seconds[name], n=4)) for name in ("dash", "dot"))
        return SpeedRatio(self.speed_ratio, dash, dot)


def _warn_unless_engaged(run: MorseRun) -> None:
    if run.plan.num_dot and not run.num_dot and run.num_dash:
        warnings.warn(
            f"Morse planned {run.plan.num_dot} Dot evaluations and made none: "
            f"{dict(run.fallbacks) or 'the run ended early'}.",
            stacklevel=4,
        )


def _plan_from_counts(num_dash: int | None, num_dot: int | None, steps: int | None) -> MorsePlan:
    if num_dash is not None and num_dot is not None:
        return MorsePlan.uniform(num_dash, num_dot)
    if steps is None:
        raise ValueError(
            f"num_dash_steps={num_dash} and num_dot_steps={num_dot}: give both, or one of them "
            "and num_inference_steps."
        )
    return MorsePlan.from_steps(steps, num_dash if num_dash is not None else steps - num_dot)


def find_denoiser(pipe: DiffusionPipeline) -> nn.Module:
    """Give a pipeline's `unet` or `transformer`.

    Raises:
        ValueError: If it has neither.
    """
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return getattr(pipe, name)
    raise ValueError(f"{type(pipe).__name__} has no unet or transformer to speed up.")
