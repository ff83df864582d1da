"""Fit where a leapfrog run evaluates and lands, and how it extrapolates, to a denoiser and a plan.

A few smooth curves over the run say most of it; every evaluation's own numbers the rest. Both are
found by least squares (Levenberg-Marquardt; an image's error counts relative to itself) on the
samples that the run ends in, since what a step costs shows only there. Curves that fit one run are
a start for another with more evaluations.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

Rows = list[list[float]]  # `LeapfrogScheduler`'s fitted_steps
Sample = Callable[[Rows], Tensor]  # rows -> images in [0, 1], (B, C, H, W)

# Knots of each curve, spread evenly over a run, and how far each is moved to see what it changes:
# timesteps are rounded, so that less would show little. The last three are added at Dot's
# evaluations, along the whole run.
_CURVES = {
    "power": (5, 0.06),
    "landing": (4, 0.08),
    "now": (4, 0.06),
    "ahead": (4, 0.06),
    "dot_landing": (1, 0.08),
    "dot_now": (1, 0.06),
    "dot_ahead": (1, 0.06),
}
_ROW_STEPS = (0.06, 0.08, 0.06, 0.06)  # log(timestep + 1), landing, now, ahead
_DAMPING = 1e-2  # of the first round, relative to the curvature
_LEAST_GAIN = 0.02  # dB of a round, else it is the last


def power_curves(power: float) -> np.ndarray:
    """Give the curves of the plain scheduler with this `timestep_power`."""
    start = {"power": power, "landing": 0.5}
    return np.concatenate(
        [np.full(size, start.get(name, 0.0)) for name, (size, _) in _CURVES.items()]
    )


def curves_to_rows(curves: np.ndarray, plan: str, num_train_timesteps: int = 1000) -> Rows:
    """Give the rows of a plan's evaluations; see `LeapfrogScheduler`'s fitted_steps."""
    sizes = [size for size, _ in _CURVES.values()]
    knots = dict(zip(_CURVES, np.split(curves, np.cumsum(sizes)[:-1]), strict=True))
    is_dot = np.array([letter == "o" for letter in plan])
    steps = 2 * len(plan) - 1
    shares = 2 * np.arange(len(plan)) / steps

    def along(name: str, share: np.ndarray) -> np.ndarray:
        return np.interp(share, np.linspace(0, 1, len(knots[name])), knots[name])

    def timestep(share: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # powers below zero give what no run can have
            return num_train_timesteps * (1 - share) ** along("power", share) - 1

    def by_model(name: str) -> np.ndarray:
        return along(name, shares) + is_dot * knots[f"dot_{name}"]

    # As in the scheduler: each point of a steep grid keeps a timestep of its own.
    lowest = np.arange(steps)[::-2]
    here = np.maximum(timestep(shares), lowest)
    landed = timestep(np.minimum(shares + 2 * by_model("landing") / steps, 1))
    landed = np.maximum(landed, lowest - 1)
    landing = np.ones(len(plan))  # the last one goes to the end
    with np.errstate(all="ignore"):
        landing[:-1] = (here - landed)[:-1] / -np.diff(here)
    columns = (here, landing, by_model("now"), by_model("ahead"))
    return np.stack(columns, axis=1).round(4).tolist()


def fit_curves(
    sample: Sample,
    plan: str,
    reference: Tensor,
    starts: Sequence[np.ndarray],
    rounds: int,
    num_train_timesteps: int = 1000,
) -> np.ndarray:
    """Fit the curves of a run to the reference's images.

    Args:
        sample: Samples the reference's images with given rows.
        plan: The run's plan.
        reference: (B, C, H, W) in [0, 1].
        starts: Curves; the best of them is where the fit begins.
        rounds: Each samples once for each of the curves' 20 knots and a few times more.
        num_train_timesteps: T.

    Returns:
        The curves with the least mean logarithm of squared error (the greatest mean PSNR).
    """
    steps = np.concatenate([np.full(size, step) for size, step in _CURVES.values()])
    free = [k for k in range(len(steps)) if k < len(steps) - 3 or "o" in plan]

    def to_rows(curves: np.ndarray) -> Rows:
        return curves_to_rows(curves, plan, num_train_timesteps)

    return _least_squares(sample, to_rows, reference, starts, steps, free, rounds)


def refine_rows(sample: Sample, reference: Tensor, starts: Sequence[Rows], rounds: int) -> Rows:
    """Fit every number of a run's rows by itself; `fit_curves` leads near enough for it.

    A round samples once for each of them, about four times as often as the run has evaluations.
    For the other arguments see `fit_curves`; `starts` has rows.
    """
    shape = np.shape(starts[0])

    def to_vector(rows: Rows) -> np.ndarray:
        columns = np.array(rows, dtype=np.float64)
        columns[:, 0] = np.log1p(columns[:, 0])  # what a timestep's error does goes with its size
        return columns.ravel()

    def to_rows(vector: np.ndarray) -> Rows:
        columns = vector.reshape(shape).copy()
        columns[:, 0] = np.expm1(columns[:, 0])
        return columns.round(4).tolist()

    # A run starts at its first timestep and ends at zero noise, and has no change to extrapolate
    # at first.
    fixed = np.zeros(shape, dtype=bool)
    fixed[0, [0, 2, 3]] = fixed[-1, [1, 3]] = True
    steps = np.broadcast_to(np.array(_ROW_STEPS), shape).ravel()
    free = np.flatnonzero(~fixed.ravel()).tolist()
    vectors = [to_vector(rows) for rows in starts]
    return to_rows(_least_squares(sample, to_rows, reference, vectors, steps, free, rounds))


def _least_squares(
    sample: Sample,
    to_rows: Callable[[np.ndarray], Rows],
    reference: Tensor,
    starts: Sequence[np.ndarray],
    steps: np.ndarray,
    free: list[int],
    rounds: int,
) -> np.ndarray:
    """Give the vector with the least mean logarithm of squared error.

    Args:
        sample: Rows -> images.
        to_rows: Vector -> rows.
        reference: What to come near to.
        starts: Vectors; the best is where it begins.
        steps: How far to move each number to see what it changes.
        free: Which numbers to fit.
        rounds: At most.
    """

    def run(vector: np.ndarray) -> Tensor | None:
        rows = to_rows(vector)
        return sample(rows) if _are_possible(rows) else None

    errors = partial(_errors, reference=reference)
    tried = [(vector, run(vector)) for vector in starts]
    best, images = min(tried, key=lambda each: float(errors(each[1]).log().mean()))
    damping = _DAMPING
    for _ in range(rounds):
        products = _linearize(run, best, images, reference, steps, free)
        curvature, slope = products[1:, 1:], products[1:, 0]
        if not curvature.any():  # of a plan such as "D", whose samples no number changes
            break
        # Numbers that change next to nothing must not run away: not each one's own curvature alone.
        diagonal = curvature.diagonal() + curvature.diagonal().mean()
        gain = 0.0
        while damping < 1e3 and gain <= 0:
            system = curvature + damping * torch.diag(diagonal)
            moved = best.copy()
            moved[free] -= torch.linalg.solve(system, slope).numpy()
            changed = run(moved)
            gain = float((errors(images).log10() - errors(changed).log10()).mean()) * 10
            damping = damping / 5 if gain > 0 else damping * 5
        if gain > 0:
            best, images = moved, changed
        if gain < _LEAST_GAIN:
            break
    return best


def _errors(images: Tensor | None, reference: Tensor) -> Tensor:
    """Give each image's mean squared error, (B,); infinite where a run cannot be."""
    if images is None:
        return torch.full((len(reference),), torch.inf)
    return (images - reference).square().flatten(1).mean(1).clamp(min=1e-10)


