"""Dash's latest estimate in a pipeline's run, and how Dot corrects it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from morse.denoisers import Call, result_of
from morse.history import Evaluation, extrapolate
from morse.rates import prediction_type
from morse.sampling import Dot, JumpPoint, dot_estimate, estimate
from morse.spaces import BaseSpace, Rates


@dataclass(frozen=True, eq=False)
class LatestEstimate:
    """What a Dash evaluation leaves for the Dot evaluations that follow.

    Attributes:
        jump: Where Dash was evaluated and what it said.
        rates: The scheduler's signal and noise rates there; None where they are not needed.
        container: Puts a result into the kind of container that Dash returns.
        earlier_rates: The rates of `jump.earlier`; None where there is none or they are not known.
        scale: For a Dot of guided estimates the guidance scale as a number too, to compare without
            waiting for a device; else None.
    """

    jump: JumpPoint
    rates: Rates | None
    container: Callable[[Tensor], object]
    earlier_rates: Rates | None = None
    scale: float | None = None


def keep_estimate(
    output: object,
    sample: Tensor,
    timestep: Tensor,
    rates: Rates | None,
    earlier: object = None,
) -> LatestEstimate | str:
    """Keep what Dot needs of a Dash evaluation; says why, where it can't be corrected.

    `earlier` is what this gave for the evaluation before it; nothing further back stays.
    """
    found = result_of(output)
    if found is None:
        return "it returns several results"
    result, container = found
    known = isinstance(earlier, LatestEstimate)
    before, before_rates = (earlier.jump, earlier.rates) if known else (None, None)
    _, jump = estimate("dash", sample, timestep, before, lambda *_: result, None)
    return LatestEstimate(jump, rates, container, before_rates)


def _evaluations(latest: LatestEstimate) -> tuple[Evaluation, Evaluation | None]:
    jump, earlier = latest.jump, latest.jump.earlier
    now = (jump.model_output, jump.sample, latest.rates)
    if earlier is None or latest.earlier_rates is None or latest.rates is None:
        return now, None
    return now, (earlier.model_output, earlier.sample, latest.earlier_rates)


def correct_estimate(
    latest: LatestEstimate,
    dot: Dot,
    call: Call,
    timestep: Tensor,
    rates: Rates | None,
    base_space: BaseSpace,
    scheduler: object,
) -> object:
    """Evaluate Dot (Equation 5, second line).

    Args:
        latest: Dash's latest estimate for the same branch.
        dot: Is given the call's conditions too.
        call: What Dash would have been evaluated on.
        timestep: The call's, as a tensor.
        rates: The scheduler's rates here; None to take Dash's estimate as it is.
        base_space: What of it to take otherwise.
        scheduler: Says what the denoiser predicts.

    Returns:
        Dot's estimate in Dash's container.
    """

    base, jump = None, latest.jump
    if rates is not None:
        cap, kind = getattr(dot, "extrapolation_cap", 0.0), prediction_type(scheduler)
        evaluations = _evaluations(latest)
        base, trend = extrapolate(base_space, *evaluations, (call.sample, rates), kind, cap)
        jump = replace(jump, trend=trend)
    conditioned = partial(dot, **call.conditions)
    conditioned.independent = getattr(dot, "independent", False)
    return latest.container(dot_estimate(conditioned, call.sample, timestep, jump, base))
