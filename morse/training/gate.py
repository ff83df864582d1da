"""Fit a Dot's gate (`morse.dot.gate`) on held-out trajectories, by least squares."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morse.dot import MorseDot
from morse.dot.gate import Gate
from morse.training.config import TrainDotConfig
from morse.training.pairs import Pairs, dot_outputs, with_memory
from morse.training.validation import GAP_BOUNDS, VALIDATION_STEPS, held_out_windows
from morse.training.windows import most_points, pick_pairs

if TYPE_CHECKING:
    from morse.training.source import ConditionedImages

# Inner edges of the bins of t_i, as shares of the schedule; those of the gap are validation's.
TIMESTEP_EDGES = (0.1, 0.3, 0.6)
MIN_PAIRS = 32


@dataclass(frozen=True)
class FittedGate:
    """A gate, and what it was fitted on.

    Attributes:
        gate: The gate.
        counts: Pairs in each bin, in the table's shape.
        overall: The factor of all pairs together, which bins with too few take.
        ratios: Squared error over that of the base, with the gate and without it.
    """

    gate: Gate
    counts: tuple[tuple[int, ...], ...]
    overall: float
    ratios: tuple[float, float]

    def __str__(self) -> str:
        """Show the table: a line for each bin of the gap, with the pairs of each bin."""
        lines = [
            f"gate: {self.overall:.3f} over all; squared error over the base's "
            f"{self.ratios[0]:.4f}, without the gate {self.ratios[1]:.4f}; by t_i (pairs):"
        ]
        bounds = (*(f"up to {edge:g}" for edge in self.gate.gap_edges), "beyond")
        for bound, alphas, counts in zip(bounds, self.gate.alpha, self.counts, strict=True):
            cells = (f"{a:.3f} ({n})" for a, n in zip(alphas, counts, strict=True))
            lines.append(f"  gap {bound}: {', '.join(cells)}")
        return "\n".join(lines)


def calibration_pairs(source: "ConditionedImages", config: TrainDotConfig) -> list[Pairs]:
    """Make fixed pairs on the grids of plans, of other images than validation's where there are.

    As many as validation has, from those after it; where the split is too short, its last ones.
    They are on the CPU, as validation's are.
    """
    first = max(0, min(config.validation_images, len(source) - config.validation_images))
    settings = replace(config, timestep_sampling="plans")
    most = most_points("plans", len(source.pipeline.dash.schedule)) - 1
    steps = min(max(config.window_steps, VALIDATION_STEPS), most)
    dash, generator = source.pipeline.dash, torch.Generator(source.pipeline.device).manual_seed(1)
    return [
        pick_pairs(dash, window, 4 * steps, generator, False).to("cpu")
        for window in held_out_windows(source, settings, steps + 1, generator, first)
    ]


@torch.no_grad()
def fit_gate(
    dot: MorseDot, batches: Iterable[Pairs], num_train_timesteps: int, min_pairs: int = MIN_PAIRS
) -> FittedGate:
    """Fit alpha = clip(sum <r, d> / sum <r, r>, 0, 1) in each bin; `dot` has the gate afterwards.

    r is Dot's residual and d the target less the base, both guided. The squared error is quadratic
    in alpha, so in each bin with enough pairs it is at most that of Dot, and that of the base.

    Args:
        dot: Bound to the Dash of the pairs; a gate that it has is replaced.
        batches: Pairs with targets.
        num_train_timesteps: T, the largest timestep and one more.
        min_pairs: Bins with fewer take the factor of all pairs together.

    Raises:
        ValueError: If Dot is independent, whose estimate is no correction, or there are no pairs.
    """
    if dot.config.independent:
        raise ValueError("dot is independent, and so has no residual to gate; leave the gate out.")
    edges = (
        tuple(share * num_train_timesteps for share in shares)
        for shares in (GAP_BOUNDS[1:-1], TIMESTEP_EDGES)
    )
    gap_edges, timestep_edges = edges
    shape = (len(gap_edges) + 1, len(timestep_edges) + 1)
    empty = Gate(gap_edges, timestep_edges, ((1.0,) * shape[1],) * shape[0])
    dot.set_gate(None)
    found = [_products(dot, pairs, empty) for pairs in batches]
    if not found:
        raise ValueError("batches is empty, but a gate is fitted on pairs; give some.")
    index, *products = (torch.cat(parts) for parts in zip(*found, strict=True))
    sums = torch.zeros(4, shape[0] * shape[1], dtype=torch.float64)
    for row, values in zip(sums, (*products, torch.ones_like(products[0])), strict=True):
        row.index_add_(0, index, values)
    overall = _factor(*sums[:2].sum(1))
    alpha = torch.where(sums[3] < min_pairs, overall, _factor(sums[0], sums[1]))
    gate = replace(empty, alpha=tuple(map(tuple, alpha.reshape(shape).tolist())))
    dot.set_gate(gate.to_config())
    errors = (sums[2] - (2 * factor * sums[0] - factor**2 * sums[1]) for factor in (alpha, 1))
    ratios = tuple(float(error.sum() / sums[2].sum()) for error in errors)
    counts = tuple(map(tuple, sums[3].long().reshape(shape).tolist()))
    return FittedGate(gate, counts, float(overall), ratios)


def _products(dot: MorseDot, pairs: Pairs, gate: Gate) -> tuple[Tensor, ...]:
    """Give each pair's bin, <r, d>, <r, r> and <d, d>, (N,) each, on the CPU in double."""
    pairs = pairs.to(pairs.dash.schedule.device)
    base = pairs.guided(pairs.base.unflatten(0, (-1, pairs.conditions.branches)))
    residual = pairs.guided(dot_outputs(dot, with_memory(pairs, {}))) - base
    wanted = pairs.target - base
    rows = slice(None, None, pairs.conditions.branches)
    index = gate.bins(pairs.timestep[rows], pairs.jump.timestep[rows]).cpu()
    # MPS has no float64.
    r, d = (values.flatten(1).cpu().double() for values in (residual, wanted))
    return index, *((a * b).sum(1) for a, b in ((r, d), (r, r), (d, d)))


def _factor(product: Tensor, square: Tensor) -> Tensor:
    """Divide and clip; 1 where there is no residual, as for a Dot that has not learnt."""
    return torch.where(square > 0, product / square, 1.0).clamp(0, 1)
