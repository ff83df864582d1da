"""One search of `morse plan`: a solver's best plan for a budget, and what is saved beside it."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from morse.denoisers import find_denoiser
from morse.evaluation.bench.solvers import SPACING
from morse.evaluation.metrics import psnr
from morse.evaluation.planning.beside import (
    bare_from,
    next_budget,
    replaced_entries,
    too_dear,
    without_dot,
)
from morse.evaluation.planning.best_fit import (
    Trajectories,
    candidate_of,
    fit_best,
    given_candidates,
)
from morse.evaluation.planning.config import PlanConfig
from morse.evaluation.planning.memory import remembering
from morse.evaluation.planning.search import Candidate, Evaluate, Found, Space, search_plan
from morse.plan import MorsePlan
from morse.rates import own_parameters
from morse.saved_plans import SavedPlan, read_grid_options, read_solver_options
from morse.steps import shorten_plan

if TYPE_CHECKING:
    from morse.pipeline import MorsePipeline


class Shared(NamedTuple):
    """What the searches of a run have in common.

    Attributes:
        config: The settings.
        speed_ratio: N.
        judged_on: What plans are judged on.
        fitted_on: What steps are fitted to; None where none are.
        curves: Latest fitted, by kind of plan; each search begins with them and leaves its own.
    """

    config: PlanConfig
    speed_ratio: float
    judged_on: Trajectories
    fitted_on: Trajectories | None
    curves: dict[str, np.ndarray]


class Searched(NamedTuple):
    """What one search gave.

    Attributes:
        found: What was tried.
        best: To be saved.
        beside: To be saved beside it.
        replaced: Saved plans in whose place these come.
    """

    found: Found
    best: SavedPlan
    beside: list[SavedPlan]
    replaced: list[Mapping[str, object]]


def search_budget(
    shared: Shared,
    pipe: "MorsePipeline",
    solver: str,
    lsd: int,
    known: Sequence[Mapping[str, object]],
) -> Searched:
    """Search a solver's plans for a budget, and fit steps to the best.

    Args:
        shared: What all searches have in common.
        pipe: With the solver's scheduler.
        solver: Its name.
        lsd: The budget.
        known: The solver's saved plans, of all budgets.
    """
    config, speed_ratio = shared.config, shared.speed_ratio
    stop, dear = next_budget(lsd, known, config.lsd), too_dear(known, lsd, speed_ratio)
    replaced = replaced_entries(known, lsd, stop, dear)
    evaluate = make_judge(config, pipe, shared.judged_on)
    with remembering(find_denoiser(pipe)):
        starts = [candidate_of(entry) for entry in replaced if entry["lsd"] == lsd]
        starts += given_candidates(config.start_plans, config.grids(solver), known)
        space = _space(config, pipe, solver, lsd, speed_ratio)
        found = search_plan(evaluate, space, starts, config.max_rounds)
        if shared.fitted_on is not None and solver == "leapfrog":
            on, curves = shared.fitted_on, shared.curves
            found = fit_best(config, found, evaluate, pipe, on, curves, known)
        spend = make_spend(pipe, speed_ratio)
        judged = pipe.dot is not None and not dear
        bare = bare_from(found, evaluate, lsd, stop, spend) if judged else None
    best, *beside = _to_save(config, pipe, lsd, found, bare, speed_ratio)
    return Searched(found, best, beside, replaced)


def _space(
    config: PlanConfig, pipe: "MorsePipeline", solver: str, lsd: int, speed_ratio: float
) -> Space:
    return Space(
        lsd=lsd,
        speed_ratio=speed_ratio,
        grids=config.grids(solver),
        ratios=config.ratios,
        with_dot=pipe.dot is not None,
        with_mixture=pipe.dot is not None and pipe.dot.mixture is not None,
        shorten=make_shorten(pipe),
    )


def _to_save(
    config: PlanConfig,
    pipe: "MorsePipeline",
    lsd: int,
    found: Found,
    bare: tuple[int, Candidate] | None,
    speed_ratio: float,
) -> list[SavedPlan]:
    """List the best plan, and what is saved beside it."""
    plans = [_saved(config, pipe, lsd, found.best, speed_ratio, found)]
    if second := without_dot(found):
        plans.append(_saved(config, pipe, lsd, second, speed_ratio))
    if bare is not None:
        plans.append(_saved(config, pipe, *bare, speed_ratio))
    return plans


def _saved(
    config: PlanConfig,
    pipe: "MorsePipeline",
    lsd: int,
    candidate: Candidate,
    speed_ratio: float,
    found: Found | None = None,
) -> SavedPlan:
    """Give a candidate as it is saved; with its PSNR if it is the best that was `found`."""
    judged = {}
    if found is not None:
        judged = {
            "psnr": round(found.psnr, 3),
            "uniform_psnr": round(found.uniform_psnr, 3),
            "num_images": config.num_images,
        }
    return SavedPlan(
        lsd=lsd,
        plan=candidate.plan,
        scheduler={**_spacing(pipe), **dict(candidate.options)},
        speed_ratio=speed_ratio,
        solver_options=read_solver_options(pipe.scheduler),
        **judged,
    )


def make_judge(config: PlanConfig, pipe: "MorsePipeline", judged_on: Trajectories) -> Evaluate:
    """Give a function that samples with a candidate and compares with the reference."""

    def evaluate(candidate: Candidate, quick: bool) -> float:
        plan = SavedPlan(0, candidate.plan, dict(candidate.options))
        count = config.num_quick_images if quick else config.num_images
        images = judged_on.sample(pipe, plan, count)
        return float(psnr(images, judged_on.images[:count]).mean())

    return evaluate


def make_shorten(pipe: "MorsePipeline") -> Callable[[str], str]:
    """Give a function that shortens a plan to a length that the pipeline's solver can make."""

    return cache(lambda plan: str(shorten_plan(pipe, {}, MorsePlan.from_string(plan))[0]))


def make_spend(pipe: "MorsePipeline", speed_ratio: float) -> Callable[[str, int], str]:
    """Give a function that spends what a plan leaves of a budget on Dash, as `lsd=` does."""

    def spend(plan: str, budget: int) -> str:
        whole = MorsePlan.from_string(plan).extended(budget, speed_ratio)
        return str(shorten_plan(pipe, {}, whole, (budget, speed_ratio))[0])

    return spend


def _spacing(pipe: "MorsePipeline") -> dict[str, object]:
    """Give the options by which a user's scheduler lays the grid that a plan was judged on."""
    taken = own_parameters(pipe.scheduler)
    spacing = {name: pipe.scheduler.config[name] for name in SPACING if name in taken}
    return spacing | read_grid_options(pipe.scheduler)
