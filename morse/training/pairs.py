"""Training pairs of two points of a trajectory, and the loss over them."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from morse.capture import map_tensors
from morse.sampling import Dot, JumpPoint
from morse.training.frozen import FrozenDash
from morse.training.guidance import Conditions, each_branch, guide

LossWeighting = Literal["none", "gap"]


@dataclass(frozen=True)
class Point:
    """Points of trajectories, one each.

    Attributes:
        sample: (B, C, H, W).
        position: Where in the noise schedule, integers (B,).
        outputs: Dash's there, for each branch, (B, G, C_out, H, W); None where not evaluated.
    """

    sample: Tensor
    position: Tensor
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Pairs:
    """N pairs: what Dot sees, with a row for each of G branches, and what it should reach.

    For a Dot of guided estimates G is 1: the guided estimate, with the positive conditions.

    Attributes:
        jump: The jump point, N * G rows.
        sample: Where Dot is evaluated, N * G rows.
        timestep: What it is told there, (N * G,).
        base: What its residual is added to, (N * G, C_out, H, W).
        reused: Dash's latest estimate by itself: the base without history.
        conditions: Of N pairs.
        gap: Positions of the schedule between the two points, (N,).
        target: Dash's guided estimate there, (N, C, H, W); None where it was not evaluated.
        dash: The Dash that all of it comes from.
    """

    jump: JumpPoint
    sample: Tensor
    timestep: Tensor
    base: Tensor
    reused: Tensor
    conditions: Conditions
    gap: Tensor
    target: Tensor | None
    dash: FrozenDash

    def to(self, device: torch.device | str) -> "Pairs":
        """Give the same pairs on another device, where Dash stays as it is."""
        moved: dict[tuple[object, ...], Tensor] = {}

        def move(value: Tensor) -> Tensor:
            # Without history or another space Dash's output is also the base: one copy does.
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if key not in moved:
                moved[key] = value.to(device)
            return moved[key]

        return replace(map_tensors(replace(self, dash=None), move), dash=self.dash)

    @property
    def guidance_scale(self) -> Tensor | None:
        """That of the guided estimates, (N,); None without guidance."""
        scale = self.conditions.guidance_scale
        return self.jump.guidance_scale if scale is None else scale

    def outputs(self, residual: Tensor, independent: bool = False) -> Tensor:
        """Add residuals (N * G, C_out, H, W) to the base, (N, G, C_out, H, W)."""
        estimate = residual.float() if independent else self.base + residual.float()
        return estimate.unflatten(0, (-1, self.conditions.branches))

    def guided(self, outputs: Tensor) -> Tensor:
        """Combine the branches as `target` is, (N, C, H, W)."""
        branches = self.conditions.branches
        return self.dash.guided(outputs, self.conditions.guidance_scale, self.sample[::branches])


def join_points(
    dash: FrozenDash,
    jump: Point,
    here: Point,
    conditions: Conditions,
    earlier: Point | None = None,
) -> Pairs:
    """Make the pairs of jump points with later points of the same trajectories.

    `earlier` are the points of the estimates before, for Dots with history; where one is the jump
    point itself, the pair has no history.
    """
    schedule, there = dash.schedule, (here.sample, here.position)
    scale = conditions.guidance_scale
    one_pass = dash.guidance == "guided"
    if one_pass:
        jump, conditions = _guided(jump, scale), conditions.of_one_branch
        earlier = None if earlier is None else _guided(earlier, scale)
    branches = conditions.branches
    base = reused = dash.base(jump.outputs, (jump.sample, jump.position), there)
    trend = None
    if earlier is not None:
        both = ((point.outputs, point.sample, point.position) for point in (earlier, jump))
        base, trend = dash.extrapolated(*both, there)
    return Pairs(
        jump=JumpPoint(
            each_branch(jump.sample, branches),
            each_branch(schedule.timesteps[jump.position], branches),
            jump.outputs.flatten(0, 1),
            trend=trend,
            guidance_scale=scale if one_pass else None,
        ),
        sample=each_branch(here.sample, branches),
        timestep=each_branch(schedule.timesteps[here.position], branches),
        base=base,
        reused=reused,
        conditions=conditions,
        gap=jump.position - here.position,
        target=None if here.outputs is None else dash.guided(here.outputs, scale, here.sample),
        dash=dash,
    )


def _guided(point: Point, scale: Tensor | None) -> Point:
    """Combine a point's branches, which leaves one, (B, 1, C_out, H, W)."""
    return replace(point, outputs=guide(point.outputs, scale)[:, None])


def with_memory(pairs: Pairs, memory: dict[object, object]) -> Pairs:
    """Give the same pairs with another memory of their jump point, {} for a fresh one.

    Pairs that share a memory are for a Dot that relays the steps of one run (`morse.dot.relay`).
    """
    return replace(pairs, jump=replace(pairs.jump, memory=memory))


def dot_outputs(dot: Dot, pairs: Pairs) -> Tensor:
    """Evaluate Dot for `pairs`, each row from its own jump output, (N, G, C_out, H, W)."""
    with pairs.dash.autocast():
        residual = dot(pairs.sample, pairs.timestep, pairs.jump, **pairs.conditions.inputs())
    # DistributedDataParallel hides what its module has.
    independent = getattr(getattr(dot, "module", dot), "independent", False)
    return pairs.outputs(residual, independent)


def weighted_loss(
    estimate: Tensor, pairs: Pairs, weighting: LossWeighting, even_guidance: bool = False
) -> Tensor:
    """Mean squared error of guided estimates for `pairs`: "none" as in Algorithm 1, "gap" weighted.

    Unweighted errors come mostly from the widest gaps t_s - t_i, over which Dash's estimate
    changes most (its square grows as the gap's), while plans with many evaluations have narrow
    ones. Weights 1 / gap go half the way to equality.

    Args:
        estimate: (N, C, H, W).
        pairs: The pairs.
        weighting: By gap.
        even_guidance: Divide errors by (1 - w)^2 + w^2 for a guidance scale w. So much larger is
            the square of a guided error than that of its two branches, where these err
            independently; without it the highest scales make most of the loss. (Of a
            text-to-image model on Fashion-MNIST, the median error of reuse at scales from 8 to 10
            is 7.5 times that at 2 to 4, and .65 times after the division.)
    """
    errors = (estimate.float() - pairs.target).square().flatten(1).mean(1)
    scale = pairs.guidance_scale
    if even_guidance and scale is not None:
        errors = errors / ((1 - scale) ** 2 + scale**2)
    if weighting == "none":
        return errors.mean()
    weights = 1 / pairs.gap
    return (errors * weights).sum() / weights.sum()
