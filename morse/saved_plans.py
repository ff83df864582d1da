"""Plans that were searched for a Dot (`morse plan`) and are saved in its config."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from threading import Lock, RLock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from morse.plan import MorsePlan
from morse.rates import own_parameters, unusual_options

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

# N differs by a tenth between measurements and by a fifth between processors, so a plan's cost by
# some per cent: that must not decide between this plan and one for three quarters of the budget.
_MAX_OVERDRAFT = 0.05
_CHOOSE_TIMESTEPS = (
    "num_inference_steps",
    "timesteps",
    "sigmas",
    "denoising_start",
    "denoising_end",
)
# What pipelines call the share of a run that they make; where LTX has two, the last is that of its
# conditions.
STRENGTHS = ("denoise_strength", "inpaint_strength", "strength")
# Options that make other solvers of one scheduler class. Where steps lie is not among them: a plan
# brings its own grid, whichever the pipeline has.
_SOLVER_OPTIONS = ("algorithm_type", "solver_order", "solver_type", "clean_above")
_GRID_OPTIONS = (
    "timestep_power",
    "fitted_steps",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
)


@dataclass(frozen=True)
class SavedPlan:
    """A plan found for a scheduler and a budget: the best, or one beside it (`planning.beside`).

    Attributes:
        lsd: The budget.
        plan: Every evaluation's model, such as "DooDoo"; it may be all Dash.
        scheduler: Options of the scheduler that lay its grid, such as {"timestep_power": 1.5} or
            `LeapfrogScheduler`'s "fitted_steps", set for the call. Of those that
            `read_grid_options` lists, what is left out is as the class has it by default.
        speed_ratio: N that the plan was searched with.
        psnr: In dB, to many steps from the same noise, on the calibration set; None where it is not
            the best, or not known.
        uniform_psnr: The same of the best uniform plan, all Dash among them.
        num_images: Size of the calibration set.
        solver_options: What makes the scheduler's class the solver that the plan is for, as
            `read_solver_options` gives it; what is left out is as the class has it by default.
    """

    lsd: float
    plan: str
    scheduler: Mapping[str, object] = field(default_factory=dict)
    speed_ratio: float | None = None
    psnr: float | None = None
    uniform_psnr: float | None = None
    num_images: int | None = None
    solver_options: Mapping[str, object] = field(default_factory=dict)

    @property
    def grid(self) -> str:
        """The scheduler's options in few words, but for the spacing that all plans have."""
        return ", ".join(
            name.replace("_", " ") if name == "fitted_steps" else f"{name} {value}"
            for name, value in self.scheduler.items()
            if name != "timestep_spacing"
        )

    def to_config(self) -> dict[str, object]:
        """Give what is written into Dot's config."""
        return asdict(self)


def is_affordable(cost: float, lsd: float) -> bool:
    """Tell whether a plan that was made for `lsd` may run on it at its cost with today's N."""
    return cost <= lsd * (1 + _MAX_OVERDRAFT)


def read_solver_options(scheduler: object) -> dict[str, object]:
    """Give the options that make a scheduler's class the solver that it is."""
    return {name: scheduler.config[name] for name in _solver_defaults(scheduler)}


def is_saved_for(entry: Mapping[str, object], scheduler: object) -> bool:
    """Tell whether a plan saved for a scheduler's class is for the solver that the scheduler is."""
    saved = _solver_defaults(scheduler) | dict(entry.get("solver_options", {}))
    return saved == read_solver_options(scheduler)


def _solver_defaults(scheduler: object) -> dict[str, object]:
    parameters = own_parameters(scheduler)
    return {name: parameters[name].default for name in _SOLVER_OPTIONS if name in parameters}


def read_grid_options(scheduler: object) -> dict[str, object]:
    """Give the options by which a scheduler's grid is not that of its class's defaults."""
    return unusual_options(scheduler, _GRID_OPTIONS)


