"""What Dot learns from: short pieces of sampling trajectories, evaluated by Dash throughout.

A window starts at noised data and makes `steps` solver steps. Any two of its points give a training
pair: Dash's estimate at the earlier (t_s), what Dot sees at the later (t_i), and the target there.
One step is the pair of Algorithm 1 (Morse, section 3.4); with more of them each evaluation of Dash
serves in several pairs, and Dot meets samples that earlier Dot steps would have produced. Under
guidance the steps follow the guided estimate, and the outputs of both branches are kept.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from morse.sampling import Dot
from morse.spaces import Rates, to_clean
from morse.training.frozen import FrozenDash
from morse.training.guidance import UNCONDITIONAL, Conditions
from morse.training.history import draw_triples
from morse.training.pairs import Pairs, Point, dot_outputs, join_points, with_memory

TimestepSampling = Literal["uniform", "plans"]
# Numbers of evaluations of the plans that people run: from 5 LSD to 30 LSD at ratio 2.
PLAN_EVALUATIONS = (6, 60)
# Half the ratio of neighbouring steps in log-SNR is at most 0.89 on the grids of plans, where this
# changes nothing. Of uniform draws a hundredth have 40 and more, whose samples no plan meets.
_LARGEST_COEFFICIENT = 1.0


@dataclass(frozen=True)
class Window:
    """Points of trajectories, in sampling order.

    Attributes:
        timesteps: Positions in the noise schedule, (B, P) integers, decreasing; see
            `morse.training.schedule`.
        samples: (B, P, C, H, W).
        outputs: Dash's there for each branch of guidance, (B, P, G, C_out, H, W).
        conditions: Of the B trajectories.
    """

    timesteps: Tensor
    samples: Tensor
    outputs: Tensor
    conditions: Conditions = UNCONDITIONAL

    def points(self, rows: Tensor, index: Tensor) -> Point:
        """Give the point with an index, (N,), of each of N trajectories, in full precision."""
        return Point(
            self.samples[rows, index].float(),
            self.timesteps[rows, index].long(),
            self.outputs[rows, index].float(),
        )


def most_points(sampling: TimestepSampling, num_train_timesteps: int) -> int:
    """Give how many points a window has room for: on grids of more, neighbours would coincide."""
    longest = num_train_timesteps if sampling == "uniform" else PLAN_EVALUATIONS[1]
    return min(longest, num_train_timesteps)


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
    high = most_points(sampling, num_train_timesteps)
    low = min(max(PLAN_EVALUATIONS[0], num_points), high)
    dtype = _widest_float(device)
    uniform = torch.rand(2, batch_size, generator=generator, device=device, dtype=dtype)
    evaluations = (low * (high / low) ** uniform[0]).round()
    start = (uniform[1] * (evaluations - num_points + 1)).floor()
    index = start[:, None] + torch.arange(num_points, device=device)
    grid = num_train_timesteps - index * (num_train_timesteps / evaluations[:, None])
    return grid.round().long() - 1


def _widest_float(device: torch.device) -> torch.dtype:
    """Give float64 where it is sure to exist; MPS has none."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


