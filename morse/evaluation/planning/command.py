"""`morse plan`: search plans for a pipeline, and save them with its Dot or as schedulers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from morse.denoisers import find_denoiser
from morse.evaluation.bench.loading import load_pipelines
from morse.evaluation.bench.methods import REFERENCE_SOLVER, REFERENCE_STEPS
from morse.evaluation.bench.runs import sample_images
from morse.evaluation.bench.solvers import check_solvers
from morse.evaluation.conditions import Conditions, make_conditions
from morse.evaluation.environment import command_line, environment
from morse.evaluation.metrics import psnr
from morse.evaluation.planning.fit import (
    Rows,
    curves_to_rows,
    fit_curves,
    power_curves,
    refine_rows,
)
from morse.evaluation.planning.memory import remembering
from morse.evaluation.planning.search import (
    UNIFORM_RATIOS,
    Candidate,
    Evaluate,
    Found,
    search_plan,
)
from morse.leapfrog import resample_steps
from morse.saved_plans import SavedPlan
from morse.training.checkpoint import write_json

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from morse.pipeline import MorsePipeline


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Search which evaluations Dot makes, by solver and budget, and save the plans with Dot.

    Fitted steps of Dash alone are saved as schedulers, too. Without a Dot they are all there is.
    """

    pipeline: str = field(
        default="fashion-mnist",
        metadata={"help": "the pipeline", "alias": "pretrained_model_name_or_path"},
    )
    dot: str | None = field(
        default=None, metadata={"help": "a Dot's folder; the pipeline's own, if any"}
    )
    output_dir: Path = field(
        metadata={
            "help": "where the Dot is saved with its plans, with plan_search.json beside it and "
            "a scheduler in leapfrog-LSD for each budget's fitted steps of Dash alone"
        }
    )
    solver: tuple[str, ...] = field(
        default=("leapfrog",), metadata={"help": "names of solvers, as for `morse bench`"}
    )
    lsd: tuple[int, ...] = field(
        default=(5, 6, 8, 10, 12, 16, 20), metadata={"help": "budgets to search plans for"}
    )
    speed_ratio: float | None = field(
        default=None, metadata={"help": "N; that of Dot's config, or measured, if left out"}
    )
    timestep_power: tuple[float, ...] = field(
        default=(1.0, 1.25, 1.5), metadata={"help": "grids tried with the leapfrog solver"}
    )
    ratios: tuple[float, ...] = field(
        default=UNIFORM_RATIOS,
        metadata={"help": "evaluations per LSD of the uniform plans tried first; all Dash is too"},
    )
    num_images: int = field(default=128, metadata={"help": "trajectories to judge the best on"})
    num_quick_images: int = field(
        default=32, metadata={"help": "so many of them to judge each plan that is tried on"}
    )
    batch_size: int = field(default=64, metadata={"help": "images at a time"})
    seed: int = field(default=10**6, metadata={"help": "of the first image; keep evaluation's off"})
    max_rounds: int = field(default=6, metadata={"help": "steps to a better neighbour at most"})
    fit_rounds: int = field(
        default=3,
        metadata={
            "help": "rounds of fitting the leapfrog solver's steps as smooth curves; 0: none"
        },
    )
    refine_rounds: int = field(
        default=1, metadata={"help": "rounds of fitting each evaluation's then by itself; 0: none"}
    )
    num_fit_images: int = field(
        default=32, metadata={"help": "further trajectories, which the steps are fitted on"}
    )
    fit_margin: float = field(
        default=3.0,
        metadata={
            "help": "dB: the best plan with Dot and the best of all Dash are both fitted if the "
            "worse is no further behind"
        },
    )
    prompts: tuple[str, ...] = field(default=(), metadata={"help": "for a text pipeline"})
    class_names: tuple[str, ...] = field(default=(), metadata={"help": "for labels, or as prompts"})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "the pipeline's own default if left out"}
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto takes a GPU"})

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_solvers(self.solver)
        for name in ("num_images", "num_quick_images", "num_fit_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be 1 or more")
        if self.num_quick_images > self.num_images:
            raise ValueError(
                f"num_quick_images is {self.num_quick_images}, but must be at most "
                f"num_images = {self.num_images}"
            )
        for name in ("fit_rounds", "refine_rounds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be 0 or more")
        for name in ("lsd", "ratios"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but each must be 1 or more")

    def grids(self, solver: str) -> list[tuple[tuple[str, object], ...]]:
        """List the scheduler options to choose from."""
        if solver != "leapfrog":
            return [()]
        return [(("timestep_power", power),) for power in self.timestep_power]


class Trajectories(NamedTuple):
    """Noise and where many steps take it.

    Attributes:
        seeds: Of each image.
        images: (B, C, H, W) in [0, 1].
        conditions: What the images are of.
        batch_size: Images at a time.
    """

    seeds: range
    images: Tensor
    conditions: Conditions
    batch_size: int

    def sample(self, pipe: "MorsePipeline", plan: SavedPlan, count: int | None = None) -> Tensor:
        """Sample (the first of) the images with a plan."""
        seeds = self.seeds[:count]
        return sample_images(pipe, plan, seeds, self.batch_size, conditions=self.conditions).images


def run_plan(config: PlanConfig) -> None:
    """Search, and write what was found and tried."""
    solvers = tuple(dict.fromkeys((*config.solver, REFERENCE_SOLVER)))
    pipes = load_pipelines(config.pipeline, config.dot, solvers, config.device, needs_dot=False)
    main = pipes[REFERENCE_SOLVER]
    has_dot = main.dot is not None
    if not has_dot and set(config.solver) != {"leapfrog"}:
        raise ValueError(
            f"pipeline {config.pipeline!r} has no Dot, so that there is nothing to search but "
            f"leapfrog's steps; solver is {config.solver}, but must be 'leapfrog' alone, or give a "
            "Dot with --dot"
        )
    conditions = make_conditions(
        main, config.prompts, config.class_names, guidance_scale=config.guidance_scale
    )
    speed_ratio = (config.speed_ratio or main.speed_ratio) if has_dot else 1.0
    if speed_ratio is None:
        few = conditions.arguments(range(min(config.batch_size, config.num_images)))
        speed_ratio = main.measure_speed_ratio(**few).speed_ratio

    def follow(first: int, count: int) -> Trajectories:
        seeds, size = range(first, first + count), config.batch_size
        images = sample_images(main, REFERENCE_STEPS, seeds, size, conditions=conditions).images
        return Trajectories(seeds, images, conditions, size)

    judged_on = follow(config.seed, config.num_images)
    fits = config.fit_rounds + config.refine_rounds > 0 and "leapfrog" in config.solver
    fitted_on = follow(config.seed + config.num_images, config.num_fit_images) if fits else None
    saved_plans = main.dot.config.plans if has_dot else None
    plans = {name: list(saved) for name, saved in (saved_plans or {}).items()}
    report, curves = [], {}
    for solver, lsd in product(config.solver, config.lsd):
        pipe = pipes[solver]
        name = type(pipe.scheduler).__name__
        known = plans.get(name, [])
        evaluate = make_judge(config, pipe, judged_on)
        with remembering(find_denoiser(pipe)):
            found = search_plan(
                evaluate,
                lsd,
                speed_ratio,
                config.grids(solver),
                config.max_rounds,
                ratios=config.ratios,
                known=[_candidate(entry) for entry in known if entry["lsd"] == lsd],
                with_dot=has_dot,
            )
            if fits and solver == "leapfrog":
                found = fit_best(config, found, evaluate, pipe, fitted_on, curves, known)
        saved = _saved(found, lsd, speed_ratio, config.num_images)
        kept = [entry for entry in known if entry["lsd"] != lsd]
        plans[name] = sorted([*kept, saved.to_config()], key=lambda entry: entry["lsd"])
        report.append(_report(solver, saved, found))
        print(
            f"{solver} {lsd} LSD: {saved.plan} ({saved.grid}) {saved.psnr:.2f} dB "
            f"(uniform {found.uniform.plan}: {saved.uniform_psnr:.2f} dB)",
            flush=True,
        )
        _save_scheduler(config.output_dir / f"{solver}-{lsd}", pipe.scheduler, found)
        _write(config, main, plans, report, speed_ratio)


def make_judge(config: PlanConfig, pipe: "MorsePipeline", judged_on: Trajectories) -> Evaluate:
    """Give a function that samples with a candidate and compares with the reference."""

    def evaluate(candidate: Candidate, quick: bool) -> float:
        plan = SavedPlan(0, candidate.plan, dict(candidate.options))
        count = config.num_quick_images if quick else config.num_images
        images = judged_on.sample(pipe, plan, count)
        return float(psnr(images, judged_on.images[:count]).mean())

    return evaluate


def fit_best(
    config: PlanConfig,
    found: Found,
    evaluate: Evaluate,
    pipe: "MorsePipeline",
    fitted_on: Trajectories,
    curves: dict[bool, np.ndarray],
    known: Sequence[Mapping[str, object]],
) -> Found:
    """Fit the steps of the best plan with Dot and of all Dash, where they are near each other.

    They are fitted on images of their own, and judged on those that all candidates are.

    Args:
        config: How many rounds.
        found: What the search ended with.
        evaluate: Judges a candidate.
        pipe: With a `LeapfrogScheduler`.
        fitted_on: What to fit to.
        curves: Latest fitted, by whether the plan has Dot; they are a start for the next fit.
        known: Saved plans; the rows of the same plan are a start too, as are those of other numbers
            of Dash evaluations for a plan that is all Dash.
    """
    num_train_timesteps = pipe.scheduler.config.num_train_timesteps
    for has_dot in (True, False):
        of_kind = [each for each in found.tried if ("o" in each.plan) == has_dot]
        start = max(of_kind, key=found.tried.__getitem__, default=None)
        if start is None or found.tried[start] < max(found.tried.values()) - config.fit_margin:
            continue
        plan = start.plan

        def sample(rows: Rows, plan: str = plan) -> Tensor:
            return fitted_on.sample(pipe, SavedPlan(0, plan, {"fitted_steps": rows}))

        options = dict(start.options)
        powers = (
            [options["timestep_power"]] if "timestep_power" in options else config.timestep_power
        )
        starts = [power_curves(power) for power in powers]
        starts += [curves[has_dot]] if has_dot in curves else []
        curves[has_dot] = fit_curves(
            sample, plan, fitted_on.images, starts, config.fit_rounds, num_train_timesteps
        )
        rows = [curves_to_rows(curves[has_dot], plan, num_train_timesteps)]
        rows += _known_rows(known, plan)
        if "fitted_steps" in options:
            rows.append(resample_steps(options["fitted_steps"], len(plan)).tolist())
        refined = refine_rows(sample, fitted_on.images, rows, config.refine_rounds)
        fitted = _candidate({"plan": plan, "scheduler": {"fitted_steps": refined}})
        found.fitted[fitted] = value = evaluate(fitted, False)
        if value > found.psnr:
            found = replace(found, best=fitted, psnr=value)
    return found


def _candidate(entry: Mapping[str, object]) -> Candidate:
    """Give a saved plan as a candidate, rows as tuples."""
    options = {
        name: tuple(map(tuple, value)) if name == "fitted_steps" else value
        for name, value in entry["scheduler"].items()
    }
    return Candidate(entry["plan"], tuple(sorted(options.items())))


def _known_rows(known: Sequence[Mapping[str, object]], plan: str) -> list[Rows]:
    """List the rows of saved plans that may be a start for the fit of `plan`."""
    found = []
    for entry in known:
        rows = entry["scheduler"].get("fitted_steps")
        if rows and entry["plan"] == plan and len(rows) == len(plan):
            found.append(rows)
        elif rows and "o" not in entry["plan"] + plan:
            found.append(resample_steps(rows, len(plan)).tolist())
    return found


def _saved(found: Found, lsd: float, speed_ratio: float, num_images: int) -> SavedPlan:
    return SavedPlan(
        lsd=lsd,
        plan=found.best.plan,
        scheduler=dict(found.best.options),
        speed_ratio=speed_ratio,
        psnr=round(found.psnr, 3),
        uniform_psnr=round(found.uniform_psnr, 3),
        num_images=num_images,
    )


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
    """Save the best fitted steps of Dash alone, which need no Morse but its scheduler."""
    all_dash = [each for each in found.fitted if "o" not in each.plan]
    if all_dash:
        best = max(all_dash, key=found.fitted.__getitem__)
        options = dict(best.options)
        type(scheduler).from_config(scheduler.config, **options).save_pretrained(folder)


def _write(
    config: PlanConfig,
    main: "MorsePipeline",
    plans: dict[str, list[dict[str, object]]],
    report: list[dict[str, object]],
    speed_ratio: float,
) -> None:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    if main.dot is not None:
        main.dot.register_to_config(plans=plans)
        main.dot.save_pretrained(config.output_dir)
    facts = {
        "command": command_line(),
        "environment": environment(main.device),
        "speed_ratio": speed_ratio,
        "reference": f"{REFERENCE_SOLVER}, {REFERENCE_STEPS} steps",
        "settings": json.loads(json.dumps(vars(config), default=str)),
        "searches": report,
    }
    write_json(config.output_dir / "plan_search.json", facts)
