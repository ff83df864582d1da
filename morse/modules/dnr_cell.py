"""DNR's relay: the state handed from norm to norm, and the small LSTM that renews it.

Source: Cai, Yao and Chen, "Dynamic Normalization and Relay for Video Action Recognition", NeurIPS
2021, and the authors' code where the two differ. `morse.modules.dnr` has the norms.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class RelayState(NamedTuple):
    """A plain value: the relay's hidden and cell state, each (layers, N, D).

    >>> import torch
    >>> from morse.modules import RelayState
    >>> state = RelayState(torch.zeros(1, 4, 8), torch.ones(1, 4, 8))
    >>> state.index([2, 0]).to(torch.float64).detach().c.shape
    torch.Size([1, 2, 8])
    """

    h: Tensor
    c: Tensor

    def detach(self) -> "RelayState":
        """Return it cut off from the graph that made it."""
        return RelayState(self.h.detach(), self.c.detach())

    def to(self, *args: object, **kwargs: object) -> "RelayState":
        """Return it on another device or with another dtype, as `torch.Tensor.to`."""
        return RelayState(self.h.to(*args, **kwargs), self.c.to(*args, **kwargs))

    def index(self, indices: Tensor | Sequence[int] | slice) -> "RelayState":
        """Return the states of some samples: indices (K,), a mask (N,) or a slice."""
        return RelayState(self.h[:, indices], self.c[:, indices])


class RelayCell(nn.Module):
    """One step of the relay, an LSTM whose hidden state stays in (0, 1).

    c' = sigmoid(f) * c + sigmoid(i) * tanh(g) and h' = sigmoid(o) * sigmoid(c'), where the gates
    (i, f, g, o) are the sum of two bottlenecks, one on the pooled feature and one on h. That h'
    passes c' through a sigmoid, not tanh, is the authors'.

    >>> import torch
    >>> from morse.modules import RelayCell
    >>> cell = RelayCell(8)
    >>> state = cell(torch.ones(2, 8))
    >>> state = cell(torch.ones(2, 8), state)
    >>> state.h.shape
    torch.Size([1, 2, 8])

    Args:
        channels: Channels C of the pooled feature, at least `reduction`.
        hidden: Channels D of the state, at least `reduction`; None for C.
        reduction: The bottlenecks are C // reduction and D // reduction wide.
        num_layers: Above 1, each further layer has a state of its own and reads, through a plain
            matrix, the same pooled feature (not the layer below it); D must then be C.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self, channels: int, hidden: int | None = None, reduction: int = 4, num_layers: int = 1
    ) -> None:
        """Create the maps, named as the authors', with torch's own initialisation."""
        super().__init__()
        hidden = channels if hidden is None else hidden
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        for name, width in (("channels", channels), ("hidden", hidden)):
            if width < max(reduction, 1):
                raise ValueError(f"{name} must be at least reduction={reduction}, got {width}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if num_layers > 1 and hidden != channels:
            raise ValueError(
                f"hidden must be channels={channels} with several layers, all of which read the "
                f"same pooled feature, got {hidden}"
            )
        self.channels, self.hidden = channels, hidden
        self.reduction, self.num_layers = reduction, num_layers
        self.w_ih, self.w_hh = (
            nn.ModuleList(
                [
                    _Bottleneck(width, width // reduction, 4 * hidden),
                    *(nn.Linear(width, 4 * hidden) for _ in range(num_layers - 1)),
                ]
            )
            for width in (channels, hidden)
        )

    def forward(self, pooled: Tensor, state: RelayState | None = None) -> RelayState:
        """Take one step.

        Args:
            pooled: Pooled feature, (N, C).
            state: The state handed over, each part (layers, N, D); None for zeros, the start.

        Returns:
            The state after the step.

        Raises:
            ValueError: If a shape or device does not fit.
        """
        if pooled.dim() != 2 or pooled.shape[1] != self.channels:
            raise ValueError(f"pooled must be (N, {self.channels}), got {tuple(pooled.shape)}")
        if state is None:
            zeros = pooled.new_zeros(self.num_layers, len(pooled), self.hidden)
            state = RelayState(zeros, zeros)
        self.check(state, pooled)
        steps = [
            self._step(layer, pooled, h, c)
            for layer, (h, c) in enumerate(zip(state.h, state.c, strict=True))
        ]
        hidden, cells = zip(*steps, strict=True)
        return RelayState(torch.stack(hidden), torch.stack(cells))

    def _step(self, layer: int, pooled: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.w_ih[layer](pooled) + self.w_hh[layer](h)
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.sigmoid(), c

    def check(self, state: RelayState, x: Tensor) -> None:
        """Check that a state is one of this cell's for as many samples as `x`, (N, ...), has.

        Raises:
            ValueError: If a shape or device does not fit.
        """
        expected = self.num_layers, len(x), self.hidden
        for name, part in zip("hc", state, strict=True):
            if tuple(part.shape) != expected:
                raise ValueError(
                    f"state.{name} must be (layers, N, D) = {expected}, got {tuple(part.shape)}; "
                    "pass None to start anew, or pick samples with state.index"
                )
            if part.device != x.device:
                raise ValueError(
                    f"state.{name} must be on {x.device}, got {part.device}: use state.to"
                )


class _Bottleneck(nn.Module):
    def __init__(self, width: int, inner: int, out: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, out))

    def forward(self, v: Tensor) -> Tensor:
        return self.seq(v)