def find_saved_plan(
    plans: Mapping[str, Sequence[Mapping[str, object]]] | None,
    scheduler: object,
    lsd: float,
    speed_ratio: float,
) -> SavedPlan | None:
    """Find the plan that was saved for a scheduler and a budget.

    A budget that none was searched for is spent by the plan of the next smaller one, if that is at
    least half as large, and by further Dash evaluations at its end. A plan whose steps were fitted
    is run as it is: more evaluations at steps in between may give worse images. So no budget gives
    worse ones than a smaller budget, but for chance. Of several for one budget it is the first that
    can be afforded: one with Dot, say, and for slow Dots one of Dash alone.

    Args:
        plans: Dot's `config.plans`: scheduler class name -> saved plans.
        scheduler: The pipeline's; plans for another solver of its class are passed over.
        lsd: The budget.
        speed_ratio: N now. A plan that costs over 5 % more than `lsd` with it is not taken.

    Returns:
        The plan as it is to be run; None if there is none that fits.
    """
    fitting, parameters = [], own_parameters(scheduler)
    plain = {name: parameters[name].default for name in read_grid_options(scheduler)}
    for entry in (plans or {}).get(type(scheduler).__name__, ()):
        if not is_saved_for(entry, scheduler):
            continue
        saved = SavedPlan(**entry)
        plan = MorsePlan.from_string(saved.plan)
        if lsd / 2 <= saved.lsd <= lsd and is_affordable(plan.cost(speed_ratio), lsd):
            if "fitted_steps" not in saved.scheduler:
                plan = plan.extended(lsd, speed_ratio)
            grid = {**plain, **saved.scheduler}
            fitting.append(replace(saved, plan=str(plan), scheduler=grid))
    return max(fitting, key=lambda saved: saved.lsd, default=None)


def find_strength(arguments: Mapping[str, object]) -> object:
    """Give the share of a run, of its end, that a call makes, from 0 to 1; None if it has no word.

    Args:
        arguments: Those of a pipeline's call by name.
    """
    return next((arguments[name] for name in STRENGTHS if name in arguments), None)


def chooses_timesteps(arguments: Mapping[str, object]) -> bool:
    """Tell whether a pipeline's call chooses or cuts its timesteps itself.

    At a strength of 1, which Stable Diffusion's inpainting has by default, it makes whole runs.
    """
    strength = find_strength(arguments)
    is_cut = isinstance(strength, (int, float)) and strength < 1
    return is_cut or any(arguments.get(name) is not None for name in _CHOOSE_TIMESTEPS)


# One for each pipeline, and not in it: copies and pickles take no locks.
_LOCKS: "WeakKeyDictionary[DiffusionPipeline, AbstractContextManager]" = WeakKeyDictionary()
_LOCKS_LOCK = Lock()


def _lock_of(pipe: "DiffusionPipeline") -> AbstractContextManager:
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(pipe, RLock())


@contextmanager
def scheduler_options(pipe: "DiffusionPipeline", options: Mapping[str, object]) -> Iterator[None]:
    """Give a pipeline's scheduler other options for a while, in one thread at a time.

    Raises:
        ValueError: If the scheduler has no such option.
    """
    if not options:
        yield
        return
    with _lock_of(pipe):
        before = pipe.scheduler
        pipe.scheduler = with_options(before, options)
        try:
            yield
        finally:
            pipe.scheduler = before


def with_options(before: "SchedulerMixin", options: Mapping[str, object]) -> "SchedulerMixin":
    """Make a scheduler like another with other options.

    Raises:
        ValueError: If it has no such option.
    """
    from morse.schedulers import remake  # brings diffusers, which settings do without

    unknown = sorted(set(options) - set(before.config))
    if unknown:
        raise ValueError(
            f"scheduler options {unknown} are not {type(before).__name__}'s; it has "
            f"{sorted(name for name in before.config if name[0] != '_')}."
        )
    made = remake(type(before), {**before.config, **options})
    if hasattr(before, "set_shift") and "shift" not in options:
        made.set_shift(before.shift)  # the config does not tell of it
    return made
