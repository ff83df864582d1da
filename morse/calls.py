"""What a pipeline with Morse attached does when it is called: plan, run, measure."""

import time
import warnings
from collections.abc import Sequence
from functools import partial, wraps
from statistics import median

import torch
from diffusers import DiffusionPipeline
from torch import nn

from morse.denoisers import Denoiser, find_controlnet, find_denoisers
from morse.dot import MorseDot
from morse.dot.card import pipeline_card
from morse.dot.fingerprint import check_fingerprint
from morse.dot.hub import Publishable
from morse.dot.wrapped import unwrap
from morse.one_pass import read_guidance
from morse.plan import MorsePlan
from morse.plan_choice import PlanChoice
from morse.prepare import DOT_IN_CONFIG, check_dot, prepare_dot, remember, replace_module, switched
from morse.rates import choose_base_space
from morse.saved_plans import scheduler_options
from morse.signatures import find_signature
from morse.slot import CURRENT_RUN
from morse.summary import MorseRun, SpeedRatio, quartiles, summarize_run, warn_unless_engaged
from morse.switch import Dispatcher, Rebinds


class MorseCalls(PlanChoice, Publishable):
    """What `enable_morse` adds to a pipeline; see `PlanChoice` for `dot` and `speed_ratio`.

    Attributes:
        measured: What `measure_speed_ratio` found last; None before.
        last_run: What the latest planned call did; None after a call without a plan.
    """

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
                (True for Dash). With `lsd`: "uniform", to leave aside what is saved with Dot.
            kwargs: The pipeline's own keyword arguments.

        Returns:
            What the pipeline returns; without a plan exactly what it returns without Morse.

        Raises:
            ValueError: If the arguments contradict each other, the budget is below 1, the plan
                needs a Dot or a mixture that is not there, the scheduler can't make so many
                evaluations, or N is not known and can't be measured without a prompt.
        """
        if all(choice is None for choice in (lsd, num_dash_steps, num_dot_steps, plan)):
            self.last_run = None
            token = CURRENT_RUN.set(None)  # of a planned run, from whose callback this may come
            try:
                return super().__call__(*args, **kwargs)
            finally:
                CURRENT_RUN.reset(token)
        arguments = self._name_arguments(args, kwargs)
        wanted = self._choose(arguments, lsd, num_dash_steps, num_dot_steps, plan)
        with scheduler_options(self, wanted.scheduler):
            chosen, steps = self._fit_plan(wanted.plan, arguments, lsd is not None, lsd)
            return self._run(chosen, {**arguments, "num_inference_steps": steps})

    def __setattr__(self, name: str, value: object) -> None:
        """Set a component; a wrong Dot is refused, and a replaced denoiser let go.

        Another Dot brings its own N, and pipelines made of the same parts get it from then on.
        """
        if name == "dot":
            check_dot(value)
        before = vars(self).get(name)
        super().__setattr__(name, value)
        if name == "dot" and isinstance(value, MorseDot) and self._made_of[1]:
            # diffusers would take the inner module's name, or leave it at None.
            self.register_to_config(dot=DOT_IN_CONFIG)
        if name == "dot" and value is not before:
            self.speed_ratio = value.config.speed_ratio if isinstance(value, MorseDot) else None
            self.measured = None
            remember(self, value)
        if name == "scheduler":
            # Combined pipelines, Kandinsky's, have another one with it that makes the loop.
            for part in vars(self).values():
                if isinstance(part, DiffusionPipeline) and vars(part).get("scheduler") is before:
                    part.scheduler = value
        if isinstance(before, nn.Module) and before is not value:
            replace_module(self, before, value)

    def _name_arguments(self, args: tuple, kwargs: dict) -> dict[str, object]:
        """Give the pipeline's own arguments by name."""
        signature = find_signature(self._morse_base, "__call__")
        _, *named = signature.bind(self, *args, **kwargs).arguments.items()
        arguments = dict(named)
        return arguments | arguments.pop("kwargs", {})

    def _with_defaults(self, arguments: dict[str, object]) -> dict[str, object]:
        parameters = find_signature(self._morse_base, "__call__").parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty} | arguments

    def _run(self, plan: MorsePlan, arguments: dict, timed: bool = False) -> object:
        denoisers, controlnet = find_denoisers(self), find_controlnet(self)
        prepare_dot(self, self.dot, next(iter(denoisers.values())))
        remember(self, self.dot)
        eta = self._with_defaults(arguments).get("eta")
        base_space = choose_base_space(self.scheduler, getattr(self.dot, "base_space", "raw"), eta)
        if type(self).__name__.startswith("Marigold"):
            base_space = "raw"  # its input begins with the picture, not with the noisy sample
        # A weight-shared Dot belongs to the denoiser that starts.
        shared_with = next(iter(denoisers)) if isinstance(self.dot, MorseDot) else None
        with_dots = [
            Denoiser(name, module, self.dot if shared_with in (None, name) else None)
            for name, module in denoisers.items()
        ]
        rebinds: Rebinds = "never"
        if hasattr(self, "enable_fuser"):  # GLIGEN's, which sets Dash otherwise midway
            rebinds = "each evaluation"
        elif any("callback" in name and arguments[name] for name in arguments):
            rebinds = "each of Dash"
        run = MorseRun(plan, self.speed_ratio, timings=[] if timed else None, base_space=base_space)
        guidance = partial(read_guidance, self)
        dispatcher = Dispatcher(run, with_dots, self.scheduler, guidance, controlnet, rebinds)
        self.last_run, started = run, time.perf_counter()
        token = CURRENT_RUN.set(dispatcher)
        try:
            output = super().__call__(**arguments)
            if self._execution_device.type != "cpu":
                torch.accelerator.synchronize(self._execution_device)
        finally:
            CURRENT_RUN.reset(token)
            run.seconds = time.perf_counter() - started
        if not getattr(self, "_interrupt", False):
            warn_unless_engaged(run)
        return output

    def measure_speed_ratio(self, *args: object, repeats: int = 5, **kwargs: object) -> SpeedRatio:
        """Measure N by a run that alternates Dash and Dot, and plan with it from now on.

        Args:
            args: Arguments of the pipeline's call: a prompt, say.
            repeats: Timed evaluations of each model, 2 or more; two more of each warm up.
            kwargs: Its keyword arguments: the batch size that you will use, say.

        Returns:
            The ratio of the medians, and the quartiles of both times.

        Raises:
            ValueError: If there is no Dot, or fewer than two times of Dash or Dot.
        """
        if repeats < 2:
            raise ValueError(f"repeats is {repeats}, but must be 2 or more, for quartiles.")
        if self.dot is None:
            raise ValueError("the pipeline has no dot whose speed could be measured.")
        arguments = self._name_arguments(args, {**kwargs, "num_inference_steps": None})
        plan, steps = self._fit_plan("Do" * (repeats + 2), arguments, shorten=True)
        previous = self.last_run
        try:
            self._run(plan, {**arguments, "num_inference_steps": steps}, timed=True)
            run = self.last_run
        finally:
            self.last_run = previous
        seconds = {
            model: [time for name, time in run.timings if name == model][2:]
            for model in ("dash", "dot")
        }
        counts = {model: len(own) for model, own in seconds.items()}
        if min(counts.values()) < 2:
            raise ValueError(
                f"N needs 2 times or more of Dash and of Dot, warmed up, but a run of {len(plan)} "
                f"evaluations gave {counts}; what Dash made in Dot's place: {dict(run.fallbacks)}."
            )
        speed_ratio = median(seconds["dash"]) / median(seconds["dot"])
        dash, dot = (tuple(quartiles(seconds[model])) for model in ("dash", "dot"))
        self.measured = SpeedRatio(speed_ratio, dash, dot)
        self.speed_ratio = speed_ratio
        return self.measured

    def morse_summary(self) -> str:
        """Tabulate the latest planned call: plan, LSD, times, and fallbacks with their reasons."""
        if self.last_run is None:
            return "The latest call, if any, was not planned by Morse: give lsd= or plan=."
        return summarize_run(self.last_run, self.measured)

    @wraps(Publishable.save_pretrained)
    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        """Save the pipeline with its Dot; warns where Dash's weights are not Dot's Dash's."""
        dash = next(iter(switched(self)), None)
        if isinstance(self.dot, MorseDot) and dash is not None:
            try:
                check_fingerprint(unwrap(dash), self.dot.config.dash_fingerprint)
            except ValueError as error:
                warnings.warn(
                    "what is saved will be refused when it is loaded, as its denoiser is not the "
                    "one that dot was trained for. Where a LoRA was fused and unloaded, load the "
                    "pipeline anew, save it without the LoRA, and load that after every load. "
                    f"{error}",
                    stacklevel=2,
                )
        super().save_pretrained(*args, **kwargs)

    def model_card(self) -> str:
        """Write the card that is saved along: what is known of the pipeline and its Dot."""
        return pipeline_card(self, self.dot if isinstance(self.dot, MorseDot) else None)
