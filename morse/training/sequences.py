"""Pairs of one jump point with all later points of its window, for a Dot that relays (DNR).

Such a Dot hands states on from one step to the next until Dash runs again (`morse.dot.relay`). So
it is evaluated at a window's points in their order, as in sampling, and gradients go back through
the states.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from morse.sampling import JumpPoint
from morse.training.frozen import FrozenDash
from morse.training.pairs import Pairs, join_points, weighted_loss
from morse.training.windows import Window

if TYPE_CHECKING:
    from morse.training.config import TrainDotConfig


def sequence_pairs(dash: FrozenDash, window: Window) -> Pairs:
    """Pair the first points of B windows with each of the P - 1 later ones.

    Returns:
        B * (P - 1) pairs: those with the second point of every window first, then the third, ...
    """
    batch_size, num_points = window.timesteps.shape
    later = torch.arange(1, num_points, device=window.timesteps.device)
    later = later.repeat_interleave(batch_size)
    rows = torch.arange(batch_size, device=later.device).repeat(num_points - 1)
    jump, here = (window.points(rows, index) for index in (torch.zeros_like(later), later))
    return join_points(dash, jump, here, window.conditions.take(rows))


def sequence_residuals(dot: nn.Module, pairs: Pairs, num_steps: int) -> Tensor:
    """Evaluate Dot at the pairs of `sequence_pairs` in their order, with a fresh relay.

    Args:
        dot: Also as accelerate wraps it.
        pairs: The pairs.
        num_steps: P - 1.

    Returns:
        A row for each branch of each pair, (B * (P - 1) * G, C_out, H, W).
    """
    first = torch.arange(len(pairs.gap) // num_steps, device=pairs.gap.device)
    inputs = pairs.conditions.take(first).inputs()
    scale = pairs.jump.guidance_scale
    parts = (pairs.jump.sample, pairs.jump.timestep, pairs.jump.model_output)
    jump = JumpPoint(  # the same at all steps
        *(part.chunk(num_steps)[0] for part in parts),
        guidance_scale=None if scale is None else scale.chunk(num_steps)[0],
    )
    steps = zip(pairs.sample.chunk(num_steps), pairs.timestep.chunk(num_steps), strict=True)
    with pairs.dash.autocast():
        return torch.cat([dot(sample, timestep, jump, **inputs) for sample, timestep in steps])


def sequence_loss(dot: nn.Module, pairs: Pairs, config: "TrainDotConfig") -> Tensor:
    """Give Algorithm 1's loss over the pairs of `sequence_pairs`, all steps alike."""
    residuals = sequence_residuals(dot, pairs, config.window_steps)
    estimate = pairs.guided(pairs.outputs(residuals, config.independent))
    return weighted_loss(estimate, pairs, config.loss_weighting, config.even_guidance)


@torch.no_grad()
def sequence_ratios(dot: nn.Module, batches: Iterable[Pairs], num_steps: int) -> dict[str, float]:
    """Mean square of Dot's error over that of reusing Dash's estimate, along sequences.

    Returns:
        "sequence_ratio" over all steps, and "sequence_ratio/i" of the i-th step after Dash.
    """
    errors, reuse = [], []
    for stored in batches:
        pairs = stored.to(stored.dash.schedule.device)
        residuals = sequence_residuals(dot, pairs, num_steps)
        independent = getattr(dot, "independent", False)
        unchanged = pairs.outputs(torch.zeros_like(pairs.base))
        for outputs, found in (
            (pairs.outputs(residuals, independent), errors),
            (unchanged, reuse),
        ):
            wrong = (pairs.guided(outputs) - pairs.target).square().flatten(1).mean(1)
            found.append(wrong.unflatten(0, (num_steps, -1)).sum(1))
    error, base = (torch.stack(parts).sum(0) for parts in (errors, reuse))
    ratios = {"sequence_ratio": float(error.sum() / base.sum())}
    each = (error / base).tolist()
    return ratios | {f"sequence_ratio/{step}": ratio for step, ratio in enumerate(each, 1)}
