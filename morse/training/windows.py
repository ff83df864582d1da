"""What Dot learns from: short pieces of sampling trajectories, evaluated by Dash throughout.

A window starts at noised data and makes `steps` solver steps. Any two of its points give a training
pair: Dash's estimate at the earlier (t_s), what Dot sees at the later (t_i), and the target there.
One step is the pair of Algorithm 1 (Morse, section 3.4); with more of them each evaluation of Dash
serves in several pairs, and Dot meets samples that earlier Dot steps would have produced.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from morse.sampling import Dash, JumpPoint, dot_estimate
from morse.spaces import PredictionType, signal_and_noise, to_noise_pred

LossWeighting = Literal["none", "gap"]
TimestepSampling = Literal["uniform", "plans"]
# Numbers of evaluations of the plans that people run: from 5 LSD to 30 LSD at ratio 2.
PLAN_EVALUATIONS = (6, 60)


@dataclass(frozen=True)
class Window:
    """Points of trajectories, in sampling order.

    Attributes:
        timesteps: (B, P) integers, decreasing.
        samples: (B, P, C, H, W).
        outputs: Dash's estimates there, like `samples`.
    """

    timesteps: Tensor
    samples: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Pairs:
    """Training pairs: the jump point, and Dash's estimate `target` at a later point."""

    jump: JumpPoint
    sample: Tensor
    timestep: Tensor
    target: Tensor


def draw_timesteps(
    batch_size: int,
    num_points: int,
    sampling: TimestepSampling,
    num_train_timesteps: int,
    generator: torch.Generator,
) -> Tensor:
    """Draw decreasing timesteps for windows, (batch_size, num_points), on the generator's device.

    "uniform" draws them uniformly and distinct (Algorithm 1); "plans" takes neighbours from
    trailing grids (Lin et al. 2024) of as many evaluations as real plans have.
    """
    device = generator.device
    if sampling == "uniform":
        scores = torch.rand(batch_size, num_train_timesteps, generator=generator, device=device)
        drawn = scores.topk(num_points, dim=1).indices
        return drawn.sort(dim=1, descending=True).values
    low, high = max(PLAN_EVALUATIONS[0], num_points), PLAN_EVALUATIONS[1]
    uniform = torch.rand(2, batch_size, generator=generator, device=device, dtype=torch.float64)
    evaluations = (low * (high / low) ** uniform[0]).round()
    start = (uniform[1] * (evaluations - num_points + 1)).floor()
    index = start[:, None] + torch.arange(num_points, device=device)
    grid = num_train_timesteps - index * (num_train_timesteps / evaluations[:, None])
    return grid.round().long() - 1


@torch.no_grad()
def make_window(
    dash: Dash,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    second_order: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
    dot: nn.Module | None = None,
) -> Window:
    """Noise data to the first timestep, then follow the solver through the others.

    Args:
        dash: The pretrained denoiser.
        clean: Data, (B, C, H, W).
        noise: Standard normal, like `clean`.
        timesteps: (B, P), decreasing.
        second_order: Booleans (B,): DPM-Solver++ 2M (Lu et al. 2022, Algorithm 2) where true, DDIM,
            which is its first-order case, elsewhere.
        alphas_cumprod: Dash's noise schedule, (T,).
        prediction_type: What Dash predicts.
        dot: Where given, steps are made with its estimates from the first point on, as between two
            Dash evaluations of a run; `outputs` are Dash's all the same.
    """
    rates = [signal_and_noise(alphas_cumprod, column, clean) for column in timesteps.unbind(1)]
    sample = rates[0][0] * clean + rates[0][1] * noise
    samples, outputs, cleans = [], [], []
    jump = None
    for index, timestep in enumerate(timesteps.unbind(1)):
        # Windows are cached in half precision; Dash must have seen what will be read back.
        sample = sample.half().float()
        samples.append(sample)
        outputs.append(dash(sample, timestep).half().float())
        estimate = outputs[-1]
        if dot is not None and jump is not None:
            estimate = dot_estimate(dot, sample, timestep, jump).float()
        jump = jump or JumpPoint(sample, timestep, outputs[0])
        noise_pred = to_noise_pred(estimate, sample, *rates[index], prediction_type)
        alpha, sigma = rates[index]
        cleans.append((sample - sigma * noise_pred) / alpha)
        if index + 1 < timesteps.shape[1]:
            direction = _direction(cleans, rates[: index + 2], second_order)
            next_alpha, next_sigma = rates[index + 1]
            ratio = next_sigma / sigma
            sample = ratio * sample + (next_alpha - ratio * alpha) * direction
    return Window(timesteps, torch.stack(samples, 1), torch.stack(outputs, 1))


