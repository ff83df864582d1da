"""What a pipeline with Morse attached does when it is called: plan, run, measure."""

import inspect
import time
import warnings
from collections.abc import Sequence
from functools import partial
from statistics import median, quantiles

import torch

from morse.denoisers import Denoiser, find_controlnet, find_denoisers
from morse.dot import MorseDot
from morse.dot.card import pipeline_card
from morse.dot.hub import Publishable
from morse.one_pass import read_guidance
from morse.plan import MorsePlan
from morse.prepare import prepare_dot, remember
from morse.rates import choose_base_space
from morse.sampling import Dot
from morse.saved_plans import (
    SavedPlan,
    chooses_timesteps,
    find_saved_plan,
    scheduler_options,
)
from morse.slot import CURRENT_RUN, install_switch
from morse.steps import count_evaluations, find_exact_steps, find_steps
from morse.summary import SpeedRatio, summarize_run, warn_unless_engaged
from morse.switch import MorseRun

DEFAULT_PLAN_RATIO = 2.0


class MorseCalls(Publishable):
    """What `enable_morse` adds to a pipeline.

    Attributes:
        dot: The Dot in use.
        speed_ratio: N, with which plans for `lsd=` are made. It starts as what Dot's config says,
            so that the same call gives the same image on every machine; None until first needed
            where the config says nothing. Set it, or measure it with `measure_speed_ratio`.
        measured: What `measure_speed_ratio` found last; None before.
        last_run: What the latest planned call did; None after a call without a plan.
    """

    dot: Dot | None = None
    speed_ratio: float | None = None
    measured: SpeedRatio | None = None
    last_run: MorseRun | None = None

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
            lsd: Budget in evaluations of Dash; Dot's count for 1/`speed_ratio` each. It is spent
                as `plan_for` says.
            num_dash_steps: Dash evaluations, with `num_dot_steps` or `num_inference_steps`.
            num_dot_steps: Dot evaluations.
            plan: Every evaluation's model: a `MorsePlan`, a string such as "DooDoo", or booleans
                (True for Dash). With `lsd`: "uniform", to leave a saved plan aside.
            kwargs: The pipeline's own keyword arguments.

        Returns:
            What the pipeline returns; without a plan exactly what it returns without Morse.

        Raises:
            ValueError: If the arguments contradict each other.
        """
        if all(choice is None for choice in (lsd, num_dash_steps, num_dot_steps, plan)):
            self.last_run = None
            return super().__call__(*args, **kwargs)
        arguments = self._name_arguments(args, kwargs)
        saved = None
        if lsd is not None and plan == "uniform":
            plan = None
        elif lsd is not None and plan is None:
            saved = self._saved_plan(lsd, arguments)
        if saved is not None:
            lsd, plan = None, saved.plan
        with scheduler_options(self, saved.scheduler if saved else {}):
            wanted = self._make_plan(lsd, num_dash_steps, num_dot_steps, plan, arguments)
            chosen, steps = self._fit_plan(wanted, arguments, shorten=lsd is not None)
            return self._run(chosen, {**arguments, "num_inference_steps": steps})

    def plan_for(self, lsd: float, **kwargs: object) -> SavedPlan:
        """Tell how a call with this budget is spent: which plan, on which grid.

        That is the plan that was saved with Dot for this scheduler (`morse plan`;
        `morse.saved_plans.find_saved_plan` says which), if there is one, else a uniform one.

        Args:
            lsd: The budget.
            kwargs: The call's other arguments: some choose the timesteps, which no saved plan fits.
        """
        saved = self._saved_plan(lsd, kwargs)
        return saved or SavedPlan(lsd, str(self._make_plan(lsd, None, None, None, kwargs)))

    def _saved_plan(self, lsd: float, arguments: dict[str, object]) -> SavedPlan | None:
        """Find the plan that was searched for this budget; for whole runs alone."""
        plans = self.dot.config.get("plans") if isinstance(self.dot, MorseDot) else None
        given = self._with_defaults({"num_inference_steps": None, **arguments})
        if not plans or chooses_timesteps(given):
            return None
        return find_saved_plan(plans, self.scheduler, lsd, self._known_speed_ratio(arguments))

    def _name_arguments(self, args: tuple, kwargs: dict) -> dict[str, object]:
        """Give the pipeline's own arguments by name."""
        arguments = dict(inspect.signature(super().__call__).bind(*args, **kwargs).arguments)
        return arguments | arguments.pop("kwargs", {})

    def _with_defaults(self, arguments: dict[str, object]) -> dict[str, object]:
        parameters = inspect.signature(super().__call__).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty} | arguments

    def _run(self, plan: MorsePlan, arguments: dict, timed: bool = False) -> object:
        denoisers, controlnet = find_denoisers(self), find_controlnet(self)
        prepare_dot(self, self.dot, next(iter(denoisers.values())))
        remember(self, self.dot)
        if controlnet is not None:
            install_switch(controlnet)
        base_space = choose_base_space(self.scheduler, getattr(self.dot, "base_space", "raw"))
        run = MorseRun(plan, self.speed_ratio, timings=[] if timed else None, base_space=base_space)
        # A weight-shared Dot belongs to the denoiser that starts.
        shared_with = next(iter(denoisers)) if isinstance(self.dot, MorseDot) else None
        run.denoisers = [
            Denoiser(name, module, self.dot if shared_with in (None, name) else None)
            for name, module in denoisers.items()
        ]
        run.controlnet, run.scheduler = controlnet, self.scheduler
        run.read_guidance = partial(read_guidance, self)
        self.last_run, started = run, time.perf_counter()
        token = CURRENT_RUN.set(run)
        try:
            output = super().__call__(**arguments)
            if self._execution_device.type != "cpu":
                torch.accelerator.synchronize(self._execution_device)
        finally:
            CURRENT_RUN.reset(token)
            run.finish(time.perf_counter() - started)
        if not getattr(self, "_interrupt", False):
            warn_unless_engaged(run)
        return output

    def _make_plan(
        self,
        lsd: float | None,
        num_dash: int | None,
        num_dot: int | None,
        plan: MorsePlan | str | Sequence[bool] | None,
        arguments: dict[str, object],
    ) -> MorsePlan:
        """Plan as asked, whether or not the scheduler can make so many evaluations."""
        counts = num_dash is not None or num_dot is not None
        if (lsd is not None) + counts + (plan is not None) > 1:
            raise ValueError(
                "give only one of lsd, plan, and num_dash_steps with num_dot_steps; got "
                f"lsd={lsd}, plan={plan}, num_dash_steps={num_dash}, num_dot_steps={num_dot}."
            )
        if lsd is not None:
            if self.dot is None:
                warnings.warn("lsd was given but the pipeline has no dot: all Dash.", stacklevel=3)
            return MorsePlan.from_budget(lsd, self._known_speed_ratio(arguments), self.plan_ratio)
        if counts:
            steps = arguments.get("num_inference_steps")
            if steps is not None:
                steps = count_evaluations(self, self._with_defaults(arguments), steps)
            chosen = MorsePlan.from_counts(num_dash, num_dot, steps)
        else:
            chosen = MorsePlan.parse(plan)
        if chosen.num_dot and self.dot is None:
            raise ValueError("the plan has Dot evaluations but the pipeline has no dot.")
        return chosen

    def _fit_plan(
        self, plan: MorsePlan, arguments: dict[str, object], shorten: bool
    ) -> tuple[MorsePlan, int]:
        """Find the `num_inference_steps` that makes the plan's evaluations; shorten it if allowed.

        Raises:
            ValueError: If there is none.
        """
        known, steps = self._with_defaults(arguments), arguments.get("num_inference_steps")
        if steps is not None:
            count = count_evaluations(self, known, steps)
            if count != len(plan):
                raise ValueError(
                    f"num_inference_steps={steps} makes {count} evaluations but the plan has "
                    f"{len(plan)} evaluations; leave num_inference_steps away."
                )
            return plan, steps
        if not shorten:
            return plan, find_exact_steps(self, known, len(plan))
        steps, count = find_steps(self, known, len(plan))
        return plan.shortened(count), steps

    @property
    def plan_ratio(self) -> float:
        """Evaluations per LSD that plans for `lsd=` aim at, by Dot's config and the scheduler."""
        config = self.dot.config if isinstance(self.dot, MorseDot) else {}
        ratios = config.get("plan_ratio") or {}
        default = ratios.get("default", DEFAULT_PLAN_RATIO)
        return ratios.get(type(self.scheduler).__name__, default)

    def _known_speed_ratio(self, arguments: dict[str, object]) -> float:
        if self.dot is None:
            return 1.0
        if self.speed_ratio is None:
            own = {name: value for name, value in arguments.items() if name != "generator"}
            self.measure_speed_ratio(**own)
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
        arguments = self._name_arguments(args, {**kwargs, "num_inference_steps": None})
        wanted = MorsePlan.from_string("Do" * (repeats + 2))
        plan, steps = self._fit_plan(wanted, arguments, shorten=True)
        previous = self.last_run
        self._run(plan, {**arguments, "num_inference_steps": steps}, timed=True)
        run, self.last_run = self.last_run, previous
        seconds = {
            model: [time for name, time in run.timings if name == model][2:]
            for model in ("dash", "dot")
        }
        if not seconds["dot"]:
            raise ValueError(f"Dot was never evaluated: {dict(run.fallbacks)}.")
        self.speed_ratio = median(seconds["dash"]) / median(seconds["dot"])
        dash, dot = (tuple(quantiles(seconds[name], n=4)) for name in ("dash", "dot"))
        self.measured = SpeedRatio(self.speed_ratio, dash, dot)
        return self.measured

    def morse_summary(self) -> str:
        """Tabulate the latest planned call: plan, LSD, times, and fallbacks with their reasons."""
        if self.last_run is None:
            return "The latest call, if any, was not planned by Morse: give lsd= or plan=."
        return summarize_run(self.last_run, self.measured)

    def model_card(self) -> str:
        """Write the card that is saved along: what is known of the pipeline and its Dot."""
        return pipeline_card(self, self.dot if isinstance(self.dot, MorseDot) else None)
