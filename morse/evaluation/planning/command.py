"""`morse plan`: search plans for a pipeline, and save them with its Dot or as schedulers."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from itertools import accumulate, product
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from morse.denoisers import find_denoiser
from morse.evaluation.bench.loading import load_pipelines
from morse.evaluation.bench.methods import REFERENCE_SOLVER, REFERENCE_STEPS
from morse.evaluation.bench.runs import reference_images, sample_images
from morse.evaluation.bench.solvers import SPACING
from morse.evaluation.conditions import Conditions, encode_once, make_conditions
from morse.evaluation.environment import autocast, command_line, environment
from morse.evaluation.metrics import psnr
from morse.evaluation.planning.best_fit import Trajectories, candidate_of, fit_best, follow
from morse.evaluation.planning.config import PlanConfig
from morse.evaluation.planning.memory import remembering
from morse.evaluation.planning.mixture import check_mixture, fit_mixture
from morse.evaluation.planning.search import Candidate, Evaluate, Found, Space, search_plan
from morse.files import write_json
from morse.plan import MorsePlan
from morse.rates import own_parameters
from morse.saved_plans import SavedPlan, is_saved_for, read_solver_options, with_options
from morse.settings import as_json
from morse.steps import shorten_plan

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from morse.pipeline import MorsePipeline

__all__ = ["PlanConfig", "run_plan"]


def run_plan(config: PlanConfig) -> None:
    """Search, and write what was found and tried.

    Raises:
        FileExistsError: If `output_dir` holds a Dot with plans that the search would not go on
            from.
    """
    _check_output(config)
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
    judged_on = follow(main, judge_seeds, config.batch_size, conditions)
    fitted_on = follow(main, fit_seeds, config.batch_size, conditions) if fits else None
    saved_plans = None if main.dot is None else main.dot.config.plans
    plans = {name: list(saved) for name, saved in (saved_plans or {}).items()}
    report, curves = _earlier_searches(config), {}
    for solver, lsd in product(config.solver, config.lsd):
        pipe = pipes[solver]
        name = type(pipe.scheduler).__name__
        known = [entry for entry in plans.get(name, ()) if is_saved_for(entry, pipe.scheduler)]
        same = [entry for entry in known if entry["lsd"] == lsd]
        evaluate = make_judge(config, pipe, judged_on)
        with remembering(find_denoiser(pipe)):
            space = Space(
                lsd=lsd,
                speed_ratio=speed_ratio,
                grids=config.grids(solver),
                ratios=config.ratios,
                with_dot=pipe.dot is not None,
                with_mixture=pipe.dot is not None and pipe.dot.mixture is not None,
                shorten=make_shorten(pipe),
            )
            starts = [candidate_of(entry) for entry in same]
            found = search_plan(evaluate, space, starts, config.max_rounds)
            if fits and solver == "leapfrog":
                found = fit_best(config, found, evaluate, pipe, fitted_on, curves, known)
        saved = SavedPlan(
            lsd=lsd,
            plan=found.best.plan,
            scheduler={**_spacing(pipe), **dict(found.best.options)},
            speed_ratio=speed_ratio,
            psnr=round(found.psnr, 3),
            uniform_psnr=round(found.uniform_psnr, 3),
            num_images=config.num_images,
            solver_options=read_solver_options(pipe.scheduler),
        )
        kept = [entry for entry in plans.get(name, ()) if entry not in same]
        plans[name] = sorted([*kept, saved.to_config()], key=lambda entry: entry["lsd"])
        report.append(_report(solver, saved, found))
        print(
            f"{solver} {lsd} LSD: {saved.plan} ({saved.grid}) {saved.psnr:.2f} dB "
            f"(uniform {found.uniform.plan}: {saved.uniform_psnr:.2f} dB)",
            flush=True,
        )
        _save_scheduler(config.output_dir / f"{solver}-{lsd}", pipe.scheduler, found)
        _write(config, main, plans, report, speed_ratio)


def _check_output(config: PlanConfig) -> None:
    """Refuse to overwrite the Dot and plans of an earlier search that this one would not keep."""
    folder = config.output_dir
    goes_on = config.dot is not None and Path(config.dot).resolve() == folder.resolve()
    if (folder / "config.json").exists() and not goes_on:
        raise FileExistsError(
            f"output_dir is {folder}, which holds a Dot with its plans; go on from them with "
            f"--dot {folder}, or name another folder"
        )


def _earlier_searches(config: PlanConfig) -> list[dict[str, object]]:
    """Read what earlier searches into this folder told of solvers and budgets not searched now."""
    file = config.output_dir / "plan_search.json"
    earlier = json.loads(file.read_text())["searches"] if file.exists() else []
    again = set(product(config.solver, config.lsd))
    return [each for each in earlier if (each["solver"], each["lsd"]) not in again]


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


def _choose_speed_ratio(config: PlanConfig, main: "MorsePipeline", conditions: Conditions) -> float:
    """Return N: as set, as Dot's config has it, or measured; 1 without a Dot."""
    if main.dot is None:
        return 1.0
    if chosen := config.speed_ratio or main.speed_ratio:
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


def _spacing(pipe: "MorsePipeline") -> dict[str, object]:
    """Give the option by which a user's scheduler lays the grid that a plan was judged on."""
    taken = own_parameters(pipe.scheduler)
    return {name: pipe.scheduler.config[name] for name in SPACING if name in taken}


def _report(solver: str, saved: SavedPlan, found: Found) -> dict[str, object]:
    def judged(values: dict[Candidate, float]) -> list[dict[str, object]]:
        best_first = sorted(values, key=values.__getitem__, reverse=True)
        return [
            {"plan": each.plan, "scheduler": dict(each.options), "psnr": round(values[each], 3)}
            for each in best_first
        ]

    return {
        "solver": solver,
        **saved.to_config(),
        "uniform": {"plan": found.uniform.plan, "scheduler": dict(found.uniform.options)},
        "tried": judged(found.tried),
        "fits": judged(found.fitted),
    }


def _save_scheduler(folder: Path, scheduler: "SchedulerMixin", found: Found) -> None:
    """Save the best steps of Dash alone that were fitted, or what the fit began with.

    They need no Morse but its scheduler. One that an earlier run has left is removed where no steps
    of Dash alone were fitted.
    """
    all_dash = [each for each in found.fitted if set(each.plan) == {"D"}]
    if all_dash:
        options = dict(max(all_dash, key=found.fitted.__getitem__).options)
        with_options(scheduler, options).save_pretrained(folder)
    elif folder.is_dir():
        shutil.rmtree(folder)


def _write(
    config: PlanConfig,
    main: "MorsePipeline",
    plans: dict[str, list[dict[str, object]]],
    report: list[dict[str, object]],
    speed_ratio: float,
) -> None:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    if main.dot is not None:
        # With its N, or a call with `lsd=` would first measure another, and might pass plans over.
        known = main.dot.config.speed_ratio or speed_ratio
        main.dot.register_to_config(plans=plans, speed_ratio=known)
        main.dot.save_pretrained(config.output_dir)
    facts = {
        "command": command_line(),
        "environment": environment(main.device, config.mixed_precision),
        "speed_ratio": speed_ratio,
        "reference": f"{REFERENCE_SOLVER}, {REFERENCE_STEPS} steps",
        "settings": as_json(config),
        "searches": report,
    }
    write_json(config.output_dir / "plan_search.json", facts)