def _direction(
    cleans: list[Tensor], rates: list[tuple[Tensor, Tensor]], second_order: Tensor
) -> Tensor:
    """The x_0 to step with: the last one, or extrapolated in log-SNR from the last two."""
    if len(cleans) < 2:
        return cleans[-1]
    before, here, there = ((alpha / sigma).log() for alpha, sigma in rates[-3:])
    coefficient = (there - here) / (2 * (here - before))
    coefficient = coefficient * second_order.reshape(-1, *(1,) * (coefficient.ndim - 1))
    return cleans[-1] + coefficient * (cleans[-1] - cleans[-2])


def pick_pairs(window: Window, num_pairs: int, generator: torch.Generator, first: bool) -> Pairs:
    """Pick pairs from every window at random, (B * num_pairs, ...) in all.

    Args:
        window: The windows.
        num_pairs: Pairs from each.
        generator: On the window's device.
        first: Whether the jump point is always the first point (windows made with a Dot).
    """
    batch_size, num_points = window.timesteps.shape
    shape = (batch_size, num_pairs)
    device = window.timesteps.device
    uniform = torch.rand(2, *shape, generator=generator, device=device)
    # Few plans put more than four Dot steps after a Dash step.
    reach = min(num_points - 1, 4)
    gap = (uniform[0] * reach).long() + 1
    start = (uniform[1] * (num_points - gap)).long()
    if first:
        start, gap = torch.zeros_like(start), (uniform[0] * (num_points - 1)).long() + 1
    rows = torch.arange(batch_size, device=device)[:, None].expand(shape)

    def take(points: Tensor, index: Tensor) -> Tensor:
        return points[rows, index].flatten(0, 1).float()

    def take_time(index: Tensor) -> Tensor:
        return window.timesteps[rows, index].flatten().long()

    jump = JumpPoint(take(window.samples, start), take_time(start), take(window.outputs, start))
    end = start + gap
    return Pairs(jump, take(window.samples, end), take_time(end), take(window.outputs, end))


def weighted_loss(estimate: Tensor, pairs: Pairs, weighting: LossWeighting) -> Tensor:
    """Mean squared error of estimates for `pairs`: "none" as in Algorithm 1, "gap" weighted.

    Unweighted errors come mostly from the widest gaps t_s - t_i, over which Dash's estimate
    changes most (its square grows as the gap's), while plans with many evaluations have narrow
    ones. Weights 1 / gap go half the way to equality.
    """
    errors = (estimate.float() - pairs.target).square().flatten(1).mean(1)
    if weighting == "none":
        return errors.mean()
    weights = 1 / (pairs.jump.timestep - pairs.timestep)
    return (errors * weights).sum() / weights.sum()


def fresh_window(
    dash: Dash,
    clean: Tensor,
    generator: torch.Generator,
    num_points: int,
    sampling: TimestepSampling,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
    dot: nn.Module | None = None,
) -> Window:
    """Draw timesteps, noise and solver orders, and make windows from data, (B, C, H, W)."""
    timesteps = draw_timesteps(len(clean), num_points, sampling, len(alphas_cumprod), generator)
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    second_order = torch.rand(len(clean), generator=generator, device=clean.device) < 0.5
    return make_window(
        dash, clean, noise, timesteps, second_order, alphas_cumprod, prediction_type, dot
    )
