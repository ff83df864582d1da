"""The gate: a factor in [0, 1] on Dot's residual, by the gap t_s - t_i and by t_i.

The factors are fitted in closed form on held-out trajectories (`morse.training.gate`); where a Dot
is of no help there, a small one keeps it near what its residual is added to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

_KEYS = {"gap_edges", "timestep_edges", "alpha"}


@dataclass(frozen=True)
class Gate:
    """Factors in bins of the gap t_s - t_i and of t_i, both in timesteps as Dash takes them.

    Attributes:
        gap_edges: Inner edges of the bins, increasing; a bin has its upper edge, not its lower.
        timestep_edges: The same for t_i.
        alpha: Factors, a row for each bin of the gap, a column for each of t_i.
    """

    gap_edges: tuple[float, ...]
    timestep_edges: tuple[float, ...]
    alpha: tuple[tuple[float, ...], ...]
    # Tensors by device, and no buffers: the gate is in the config, not among the weights.
    _tensors: dict[torch.device, tuple[Tensor, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Check edges and factors.

        Raises:
            ValueError: If edges do not increase, or the table has another shape or range.
        """
        for name in ("gap_edges", "timestep_edges"):
            edges = getattr(self, name)
            if not all(low < high for low, high in pairwise(edges)):
                raise ValueError(f"gate has {name} {edges}, which must increase; fit it again.")
        shape = (len(self.gap_edges) + 1, len(self.timestep_edges) + 1)
        if len(self.alpha) != shape[0] or any(len(row) != shape[1] for row in self.alpha):
            raise ValueError(f"gate has alpha {self.alpha}, but by its edges must be {shape}.")
        if not all(0 <= value <= 1 for row in self.alpha for value in row):
            raise ValueError(f"gate has alpha {self.alpha}, but all must be in [0, 1].")

    @classmethod
    def from_config(cls, config: Mapping[str, Sequence[object]] | None) -> Self | None:
        """Read what `to_config` gave; None for no gate.

        Raises:
            ValueError: If keys are missing or unknown.
        """
        if config is None:
            return None
        if set(config) != _KEYS:
            raise ValueError(f"gate has the keys {sorted(config)}, but must have {sorted(_KEYS)}.")
        rows = tuple(tuple(row) for row in config["alpha"])
        return cls(tuple(config["gap_edges"]), tuple(config["timestep_edges"]), rows)

    def to_config(self) -> dict[str, object]:
        """Give what is written into Dot's config."""
        return {
            "gap_edges": list(self.gap_edges),
            "timestep_edges": list(self.timestep_edges),
            "alpha": [list(row) for row in self.alpha],
        }

    def bins(self, timestep: Tensor, since: Tensor) -> Tensor:
        """Number the bins, row by row, of t_i and t_s, () or (B,), on their device."""
        gap_edges, timestep_edges, _ = self._on(timestep.device)
        row = torch.bucketize(since.float() - timestep.float(), gap_edges)
        return row * (len(self.timestep_edges) + 1) + torch.bucketize(
            timestep.float(), timestep_edges
        )

    def __call__(self, residual: Tensor, timestep: Tensor, since: Tensor) -> Tensor:
        """Scale residuals (B, ...) of t_i and t_s, () or (B,); nothing waits for the device."""
        device = residual.device
        index = self.bins(timestep.to(device), since.to(device)).reshape(-1)
        alpha = self._on(device)[2][index].to(residual.dtype)
        return residual * alpha.reshape(-1, *(1,) * (residual.ndim - 1))

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._tensors:
            flat = [value for row in self.alpha for value in row]
            with torch.inference_mode(False):  # else they could not serve in training
                self._tensors[device] = tuple(
                    torch.tensor(values, dtype=torch.float32, device=device)
                    for values in (self.gap_edges, self.timestep_edges, flat)
                )
        return self._tensors[device]
