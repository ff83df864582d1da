"""`morse plan`: search plans for a Dot and save them with it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from morse.evaluation.bench.loading import load_pipelines
from morse.evaluation.bench.methods import REFERENCE_SOLVER, REFERENCE_STEPS
from morse.evaluation.bench.runs import sample_images
from morse.evaluation.bench.solvers import check_solvers
from morse.evaluation.conditions import Conditions, make_conditions
from morse.evaluation.environment import command_line, environment
from morse.evaluation.metrics import psnr
from morse.evaluation.planning.search import (
    UNIFORM_RATIOS,
    Candidate,
    Evaluate,
    Found,
    search_plan,
)
from morse.saved_plans import SavedPlan
from morse.training.checkpoint import write_json

if TYPE_CHECKING:
    from morse.pipeline import MorsePipeline


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Search which evaluations Dot makes, by solver and budget, and save the plans with Dot."""

    pipeline: str = field(
        default="fashion-mnist",
        metadata={"help": "the pipeline", "alias": "pretrained_model_name_or_path"},
    )
    dot: str | None = field(default=None, metadata={"help": "a Dot's folder; the pipeline's own"})
    output_dir: Path = field(
        metadata={"help": "where the Dot is saved with its plans, with plan_search.json beside it"}
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
    prompts: tuple[str, ...] = field(default=(), metadata={"help": "for a text pipeline"})
    class_names: tuple[str, ...] = field(default=(), metadata={"help": "for labels, or as prompts"})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "the pipeline's own default if left out"}
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto takes a GPU"})

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_solvers(self.solver)
        for name in ("num_images", "num_quick_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be 1 or more")
        if self.num_quick_images > self.num_images:
            raise ValueError(
                f"num_quick_images is {self.num_quick_images}, but must be at most "
                f"num_images = {self.num_images}"
            )
        for name in ("lsd", "ratios"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but each must be 1 or more")

    def grids(self, solver: str) -> list[tuple[tuple[str, object], ...]]:
        """List the scheduler options to choose from."""
        if solver != "leapfrog":
            return [()]
        return [(("timestep_power", power),) for power in self.timestep_power]


def run_plan(config: PlanConfig) -> None:
    """Search, and write the Dot with its plans and what was tried."""
    solvers = tuple(dict.fromkeys((*config.solver, REFERENCE_SOLVER)))
    pipes = load_pipelines(config.pipeline, config.dot, solvers, config.device)
    main = pipes[REFERENCE_SOLVER]
    conditions = make_conditions(
        main, config.prompts, config.class_names, guidance_scale=config.guidance_scale
    )
    seeds = range(config.seed, config.seed + config.num_images)
    reference = sample_images(
        main, REFERENCE_STEPS, seeds, config.batch_size, conditions=conditions
    ).images
    few = conditions.arguments(range(min(config.batch_size, config.num_images)))
    speed_ratio = config.speed_ratio or main.speed_ratio
    speed_ratio = speed_ratio or main.measure_speed_ratio(**few).speed_ratio
    plans = {name: list(saved) for name, saved in (main.dot.config.plans or {}).items()}
    report = []
    for solver, lsd in product(config.solver, config.lsd):
        pipe = pipes[solver]
        evaluate = make_judge(config, pipe, reference, seeds, conditions)
        found = search_plan(
            evaluate,
            lsd,
            speed_ratio,
            config.grids(solver),
            config.max_rounds,
            ratios=config.ratios,
        )
        saved = _saved(found, lsd, speed_ratio, config.num_images)
        name = type(pipe.scheduler).__name__
        kept = [entry for entry in plans.get(name, ()) if entry["lsd"] != lsd]
        plans[name] = sorted([*kept, saved.to_config()], key=lambda entry: entry["lsd"])
        report.append(_report(solver, saved, found))
        print(
            f"{solver} {lsd} LSD: {saved.plan} {dict(saved.scheduler)} {saved.psnr:.2f} dB "
            f"(uniform {found.uniform.plan}: {saved.uniform_psnr:.2f} dB)",
            flush=True,
        )
        _write(config, pipes, plans, report, speed_ratio)


def make_judge(
    config: PlanConfig,
    pipe: "MorsePipeline",
    reference: Tensor,
    seeds: range,
    conditions: Conditions,
) -> Evaluate:
    """Give a function that samples with a candidate and compares with `reference`."""

    def evaluate(candidate: Candidate, quick: bool) -> float:
        chosen = seeds[: config.num_quick_images] if quick else seeds
        plan = SavedPlan(0, candidate.plan, dict(candidate.options))
        samples = sample_images(pipe, plan, chosen, config.batch_size, conditions=conditions)
        return float(psnr(samples.images, reference[: len(chosen)]).mean())

    return evaluate


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
    tried: Callable[[Candidate], float] = found.tried.__getitem__
    return {
        "solver": solver,
        **saved.to_config(),
        "uniform": {"plan": found.uniform.plan, "scheduler": dict(found.uniform.options)},
        "tried": [
            {"plan": each.plan, "scheduler": dict(each.options), "psnr": round(tried(each), 3)}
            for each in sorted(found.tried, key=tried, reverse=True)
        ],
    }


def _write(
    config: PlanConfig,
    pipes: dict[str, "MorsePipeline"],
    plans: dict[str, list[dict[str, object]]],
    report: list[dict[str, object]],
    speed_ratio: float,
) -> None:
    main = pipes[REFERENCE_SOLVER]
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
