"""Fits the steps of the best plans that a search found, on trajectories of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from morse.evaluation.bench.methods import REFERENCE_STEPS
from morse.evaluation.bench.runs import reference_images, sample_images
from morse.evaluation.bench.solvers import SPACING
from morse.evaluation.conditions import Conditions
from morse.evaluation.planning.config import PlanConfig
from morse.evaluation.planning.fit import (
    Rows,
    curves_to_rows,
    fit_curves,
    power_curves,
    refine_rows,
)
from morse.evaluation.planning.search import Candidate, Evaluate, Found
from morse.leapfrog_moves import resample_steps
from morse.saved_plans import SavedPlan

if TYPE_CHECKING:
    from morse.pipeline import MorsePipeline


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


def follow(
    pipe: "MorsePipeline", seeds: range, batch_size: int, conditions: Conditions
) -> Trajectories:
    """Take noise to its end by the reference's solver, which `pipe` must have, and its steps."""
    reference = sample_images(pipe, REFERENCE_STEPS, seeds, batch_size, conditions=conditions)
    return Trajectories(seeds, reference_images(reference), conditions, batch_size)


def fit_best(
    config: PlanConfig,
    found: Found,
    evaluate: Evaluate,
    pipe: "MorsePipeline",
    fitted_on: Trajectories,
    curves: dict[str, np.ndarray],
    known: Sequence[Mapping[str, object]],
) -> Found:
    """Fit the steps of the best plan of each kind, with Dot or not, begun by a mixture or not.

    Those far behind the best of all are left out, but not plans from outside. They are fitted on
    images of their own, and judged on those that all candidates are.

    Args:
        config: How many rounds.
        found: What the search ended with.
        evaluate: Judges a candidate.
        pipe: With a leapfrog scheduler.
        fitted_on: What to fit to.
        curves: Latest fitted, by kind; they are a start for the next fit.
        known: Saved plans; the rows of those of the same kind are a start too.
    """
    num_train_timesteps = pipe.scheduler.config.num_train_timesteps
    for start in _worth_fitting(config, found.tried):
        plan, kind = start.plan, _kind(start.plan)

        def sample(rows: Rows, plan: str = plan) -> Tensor:
            return fitted_on.sample(pipe, SavedPlan(0, plan, {"fitted_steps": rows}))

        options = dict(start.options)
        power = options.get("timestep_power")
        powers = config.timestep_power if power is None else [power]
        starts = [power_curves(power) for power in powers]
        starts += [curves[kind]] if kind in curves else []
        curves[kind] = fit_curves(
            sample, plan, fitted_on.images, starts, config.fit_rounds, num_train_timesteps
        )
        rows = [curves_to_rows(curves[kind], plan, num_train_timesteps)]
        rows += known_rows([*known, {"plan": plan, "scheduler": options}], plan)
        refined = refine_rows(sample, fitted_on.images, rows, config.refine_rounds)
        fitted = candidate_of({"plan": plan, "scheduler": {"fitted_steps": refined}})
        if kind == "D":  # without Morse the better of both is saved
            found.fitted[start] = evaluate(start, False)
        found.fitted[fitted] = value = evaluate(fitted, False)
        if value > found.psnr:
            found = replace(found, best=fitted, psnr=value)
    return found


def _worth_fitting(config: PlanConfig, tried: Mapping[Candidate, float]) -> list[Candidate]:
    """List the best of each kind that is near the best of all, and of each plan from outside."""
    best_first = sorted(tried, key=tried.__getitem__, reverse=True)
    by_kind, by_plan = {}, {}
    for each in best_first:
        by_kind.setdefault(_kind(each.plan), each)
        by_plan.setdefault(each.plan, each)
    least = tried[best_first[0]] - config.fit_margin
    near = [each for each in by_kind.values() if tried[each] >= least]
    return list(
        dict.fromkeys([*near, *(by_plan[plan] for plan in config.start_plans if plan in by_plan)])
    )


def _kind(plan: str) -> str:
    """Give the letters that a plan is written with."""
    return "".join(sorted(set(plan)))


def candidate_of(entry: Mapping[str, object]) -> Candidate:
    """Give a saved plan as a candidate, rows as tuples; all have the same spacing."""
    options = {
        name: tuple(map(tuple, value)) if name == "fitted_steps" else value
        for name, value in entry["scheduler"].items()
        if name not in SPACING
    }
    return Candidate(entry["plan"], tuple(sorted(options.items())))


def given_candidates(
    plans: Sequence[str],
    grids: Sequence[tuple[tuple[str, object], ...]],
    known: Sequence[Mapping[str, object]],
) -> list[Candidate]:
    """List candidates with plans from outside: on every grid, and with saved plans' fitted steps.

    Args:
        plans: Letters of each.
        grids: Scheduler options.
        known: Saved plans; the rows of those of the same kind are stretched to a plan's length.
    """
    found = []
    for plan in plans:
        options = [*map(dict, grids), *({"fitted_steps": rows} for rows in known_rows(known, plan))]
        found += [candidate_of({"plan": plan, "scheduler": each}) for each in options]
    return found


def known_rows(known: Sequence[Mapping[str, object]], plan: str) -> list[Rows]:
    """List the rows of saved plans of the same kind, as a start for the fit of `plan`."""
    found = []
    for entry in known:
        rows = entry["scheduler"].get("fitted_steps")
        if rows and _kind(entry["plan"]) == _kind(plan):
            found.append(resample_steps(rows, len(plan)).tolist())
    return found
