"""The solvers that are compared, and how many model evaluations their steps take."""

import json
from functools import cache
from typing import TYPE_CHECKING

from morse.plan import MorsePlan

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# Keys as in `morse.pipeline.SCHEDULERS`; all of them deterministic.
SOLVERS = {
    "ddim": "DDIM",
    "dpmsolver++1": "DPM++ 1",
    "dpmsolver++": "DPM++ 2M",
    "unipc": "UniPC",
    "deis": "DEIS",
    "pndm": "PNDM",
    "heun": "Heun",
}
# PNDM as Stable Diffusion runs it: its Runge-Kutta start takes at least 13 evaluations, and its
# steps all have one length, which only a "leading" grid has (on a trailing one they miss).
OPTIONS = {"pndm": {"skip_prk_steps": True, "timestep_spacing": "leading", "steps_offset": 1}}


def check_solvers(solvers: tuple[str, ...]) -> None:
    """Raise ValueError for a solver that is not in `SOLVERS`."""
    for solver in solvers:
        if solver not in SOLVERS:
            raise ValueError(f"solver {solver!r} is unknown, choose from {list(SOLVERS)}")


def make_solver(solver: str, config: dict[str, object]) -> "SchedulerMixin":
    """Make the scheduler of a solver in `SOLVERS` from the config of a pipeline's own scheduler."""
    from morse.pipeline import make_scheduler

    # diffusers would give what its own scheduler left at the default the new class's default: Heun
    # would get Stable Diffusion's noise schedule in place of DDPM's.
    config = {name: value for name, value in config.items() if name != "_use_default_values"}
    return make_scheduler(solver, {**config, **OPTIONS.get(solver, {})})


def fit_steps(scheduler: "SchedulerMixin", evaluations: int) -> tuple[int, int]:
    """Find the number of steps that makes the most model evaluations within a limit.

    A copy is asked, so that `scheduler` stays as it is, and only once for the same question, so
    that asking again takes no time from what is being timed.

    Args:
        scheduler: Any diffusers scheduler.
        evaluations: The limit, at least 1.

    Returns:
        (num_inference_steps, evaluations they make).

    Raises:
        ValueError: If the scheduler can't do with so few.
    """
    return _fit_steps(type(scheduler), scheduler.to_json_string(), evaluations)


@cache
def _fit_steps(scheduler_class: type, config: str, evaluations: int) -> tuple[int, int]:
    copy = scheduler_class.from_config(json.loads(config))
    for steps in range(evaluations, 0, -1):  # a step takes one evaluation at least
        made = _count_evaluations(copy, steps)
        if made is not None and made <= evaluations:
            return steps, made
    raise ValueError(
        f"evaluations is {evaluations}, but {scheduler_class.__name__} needs more; raise the budget"
    )


def _count_evaluations(scheduler: "SchedulerMixin", num_inference_steps: int) -> int | None:
    try:
        scheduler.set_timesteps(num_inference_steps)
    except ValueError:  # PNDM's Runge-Kutta start does not fit
        return None
    return len(scheduler.timesteps)


def fit_plan(scheduler: "SchedulerMixin", plan: MorsePlan) -> MorsePlan:
    """Shorten a plan to the nearest length that the scheduler can make, Dot's evaluations first."""
    length = fit_steps(scheduler, len(plan))[1]
    if length == len(plan):
        return plan
    num_dash = min(plan.num_dash, length)
    return MorsePlan.uniform(num_dash, length - num_dash)
