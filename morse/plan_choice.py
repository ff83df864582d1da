"""How a call's budget, counts or plan become the evaluations that it makes."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch

from morse.dot import MorseDot
from morse.plan import MIXTURE_START, MorsePlan, check_budget
from morse.rates import adds_noise, always_adds_noise, find_family
from morse.sampling import Dot
from morse.saved_plans import SavedPlan, chooses_timesteps, find_saved_plan, scheduler_options
from morse.steps import count_evaluations, find_exact_steps, fixes_timesteps, shorten_plan

DEFAULT_PLAN_RATIO = 2.0
# LSD up to which a run begins with three and with two estimates of a mixture, which gains less the
# finer the grid is, and in the end loses (eval/results/NOTES.md).
BEGUN_WITH_THREE, BEGUN_WITH_TWO = 10, 14


def require_networks(plan: MorsePlan, dot: Dot | None) -> None:
    """Refuse a plan whose evaluations `dot` can't make.

    Raises:
        ValueError: If there is no Dot for Dot's, or no mixture for the Gaussian ones.
    """
    if plan.num_dot and dot is None:
        raise ValueError("the plan has Dot evaluations but the pipeline has no dot.")
    if plan.num_gaussian and getattr(dot, "mixture", None) is None:
        raise ValueError(
            f"plan {str(plan)!r} begins with a Gaussian mixture, but the pipeline has no dot "
            "that holds one; leave the g's out, or fit one: morse plan --mixture_images 1024."
        )


class PlanChoice:
    """The part of `morse.calls.MorseCalls` that plans; it runs nothing but to measure N.

    Attributes:
        dot: The Dot in use.
        speed_ratio: N, with which plans for `lsd=` are made. It starts as what Dot's config says,
            so that the same call gives the same image on every machine; None until first needed
            where the config says nothing. Set it, or measure it with `measure_speed_ratio`.
    """

    dot: Dot | None = None
    speed_ratio: float | None = None

    def plan_for(self, lsd: float, **kwargs: object) -> SavedPlan:
        """Tell how a call with this budget is spent: which plan, on which grid.

        That is the plan that was saved with Dot for this scheduler (`morse plan`;
        `morse.saved_plans.find_saved_plan` says which), if there is one, else a uniform one. Up to
        14 LSD the latter begins with Dot's Gaussian mixture, if it has one.

        Args:
            lsd: The budget.
            kwargs: The call's other arguments: some choose the timesteps, which no saved plan fits.

        Raises:
            ValueError: Where that call does: for a `num_inference_steps`, say, that makes another
                number of evaluations.
        """
        wanted = self._choose(kwargs, lsd)
        with scheduler_options(self, wanted.scheduler):
            plan, _ = self._fit_plan(wanted.plan, kwargs, True, lsd)
        return replace(wanted, plan=str(plan))

    def _plan_by_dot(self, lsd: float, arguments: dict[str, object]) -> SavedPlan | None:
        """Find the plan that was searched for this budget, or begin one; for whole runs alone."""
        check_budget(lsd)
        given = self._with_defaults({"num_inference_steps": None, **arguments})
        if not isinstance(self.dot, MorseDot) or chooses_timesteps(given):
            return None
        is_noisy = adds_noise(self.scheduler, given.get("eta"))
        if is_noisy and not adds_noise(self.scheduler):
            return None  # plans are searched without `eta`
        plans, speed_ratio = self.dot.config.plans, self._known_speed_ratio(arguments)
        if saved := find_saved_plan(plans, self.scheduler, lsd, speed_ratio):
            return saved
        known = find_family(self.scheduler) is not None and not is_noisy
        if self.dot.mixture is None or lsd > BEGUN_WITH_TWO or not known:
            return None
        start = MIXTURE_START if lsd <= BEGUN_WITH_THREE else MIXTURE_START[:2]
        uniform = MorsePlan.from_budget(lsd, speed_ratio, self.plan_ratio(lsd))
        return SavedPlan(lsd, f"{start}{uniform}")

    def _choose(
        self,
        arguments: dict[str, object],
        lsd: float | None,
        num_dash: int | None = None,
        num_dot: int | None = None,
        plan: MorsePlan | str | Sequence[bool] | None = None,
    ) -> SavedPlan:
        """Plan as asked, whether or not the scheduler can make so many evaluations."""
        is_uniform = isinstance(plan, str) and plan == "uniform"
        counts = num_dash is not None or num_dot is not None
        if is_uniform and lsd is None:
            raise ValueError('plan="uniform" spends a budget: give lsd= too.')
        if (lsd is not None) + counts + (plan is not None and not is_uniform) > 1:
            raise ValueError(
                "give only one of lsd, plan, and num_dash_steps with num_dot_steps; got "
                f"lsd={lsd}, plan={plan}, num_dash_steps={num_dash}, num_dot_steps={num_dot}."
            )
        if lsd is not None:
            if not is_uniform and (saved := self._plan_by_dot(lsd, arguments)):
                return saved
            if self.dot is None:
                warnings.warn("lsd was given but the pipeline has no dot: all Dash.", stacklevel=3)
            ratio = self.plan_ratio(lsd, eta := self._with_defaults(arguments).get("eta"))
            if ratio == 1 and isinstance(self.dot, MorseDot) and adds_noise(self.scheduler, eta):
                name = type(self.scheduler).__name__
                warnings.warn(
                    f"{name} adds noise at each step, where Dot has gained nothing so far: lsd= is "
                    "spent on Dash alone. Give another scheduler, or plan=.",
                    stacklevel=3,
                )
            chosen = MorsePlan.from_budget(lsd, self._known_speed_ratio(arguments), ratio)
        elif counts:
            steps, known = arguments.get("num_inference_steps"), self._with_defaults(arguments)
            if steps is None and fixes_timesteps(self.scheduler, known):
                steps = 1  # not read: their number counts
            if steps is not None:
                steps = count_evaluations(self, known, steps)
            chosen = MorsePlan.from_counts(num_dash, num_dot, steps)
        else:
            chosen = MorsePlan.parse(plan)
        return SavedPlan(lsd or 0, str(chosen))

    def _fit_plan(
        self,
        letters: str,
        arguments: dict[str, object],
        shorten: bool,
        lsd: float | None = None,
    ) -> tuple[MorsePlan, int]:
        """Find the `num_inference_steps` that makes the plan's evaluations; shorten it if allowed.

        What shortening saves of a budget `lsd` goes to Dash.

        Raises:
            ValueError: If there is none.
        """
        plan = MorsePlan.from_string(letters)
        require_networks(plan, self.dot)
        known, steps = self._with_defaults(arguments), arguments.get("num_inference_steps")
        if steps is not None:
            count = count_evaluations(self, known, steps)
            if count != len(plan):
                raise ValueError(
                    f"num_inference_steps={steps} makes {count} evaluations but the plan has "
                    f"{len(plan)} evaluations; leave num_inference_steps out."
                )
            return plan, steps
        if not shorten:
            return plan, find_exact_steps(self, known, len(plan))
        budget = None if lsd is None else (lsd, self._known_speed_ratio(arguments))
        return shorten_plan(self, known, plan, budget)

    def plan_ratio(self, lsd: float, eta: float | None = None) -> float:
        """Return how many evaluations per LSD a uniform plan for a budget aims at; 1 is all Dash.

        Dot's config tells (`MorseDot`). With a scheduler that adds noise it is its "stochastic", or
        1, as a weight-shared Dot is trained on deterministic runs and gains nothing there, unless
        the scheduler's class always adds noise and has a ratio of its own.

        Args:
            lsd: The budget.
            eta: The call's, which makes DDIM add noise.
        """
        if not isinstance(self.dot, MorseDot):
            return DEFAULT_PLAN_RATIO
        ratios = self.dot.config.plan_ratio or {}
        if is_noisy := adds_noise(self.scheduler, eta):
            ratio = ratios.get("stochastic", 1.0)
        else:
            ratio = ratios.get("default", DEFAULT_PLAN_RATIO)
        # A class's own ratio is not for noise that its settings or `eta` add.
        if not is_noisy or always_adds_noise(self.scheduler):
            ratio = ratios.get(type(self.scheduler).__name__, ratio)
        if not isinstance(ratio, Sequence):
            return ratio
        return next((value for least, value in reversed(ratio) if least <= lsd), ratio[0][1])

    def _known_speed_ratio(self, arguments: dict[str, object]) -> float:
        if self.dot is None:
            return 1.0
        if self.speed_ratio is None:
            given = self._with_defaults(arguments)
            asked = [given.get(name) for name in ("prompt", "prompt_embeds")]
            if "prompt" in given and all(value is None for value in asked):
                raise ValueError(
                    "N, how much faster Dot is, is not known and needs a prompt to be measured: "
                    "call measure_speed_ratio(prompt) first, or set speed_ratio."
                )
            # The caller asked for no such run: it must not move random numbers or call anybody, and
            # needs other timesteps than the caller may have chosen.
            left_out = {"generator", "timesteps", "sigmas", "denoising_start", "denoising_end"}
            own = {
                name: value
                for name, value in arguments.items()
                if name not in left_out and "callback" not in name
            }
            device = self._execution_device
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self.measure_speed_ratio(**own)
        return self.speed_ratio
