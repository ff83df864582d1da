"""Plans that were searched for a Dot (`morse plan`) and are saved in its config."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

from diffusers import DiffusionPipeline

from morse.plan import MorsePlan

# N differs by a tenth between measurements and by a fifth between processors, so a plan's cost by
# some per cent: that must not decide between this plan and one for three quarters of the budget.
_MAX_OVERDRAFT = 0.05
CHOOSE_TIMESTEPS = (
    "num_inference_steps",
    "timesteps",
    "sigmas",
    "strength",
    "denoising_start",
    "denoising_end",
)


@dataclass(frozen=True)
class SavedPlan:
    """The best plan found for a scheduler and a budget.

    Attributes:
        lsd: The budget.
        plan: Every evaluation's model, such as "DooDoo"; it may be all Dash.
        scheduler: Options of the scheduler that lay its grid, such as {"timestep_power": 1.5} or
            `LeapfrogScheduler`'s "fitted_steps", set for the call.
        speed_ratio: N that the plan was searched with.
        psnr: In dB, to many steps from the same noise, on the calibration set.
        uniform_psnr: The same of the best uniform plan, all Dash among them.
        num_images: Size of the calibration set.
    """

    lsd: float
    plan: str
    scheduler: Mapping[str, object] = field(default_factory=dict)
    speed_ratio: float | None = None
    psnr: float | None = None
    uniform_psnr: float | None = None
    num_images: int | None = None

    @property
    def grid(self) -> str:
        """The scheduler's options in few words."""
        return ", ".join(
            name.replace("_", " ") if name == "fitted_steps" else f"{name} {value}"
            for name, value in self.scheduler.items()
        )

    def to_config(self) -> dict[str, object]:
        """Give what is written into Dot's config."""
        return asdict(self)


def is_affordable(cost: float, lsd: float) -> bool:
    """Tell whether a plan that was made for `lsd` may run on it at its cost with today's N."""
    return cost <= lsd * (1 + _MAX_OVERDRAFT)


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
    worse ones than a smaller budget, but for chance.

    Args:
        plans: Dot's `config.plans`: scheduler class name -> saved plans.
        scheduler: The pipeline's.
        lsd: The budget.
        speed_ratio: N now. A plan that costs over 5 % more than `lsd` with it is not taken.

    Returns:
        The plan as it is to be run; None if there is none that fits.
    """
    fitting = []
    for entry in (plans or {}).get(type(scheduler).__name__, ()):
        saved = SavedPlan(**entry)
        cost = MorsePlan.from_string(saved.plan).cost(speed_ratio)
        if lsd / 2 <= saved.lsd <= lsd and is_affordable(cost, lsd):
            further = "" if "fitted_steps" in saved.scheduler else "D" * int(lsd - cost + 1e-9)
            fitting.append(replace(saved, plan=saved.plan + further))
    return max(fitting, key=lambda saved: saved.lsd, default=None)


def chooses_timesteps(arguments: Mapping[str, object]) -> bool:
    """Tell whether a pipeline's call chooses or cuts its timesteps itself."""
    return any(arguments.get(name) is not None for name in CHOOSE_TIMESTEPS)


@contextmanager
def scheduler_options(pipe: DiffusionPipeline, options: Mapping[str, object]) -> Iterator[None]:
    """Give a pipeline's scheduler other options for a while.

    Raises:
        ValueError: If the scheduler has no such option.
    """
    if not options:
        yield
        return
    before = pipe.scheduler
    unknown = sorted(set(options) - set(before.config))
    if unknown:
        raise ValueError(
            f"scheduler options {unknown} are not {type(before).__name__}'s; it has "
            f"{sorted(name for name in before.config if name[0] != '_')}."
        )
    pipe.scheduler = type(before).from_config(before.config, **options)
    try:
        yield
    finally:
        pipe.scheduler = before