def _linearize(
    run: Callable[[np.ndarray], Tensor | None],
    vector: np.ndarray,
    images: Tensor,
    reference: Tensor,
    steps: np.ndarray,
    free: list[int],
) -> Tensor:
    """Give the inner products of the error and of what each free number changes, relative to it.

    Args:
        run: Vector -> images, or None where a run cannot be.
        vector: Where to linearize.
        images: What it gives.
        reference: As for `_least_squares`, like `steps` and `free`.

    Returns:
        (1 + F, 1 + F), the error's own first, float64.
    """
    scale = _errors(images, reference).rsqrt()[:, None, None, None]
    changes = {}
    for index in reversed(free):  # from the run's end, for what Dash's calls are remembered
        moved = vector.copy()
        moved[index] += steps[index]
        changed = run(moved)
        change = images * 0 if changed is None else (changed - images) / steps[index]
        changes[index] = change * scale
    parts = [(images - reference) * scale, *(changes[index] for index in free)]
    products = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for of_image in zip(*parts, strict=True):  # one at a time, for memory
        own = torch.stack(of_image).double().flatten(1)
        products += own @ own.T
    return products


def _are_possible(rows: Rows) -> bool:
    timesteps, landings = (np.array(column) for column in list(zip(*rows, strict=True))[:2])
    return bool(
        np.isfinite(timesteps).all()
        and (np.diff(timesteps) < 0).all()
        and timesteps[-1] >= 0
        and ((landings > 0).all())
        and (landings[:-1] < 1).all()
    )
