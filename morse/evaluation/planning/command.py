"""`morse plan`: search plans for a pipeline, and save them with its Dot or as schedulers."""

from collections.abc import Callable
from functools import cache
from itertools import accumulate, product
from typing import TYPE_CHECKING

import torch

from morse.denoisers import find_denoiser
from morse.evaluation.bench.loading import load_pipelines
from morse.evaluation.bench.methods import REFERENCE_SOLVER
from morse.evaluation.bench.runs import reference_images, sample_images
from morse.evaluation.bench.solvers import SPACING
from morse.evaluation.conditions import Conditions, encode_once, make_conditions
from morse.evaluation.environment import autocast
from morse.evaluation.metrics import psnr
from morse.evaluation.planning.beside import (
    bare_from,
    is_bare,
    next_budget,
    too_dear,
    without_dot,
)
from morse.evaluation.planning.best_fit import (
    Trajectories,
    candidate_of,
    fit_best,
    follow,
    given_candidates,
)
from morse.evaluation.planning.config import PlanConfig
from morse.evaluation.planning.memory import remembering
from morse.evaluation.planning.mixture import check_mixture, fit_mixture
from morse.evaluation.planning.results import (
    check_output,
    describe,
    earlier_searches,
    save_scheduler,
    write_found,
)
from morse.evaluation.planning.search import Candidate, Evaluate, Found, Space, search_plan
from morse.plan import MorsePlan
from morse.plan_choice import require_networks
from morse.rates import own_parameters
from morse.saved_plans import (
    SavedPlan,
    is_affordable,
    is_saved_for,
    read_grid_options,
    read_solver_options,
)
from morse.steps import shorten_plan

if TYPE_CHECKING:
    from morse.pipeline import MorsePipeline

__all__ = ["PlanConfig", "run_plan"]


def run_plan(config: PlanConfig) -> None:
    """Search, and write what was found and tried.

    Raises:
        FileExistsError: If `output_dir` holds a Dot with plans that the search would not go on
            from, or searches for another pipeline.
    """
    check_output(config)
    pipes = _load(config)
    with autocast(pipes[REFERENCE_SOLVER].device, config.mixed_precision):
        _search(config, pipes)


def _search(config: PlanConfig, pipes: "dict[str, MorsePipeline]") -> None:
    main = pipes[REFERENCE_SOLVER]
    conditions = make_conditions(
        main, config.prompts, config.class_names, config.prompt_embeds, config.guidance_scale
    )
    conditions = encode_once(pipes.values(), conditions)
    speed_ratio = _choose_speed_ratio(config, main, conditions)
    fits = config.fit_rounds + config.refine_rounds > 0 and "leapfrog" in config.solver
    judge_seeds, fit_seeds, mixture_seeds = _split_seeds(config)
    # An overflow shows after few steps, before the many of the reference.
    reference_images(sample_images(main, 2, judge_seeds[:1], 1, conditions=conditions))
    if mixture_seeds:
        # All pipelines have this Dot.
        main.dot.set_mixture(fit_mixture(main, mixture_seeds, config.batch_size, conditions))
    _check_start_plans(config, main, speed_ratio)
    judged_on = follow(main, judge_seeds, config.batch_size, conditions)
    fitted_on = follow(main, fit_seeds, config.batch_size, conditions) if fits else None
    saved_plans = None if main.dot is None else main.dot.config.plans
    plans = {name: list(saved) for name, saved in (saved_plans or {}).items()}
    report, curves = earlier_searches(config), {}
    for solver, lsd in product(config.solver, config.lsd):
        pipe = pipes[solver]
        name = type(pipe.scheduler).__name__
        known = [entry for entry in plans.get(name, ()) if is_saved_for(entry, pipe.scheduler)]
        stop = next_budget(lsd, known, config.lsd)
        # A faster Dot still runs those, ahead of what is found here, and the bare solver from where
        # it was better than they are.
        dear = too_dear(known, lsd, speed_ratio)
        replaced = [entry for entry in known if entry["lsd"] == lsd and entry not in dear]
        if not dear:
            replaced += [each for each in known if is_bare(each) and lsd < each["lsd"] < stop]
        evaluate = make_judge(config, pipe, judged_on)
        with remembering(find_denoiser(pipe)):
            starts = [candidate_of(entry) for entry in replaced if entry["lsd"] == lsd]
            starts += given_candidates(config.start_plans, config.grids(solver), known)
            space = _space(config, pipe, solver, lsd, speed_ratio)
            found = search_plan(evaluate, space, starts, config.max_rounds)
            if fits and solver == "leapfrog":
                found = fit_best(config, found, evaluate, pipe, fitted_on, curves, known)
            spend = make_spend(pipe, speed_ratio)
            judged = pipe.dot is not None and not dear
            bare = bare_from(found, evaluate, lsd, stop, spend) if judged else None
        best, *beside = _to_save(config, pipe, lsd, found, bare, speed_ratio)
        kept = [entry for entry in plans.get(name, ()) if entry not in replaced]
        kept += [each.to_config() for each in (best, *beside)]
        plans[name] = sorted(kept, key=lambda entry: entry["lsd"])
        report = [each for each in report if (each["solver"], each["lsd"]) != (solver, lsd)]
        report.append(describe(solver, best, beside, found))
        print(
            f"{solver} {lsd} LSD: {best.plan} ({best.grid}) {best.psnr:.2f} dB "
            f"(uniform {found.uniform.plan}: {best.uniform_psnr:.2f} dB)"
            + (f"; from {bare[0]} LSD on the bare solver is better" if bare else ""),
            flush=True,
        )
        save_scheduler(config.output_dir / f"{solver}-{lsd}", pipe.scheduler, found)
        write_found(config, main, plans, report, speed_ratio)


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


