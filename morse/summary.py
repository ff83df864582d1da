"""What is told about a planned run: a record, a small table, and warnings where Dot was missing."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import quantiles

from morse.plan import ModelName, MorsePlan
from morse.spaces import BaseSpace


@dataclass
class MorseRun:
    """What was planned for one pipeline call and what happened (`pipe.last_run`).

    Attributes:
        plan: What was planned.
        speed_ratio: N, with which the cost is counted; None where it is not known yet.
        num_dash: Dash evaluations made.
        num_dot: Dot evaluations made.
        num_gaussian: Evaluations answered by the Gaussian mixture that is saved with Dot.
        num_steps: How many of the plan's evaluations were reached, one a step however many
            branches.
        fallbacks: Why evaluations planned for another were made by Dash -> how many.
        seconds: Wall time of the call.
        timings: (model, seconds) of each evaluation, where the call was timed.
        base_space: What of Dash's latest estimate Dot's residual was added to.
        steps: How many evaluations each model made, step by step.
    """

    plan: MorsePlan
    speed_ratio: float | None
    num_dash: int = 0
    num_dot: int = 0
    num_gaussian: int = 0
    num_steps: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    timings: list[tuple[ModelName, float]] | None = None
    base_space: BaseSpace = "raw"
    steps: list[Counter[ModelName]] = field(default_factory=list, repr=False)

    @property
    def lsd(self) -> float | None:
        """Cost of the steps made: 1 for Dash's, 1/N for Dot's, else 0; None if N is not known."""
        dash, dot = self.steps_of("dash"), self.steps_of("dot")
        if self.speed_ratio is None:
            return None if self.num_dot else float(dash)
        return dash + dot / self.speed_ratio

    def steps_of(self, model: ModelName) -> float:
        """Count the steps made by a model.

        A step's evaluations, where guidance makes several, are a share of it each.
        """
        # An error may end a step before it has any.
        return sum(step[model] / step.total() for step in self.steps if step)


@dataclass(frozen=True)
class SpeedRatio:
    """How long evaluations take: N, and the quartiles of Dash's and Dot's seconds."""

    speed_ratio: float
    dash_seconds: tuple[float, float, float]
    dot_seconds: tuple[float, float, float]


def quartiles(seconds: Sequence[float]) -> list[float]:
    """Give the quartiles of two times or more; they lie within them."""
    return quantiles(seconds, n=4, method="inclusive")


def summarize_run(run: MorseRun, measured: SpeedRatio | None) -> str:
    """Tabulate a run: plan, evaluations, N, LSD, times and fallbacks.

    Args:
        run: What the call did.
        measured: Times of single evaluations on this machine, from which the expected time of all
            evaluations is made; None where they were not measured.
    """
    rows = {
        "plan": str(run.plan),
        "evaluations": f"{run.num_dash} Dash, {run.num_dot} Dot"
        + (f", {run.num_gaussian} of the mixture" if run.num_gaussian else ""),
        "base": run.base_space,
        "N": "not known" if run.speed_ratio is None else f"{run.speed_ratio:.2f}",
        "LSD": "not known" if run.lsd is None else f"{run.lsd:.2f}",
        "expected": "not known; measure_speed_ratio() tells",
        "measured": f"{run.seconds:.3f} s, everything included",
        "fallbacks": "; ".join(f"{reason} ({n}x)" for reason, n in run.fallbacks.items()) or "none",
    }
    if measured is not None:
        seconds = run.num_dash * measured.dash_seconds[1] + run.num_dot * measured.dot_seconds[1]
        rows["expected"] = f"{seconds:.3f} s for the evaluations alone"
    return "\n".join(f"{name:<13}{value}" for name, value in rows.items())


def warn_unless_engaged(run: MorseRun) -> None:
    """Warn if Dot ran for less than half of what was planned, or the mixture did not.

    Also if the pipeline ended too early.
    """
    planned, fallbacks, problem = run.plan, dict(run.fallbacks), None
    if planned.num_dot and not run.num_dot and run.num_dash:
        reason = fallbacks or "the run ended early"
        problem = f"{planned.num_dot} Dot evaluations and made none: {reason}."
    elif planned.num_gaussian and not run.num_gaussian and run.num_dash:
        problem = (
            f"to begin with {planned.num_gaussian} estimates of the Gaussian mixture and Dash made "
            f"them: {fallbacks}."
        )
    elif 0 < run.num_steps < len(planned):
        problem = f"{len(planned)} evaluations but the pipeline ended after {run.num_steps}."
    elif fallbacks and run.num_dash and (made := run.steps_of("dot")) < planned.num_dot / 2:
        problem = f"{planned.num_dot} Dot evaluations and made {made:g}: {fallbacks}."
    if problem is not None:
        warnings.warn(f"Morse planned {problem}", stacklevel=4)