@torch.no_grad()
def make_window(
    dash: FrozenDash,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    second_order: Tensor,
    conditions: Conditions = UNCONDITIONAL,
    dot: Dot | None = None,
) -> Window:
    """Noise data to the first timestep, then follow the solver through the others.

    Args:
        dash: The pretrained denoiser.
        clean: Data, (B, C, H, W).
        noise: Standard normal, like `clean`.
        timesteps: Positions in Dash's noise schedule, (B, P), decreasing.
        second_order: Booleans (B,): DPM-Solver++ 2M (Lu et al. 2022, Algorithm 2) where true, DDIM,
            which is its first-order case, elsewhere.
        conditions: Of the B trajectories, with their guidance scales.
        dot: Where given, steps are made with its estimates from the first point on, as between two
            Dash evaluations of a run; `outputs` are Dash's all the same.
    """
    rates = [dash.schedule.rates(column, clean) for column in timesteps.unbind(1)]
    sample = rates[0][0] * clean + rates[0][1] * noise
    points: list[Point] = []
    cleans: list[Tensor] = []
    memory: dict[object, object] = {}
    for index, position in enumerate(timesteps.unbind(1)):
        # Windows are cached in half precision; Dash must have seen what will be read back.
        sample = sample.half().float()
        outputs = dash(sample, position, conditions).half().float()
        points.append(Point(sample, position, outputs))
        if dot is not None and index > 0:
            pairs = join_points(dash, points[0], points[-1], conditions)
            outputs = dot_outputs(dot, with_memory(pairs, memory))
        estimate = dash.guided(outputs, conditions.guidance_scale, sample)
        cleans.append(to_clean(estimate, sample, rates[index], dash.prediction_type))
        if index + 1 < timesteps.shape[1]:
            direction = _direction(cleans, rates[: index + 2], second_order)
            (alpha, sigma), (next_alpha, next_sigma) = rates[index : index + 2]
            ratio = next_sigma / sigma
            sample = ratio * sample + (next_alpha - ratio * alpha) * direction
    samples = torch.stack([point.sample for point in points], 1)
    return Window(timesteps, samples, torch.stack([p.outputs for p in points], 1), conditions)


def _direction(cleans: list[Tensor], rates: list[Rates], second_order: Tensor) -> Tensor:
    """The x_0 to step with: the last one, or extrapolated in log-SNR from the last two.

    After a step much shorter than the next, the two tell little of where the line leads: how far it
    is followed is bounded.
    """
    if len(cleans) < 2:
        return cleans[-1]
    before, here, there = ((alpha / sigma).log() for alpha, sigma in rates[-3:])
    coefficient = ((there - here) / (2 * (here - before))).clamp(max=_LARGEST_COEFFICIENT)
    coefficient = coefficient * second_order.reshape(-1, *(1,) * (coefficient.ndim - 1))
    return cleans[-1] + coefficient * (cleans[-1] - cleans[-2])


def pick_pairs(
    dash: FrozenDash,
    window: Window,
    num_pairs: int,
    generator: torch.Generator,
    first: bool,
    widest: int = 4,
) -> Pairs:
    """Pick pairs from every window at random, B * num_pairs in all, with history if Dot has it.

    Args:
        dash: The one that the windows were made with.
        window: The windows.
        num_pairs: Pairs from each.
        generator: On the window's device.
        first: Whether the jump point is always the first point (windows made with a Dot).
        widest: Most steps between the two; few plans put more Dot steps after a Dash step.
    """
    batch_size, num_points = window.timesteps.shape
    shape = (batch_size, num_pairs)
    device = window.timesteps.device
    if dash.history:
        earlier, start, gap = draw_triples(shape, num_points, widest, generator)
    else:
        uniform = torch.rand(2, *shape, generator=generator, device=device)
        gap = (uniform[0] * min(num_points - 1, widest)).long() + 1
        start = (uniform[1] * (num_points - gap)).long()
        if first:
            start, gap = torch.zeros_like(start), (uniform[0] * (num_points - 1)).long() + 1
    rows = torch.arange(batch_size, device=device).repeat_interleave(num_pairs)
    jump, here = (window.points(rows, index.flatten()) for index in (start, start + gap))
    before = window.points(rows, earlier.flatten()) if dash.history else None
    return join_points(dash, jump, here, window.conditions.take(rows), before)


def fresh_window(
    dash: FrozenDash,
    clean: Tensor,
    generator: torch.Generator,
    num_points: int,
    sampling: TimestepSampling,
    conditions: Conditions = UNCONDITIONAL,
    dot: Dot | None = None,
) -> Window:
    """Draw timesteps, noise and solver orders, and make windows from data, (B, C, H, W)."""
    timesteps = draw_timesteps(len(clean), num_points, sampling, len(dash.schedule), generator)
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    second_order = torch.rand(len(clean), generator=generator, device=clean.device) < 0.5
    return make_window(dash, clean, noise, timesteps, second_order, conditions, dot)
