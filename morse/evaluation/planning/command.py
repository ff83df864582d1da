"""`morse plan`: search plans for a pipeline, and save them with its Dot or as schedulers."""

from itertools import accumulate, product
from typing import TYPE_CHECKING

import torch

from morse.evaluation.bench.loading import load_pipelines
from morse.evaluation.bench.methods import REFERENCE_SOLVER
from morse.evaluation.bench.runs import reference_images, sample_images
from morse.evaluation.conditions import Conditions, encode_once, make_conditions
from morse.evaluation.environment import autocast
from morse.evaluation.planning.best_fit import follow
from morse.evaluation.planning.budget import Searched, Shared, search_budget
from morse.evaluation.planning.config import PlanConfig
from morse.evaluation.planning.mixture import check_mixture, fit_mixture
from morse.evaluation.planning.results import (
    check_output,
    describe,
    earlier_searches,
    save_scheduler,
    write_found,
)
from morse.plan import MorsePlan
from morse.plan_choice import require_networks
from morse.saved_plans import is_affordable, is_saved_for

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
    shared = _prepare(config, pipes)
    saved = None if main.dot is None else main.dot.config.plans
    plans = {name: list(entries) for name, entries in (saved or {}).items()}
    report = earlier_searches(config)
    for solver, lsd in product(config.solver, config.lsd):
        pipe = pipes[solver]
        name = type(pipe.scheduler).__name__
        known = [entry for entry in plans.get(name, ()) if is_saved_for(entry, pipe.scheduler)]
        searched = search_budget(shared, pipe, solver, lsd, known)
        kept = [entry for entry in plans.get(name, ()) if entry not in searched.replaced]
        kept += [each.to_config() for each in (searched.best, *searched.beside)]
        plans[name] = sorted(kept, key=lambda entry: entry["lsd"])
        report = [each for each in report if (each["solver"], each["lsd"]) != (solver, lsd)]
        report.append(describe(solver, searched.best, searched.beside, searched.found))
        _tell(solver, lsd, searched)
        save_scheduler(config.output_dir / f"{solver}-{lsd}", pipe.scheduler, searched.found)
        write_found(config, main, plans, report, shared.speed_ratio)


def _tell(solver: str, lsd: int, searched: Searched) -> None:
    best, uniform = searched.best, searched.found.uniform
    bare = [each.lsd for each in searched.beside if each.lsd > lsd]
    print(
        f"{solver} {lsd} LSD: {best.plan} ({best.grid}) {best.psnr:.2f} dB "
        f"(uniform {uniform.plan}: {best.uniform_psnr:.2f} dB)"
        + (f"; from {bare[0]} LSD on the bare solver is better" if bare else ""),
        flush=True,
    )


def _prepare(config: PlanConfig, pipes: "dict[str, MorsePipeline]") -> Shared:
    """Do what comes before all searches: N, a mixture for the Dot of all, and the references."""
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
        main.dot.set_mixture(fit_mixture(main, mixture_seeds, config.batch_size, conditions))
    _check_start_plans(config, main, speed_ratio)
    judged_on = follow(main, judge_seeds, config.batch_size, conditions)
    fitted_on = follow(main, fit_seeds, config.batch_size, conditions) if fits else None
    return Shared(config, speed_ratio, judged_on, fitted_on, curves={})


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