def _load(config: PlanConfig) -> "dict[str, MorsePipeline]":
    """Load a pipeline for each solver and the reference, all with one Dash and one Dot."""
    solvers = tuple(dict.fromkeys((*config.solver, REFERENCE_SOLVER)))
    pipes = load_pipelines(
        config.pipeline,
        config.dot,
        solvers,
        config.device,
        needs_dot=False,
        dtype=getattr(torch, config.dtype),
        merge_lora=config.merge_lora,
    )
    main = pipes[REFERENCE_SOLVER]
    if main.dot is None and set(config.solver) != {"leapfrog"}:
        raise ValueError(
            f"pipeline {config.pipeline!r} has no Dot, so that there is nothing to search but "
            f"leapfrog's steps; solver is {config.solver}, but must be 'leapfrog' alone, or give a "
            "Dot with --dot"
        )
    if config.mixture_images:
        check_mixture(main, config.mixture_images)
    return pipes


def _check_start_plans(config: PlanConfig, main: "MorsePipeline", speed_ratio: float) -> None:
    """Refuse plans that could not be tried, before hours of sampling."""
    for letters in config.start_plans:
        plan = MorsePlan.from_string(letters)
        require_networks(plan, main.dot)
        if not any(is_affordable(plan.cost(speed_ratio), lsd) for lsd in config.lsd):
            raise ValueError(
                f"start_plans has {letters!r}, which costs {plan.cost(speed_ratio):.2f} LSD at N = "
                f"{speed_ratio:g}, more than each budget in lsd {config.lsd}; shorten it, or add "
                "a budget"
            )


def _choose_speed_ratio(config: PlanConfig, main: "MorsePipeline", conditions: Conditions) -> float:
    """Return N: as set, as Dot's config has it, or measured; 1 without a Dot."""
    if main.dot is None:
        return 1.0
    own, given = main.dot.config.speed_ratio, config.speed_ratio
    if own and given and own < given:
        print(
            f"Dot's own N, {own:g}, stays in its config; `lsd=` passes over plans for {given:g} "
            "that cost more than their budget by it"
        )
    if chosen := given or main.speed_ratio:
        return chosen
    few = conditions.arguments(range(min(config.batch_size, config.num_images)))
    return main.measure_speed_ratio(**few).speed_ratio


def _split_seeds(config: PlanConfig) -> list[range]:
    """Give the seeds to judge plans on, to fit steps to, and to fit a mixture to."""
    sizes = (config.num_images, config.num_fit_images, config.mixture_images)
    ends = [config.seed + end for end in accumulate(sizes)]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


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
