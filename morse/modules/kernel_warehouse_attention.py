"""KernelWarehouse's attention: each mixture's signed weights on all cells of the bank.

Source: Li and Yao, ICML 2024 (arXiv 2406.07879). `morse.modules.kernel_warehouse` has the bank and
the meaning of the letters in shapes.
"""

import math
import warnings
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from morse.modules.kernel_stack import kaiming_
from morse.modules.kernel_warehouse_plan import LayerPlan

AttentionNorm = Literal["batch", "layer"]


class AttentionSettings(NamedTuple):
    """What the attentions of all layers of a warehouse share; see `Warehouse`."""

    reduction: float
    basis_ratio: float
    norm: AttentionNorm
    cond_dim: int | None


class CellAttention(nn.Module):
    """Attention of each mixture over all cells, (R, C) -> (R, m, n); signed, rows need no sum."""

    temp_bias: Tensor

    def __init__(
        self, in_channels: int, n: int, layer: LayerPlan, settings: AttentionSettings
    ) -> None:
        """Create the maps, named as the authors', and the initial assignment."""
        super().__init__()
        hidden = max(int(in_channels * settings.reduction), 16)
        self.mixtures, self.n, self.start, self.local = layer.mixtures, n, layer.start, layer.local
        batch = settings.norm == "batch"
        self.fc1 = nn.Linear(settings.cond_dim or in_channels, hidden, bias=not batch)
        self.norm1 = nn.BatchNorm1d(hidden) if batch else nn.LayerNorm(hidden)
        self.basis = 0
        if settings.basis_ratio < 1:
            self.basis = max(int((n - self.local) * settings.basis_ratio), 16)
            width = self.local + self.basis + 1
            self.fc2 = nn.Linear(hidden, self.mixtures * width, bias=False)
            self.fc3 = _linear(self.basis, n - self.local)
            self.basis_bias = nn.Parameter(torch.empty(self.mixtures * (n + 1)))
        else:
            self.fc2 = nn.Linear(hidden, self.mixtures * (n + 1))
        self.initial_cell = layer.initial_cell
        # Follows from the order of the layers, so it moves with the module but is not saved.
        empty = torch.empty(self.mixtures, n + 1)
        self.register_buffer("temp_bias", empty, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors do."""
        self._assign_cells()
        for layer in self.children():
            if not isinstance(layer, nn.Linear):
                layer.reset_parameters()
                continue
            if layer.weight.numel():
                kaiming_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.basis:
            nn.init.zeros_(self.basis_bias)

    def _assign_cells(self) -> None:
        """Write the initial assignment, of which each mixture is one cell or, at n, zeros."""
        self.temp_bias.copy_(_one_hot(self.initial_cell, self.n))

    def _load_from_state_dict(self, *args: object) -> None:
        """Assign the cells as well: after `to_empty` nothing else would."""
        super()._load_from_state_dict(*args)
        self._assign_cells()

    def forward(self, source: Tensor, temperature: Tensor | float) -> Tensor:
        """Compute the attentions (the contrasting-driven attention function)."""
        if isinstance(self.norm1, nn.BatchNorm1d) and self.norm1.training and len(source) == 1:
            raise ValueError(
                "norm='batch' cannot train on a single row; build the warehouse with norm='layer', "
                "or freeze it with .attention.norm1.eval()"
            )
        logits = self._logits(functional.relu(self.norm1(self.fc1(source))))
        signed = logits / (logits.abs().sum(-1, keepdim=True) + 1e-3)
        mixed = (1 - temperature) * signed + temperature * self.temp_bias
        return mixed[..., : self.n]  # The last column stands for the null cell.

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.fc2(hidden).unflatten(1, (self.mixtures, -1))
        if not self.basis:
            return logits
        local, basis, null = logits.split((self.local, self.basis, 1), -1)
        others = self.fc3(basis)
        before, after = others[..., : self.start], others[..., self.start :]
        logits = torch.cat((before, local, after, null), -1)
        return logits + self.basis_bias.view(self.mixtures, -1)


def check_settings(settings: AttentionSettings) -> None:
    """Raise ValueError unless all settings are in their ranges."""
    if not 0 < settings.reduction < math.inf:
        raise ValueError(f"reduction must be above 0 and finite, got {settings.reduction}")
    if not 0 < settings.basis_ratio <= 1:
        raise ValueError(f"basis_ratio must be in (0, 1], got {settings.basis_ratio}")
    if settings.norm not in get_args(AttentionNorm):
        raise ValueError(f"norm must be one of {get_args(AttentionNorm)}, got {settings.norm!r}")
    if settings.cond_dim is not None and settings.cond_dim < 1:
        raise ValueError(f"cond_dim must be at least 1 or None, got {settings.cond_dim}")


def _one_hot(cells: tuple[int, ...], n: int) -> Tensor:
    # On the CPU, where it has values whatever the default device is ("meta").
    assignment = torch.zeros(len(cells), n + 1, device="cpu")
    return assignment.scatter_(1, torch.tensor(cells, device="cpu")[:, None], 1)


def _linear(in_features: int, out_features: int) -> nn.Linear:
    """Create a matrix that may have no rows, of which torch would warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        return nn.Linear(in_features, out_features, bias=False)
