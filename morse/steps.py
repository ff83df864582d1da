"""How many model evaluations a pipeline's call makes, and which step count gives so many.

The two differ: a second-order scheduler evaluates most of its steps twice, and image-to-image
pipelines leave out the first steps. A copy of the scheduler is asked, so the pipeline's own stays
as it is.
"""

import copy
import inspect
import math
from types import SimpleNamespace

from diffusers import DiffusionPipeline

from morse.plan import MorsePlan
from morse.saved_plans import STRENGTHS, find_strength

MOST_STEPS = 1000
_WITH_CLEAN_END = ("DDPMWuerstchenScheduler", "SCMScheduler")  # a timestep, but not evaluated
_FIXING = ("timesteps", "sigmas")
_CUTTING = (*STRENGTHS, "denoising_start", "denoising_end")
# Their step ends `num_train_timesteps // num_inference_steps` below, wherever the next one begins.
_ROUNDING = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")
_MOST_DRIFT = 0.015  # of a step; from 2 % on it costs 1 to 5 dB (eval/results/NOTES.md)
_LEAST_LENGTH = 0.8  # so much of a plan is left where it would drift


def count_evaluations(pipe: DiffusionPipeline, arguments: dict[str, object], steps: int) -> int:
    """Count the evaluations that a call with `num_inference_steps=steps` makes.

    Args:
        pipe: The pipeline.
        arguments: All arguments of its call by name, defaults included; read are those that choose
            or cut the timesteps (`timesteps`, `sigmas`, `strength`, `denoising_start`, ...).
        steps: `num_inference_steps`; ignored where `timesteps` or `sigmas` are given.

    Raises:
        ValueError: If the scheduler can't take so many steps.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    steps = _set_timesteps(scheduler, arguments, steps)
    timesteps = scheduler.timesteps
    # Combined pipelines, Kandinsky's, leave the loop to another one.
    cut = getattr(type(getattr(pipe, "decoder_pipe", pipe)), "get_timesteps", None)
    # Latent consistency's image-to-image has the method too, but its scheduler applies `strength`.
    if cut is not None and _is_cut(arguments):
        known = {"device": "cpu", **arguments, "num_inference_steps": steps}
        # What pipelines of videos hand over here is the scheduler's, not what the call was given.
        known |= {"timesteps": timesteps, "sigmas": getattr(scheduler, "sigmas", None)}
        known["strength"] = find_strength(arguments)
        names = [name for name in inspect.signature(cut).parameters if name in known]
        stand_in = SimpleNamespace(scheduler=scheduler, config=pipe.config)
        *_, timesteps, _ = cut(stand_in, **{name: known[name] for name in names})
    if type(scheduler).__name__ in _WITH_CLEAN_END:
        timesteps = timesteps[:-1]
    end = arguments.get("denoising_end")
    if isinstance(end, float) and 0 < end < 1:
        # As SDXL's pipelines do it, by value and without telling the scheduler.
        total = scheduler.config.num_train_timesteps
        timesteps = [timestep for timestep in timesteps if timestep >= round(total - end * total)]
    return len(timesteps)


def _is_cut(arguments: dict[str, object]) -> bool:
    """Tell whether a pipeline that can leave out its first steps does so in such a call."""
    if "original_inference_steps" in arguments or find_strength(arguments) is None:
        return False
    return not arguments.get("enforce_inference_steps")


def _set_timesteps(scheduler: object, arguments: dict[str, object], steps: int) -> int:
    """Call `scheduler.set_timesteps` as the pipeline does when it is called with `arguments`.

    Returns:
        `steps`, or how many timesteps there are where the call names them one by one.
    """
    parameters = inspect.signature(scheduler.set_timesteps).parameters
    names = [*_FIXING]
    if "original_inference_steps" in arguments:  # latent consistency
        names += ["original_inference_steps", "strength"]
    options: dict[str, object] = {
        name: arguments[name]
        for name in names
        if name in parameters and arguments.get(name) is not None
    }
    for name in {"max_timesteps", "intermediate_timesteps"} & set(parameters) & set(arguments):
        options[name] = arguments[name]  # of SCM, for which None is another choice
    if scheduler.config.get("use_dynamic_shifting") and "mu" in parameters:
        options["mu"] = 1.0  # shifts the values, not their number
    if fixes_timesteps(scheduler, arguments):
        scheduler.set_timesteps(**options)
        return len(scheduler.timesteps)
    scheduler.set_timesteps(steps, **options)
    return steps


def fixes_timesteps(scheduler: object, arguments: dict[str, object]) -> bool:
    """Tell whether a call names its timesteps one by one, and the scheduler takes them so."""
    parameters = inspect.signature(scheduler.set_timesteps).parameters
    return any(name in parameters and arguments.get(name) is not None for name in _FIXING)


def find_steps(
    pipe: DiffusionPipeline, arguments: dict[str, object], length: int
) -> tuple[int, int]:
    """Find the `num_inference_steps` that gives `length` evaluations, or the most below.

    Args:
        pipe: The pipeline.
        arguments: As for `count_evaluations`.
        length: Evaluations wanted, at least 1.

    Returns:
        `num_inference_steps` and the evaluations that it gives.

    Raises:
        ValueError: If every possible number of evaluations is larger; the smallest is named.
    """
    counts = possible_counts(pipe, arguments, length)
    best = max((count for count in counts if count <= length), default=None)
    if best is None:
        raise ValueError(
            f"{_whose(pipe)} can't make as few as {length} evaluations; the fewest "
            f"possible are {min(counts)}."
        )
    return counts[best], best


def shorten_plan(
    pipe: DiffusionPipeline,
    arguments: dict[str, object],
    plan: MorsePlan,
    budget: tuple[float, float] | None = None,
) -> tuple[MorsePlan, int]:
    """Shorten a plan to a length that the pipeline can make, if it can't make that of the plan.

    With Dot it must also suit the scheduler: DDIM's step ends T // n timesteps below, and where
    that is not where the next one begins (42 trailing steps of 1000 timesteps, say, but not 40),
    the noise that is left over adds up.

    Args:
        pipe: The pipeline.
        arguments: As for `count_evaluations`.
        plan: The plan.
        budget: LSD and N, if what shortening saves is to go to Dash.

    Returns:
        The plan, and the `num_inference_steps` that gives so many evaluations.

    Raises:
        ValueError: See `find_steps`, whose arguments these are.
    """
    steps, made = find_steps(pipe, arguments, len(plan))
    if plan.num_dot and _drifts(pipe.scheduler, steps):
        fewer = range(made - 1, math.ceil(_LEAST_LENGTH * made) - 1, -1)
        others = (find_steps(pipe, arguments, length) for length in fewer)
        suiting = (other for other in others if not _drifts(pipe.scheduler, other[0]))
        steps, made = next(suiting, (steps, made))
    shorter = plan.shortened(made)
    if budget is not None and made < len(plan):
        shorter = shorter.filled(*budget)
    return shorter, steps


def _drifts(scheduler: object, steps: int) -> bool:
    """Tell whether the steps of a scheduler end noticeably off where the next ones begin."""
    config = scheduler.config
    if type(scheduler).__name__ not in _ROUNDING or config.timestep_spacing != "trailing":
        return False
    total = config.num_train_timesteps
    return total / steps > (1 + _MOST_DRIFT) * (total // steps)


def find_exact_steps(pipe: DiffusionPipeline, arguments: dict[str, object], length: int) -> int:
    """Find the `num_inference_steps` that gives exactly `length` evaluations.

    Raises:
        ValueError: If there is none; the nearest possible lengths are named.
    """
    counts = possible_counts(pipe, arguments, length)
    if length not in counts:
        below = [count for count in counts if count < length][-1:]
        above = [count for count in counts if count > length][:1]
        nearest = " or ".join(str(count) for count in below + above)
        raise ValueError(
            f"the plan has {length} evaluations, which {_whose(pipe)} can't make; give a plan of "
            f"{nearest}."
        )
    return counts[length]


def possible_counts(
    pipe: DiffusionPipeline, arguments: dict[str, object], length: int
) -> dict[int, int]:
    """List possible numbers of evaluations up to the first that is at least `length`.

    Returns:
        Number of evaluations -> the smallest `num_inference_steps` that gives it, increasing; just
        `length` where `num_inference_steps=length` gives it, as first-order schedulers do. Where a
        call ends early (`denoising_end`) it is the largest: the last evaluation is nearest to that
        end then, where another pipeline goes on.

    Raises:
        ValueError: If the scheduler takes no number of steps at all, or none leaves an evaluation.
    """

    def count(steps: int) -> int | None:
        try:
            return count_evaluations(pipe, arguments, steps)
        except ValueError:
            return None

    if fixes_timesteps(pipe.scheduler, arguments):
        fixed = count_evaluations(pipe, arguments, length)
        if not fixed:
            raise ValueError(_nothing_left(pipe, arguments))
        return {fixed: fixed}
    ends_early = isinstance(arguments.get("denoising_end"), float)
    if count(length) == length and not ends_early:
        return {length: length}
    counts: dict[int, int] = {}
    for steps in range(1, MOST_STEPS + 1):
        found = count(steps)
        if found is None and counts:
            break  # more steps than the scheduler takes
        if found and ends_early:
            counts[found] = steps
        elif found:
            counts.setdefault(found, steps)
        if found is not None and found >= length + ends_early:
            break
    if not counts:
        count_evaluations(pipe, arguments, length)  # raises the scheduler's own error, if any
        raise ValueError(_nothing_left(pipe, arguments))
    return counts


def _nothing_left(pipe: DiffusionPipeline, arguments: dict[str, object]) -> str:
    given = {name: arguments[name] for name in _CUTTING if arguments.get(name) is not None}
    cuts = ", ".join(f"{name}={value}" for name, value in given.items())
    return (
        f"{_whose(pipe)} makes no evaluation at all with {cuts}, however many steps there are; "
        "raise strength or denoising_end, or call it without a budget, counts or a plan."
    )


def _whose(pipe: DiffusionPipeline) -> str:
    return f"{type(pipe.scheduler).__name__} in {type(pipe).__name__}"
