"""Dynamic normalization and relay (DNR): norms whose scale and shift are an LSTM's state.

Source: Cai, Yao and Chen, "Dynamic Normalization and Relay for Video Action Recognition", NeurIPS
2021, and the authors' code where the two differ. The state is relayed from a norm to its neighbour:
the next layer's (one cell shared by several norms), or the same layer's at the next step in time
(a norm with its own cell). Nothing is kept in the modules; callers hand the state over.
"""

from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from morse.modules.dnr_cell import RelayCell, RelayState

Base = Literal["group", "batch", "none"]
Init = Literal["identity", "official"]


class DynamicNormRelay(nn.Module):
    """A norm with a relayed scale and shift: (N, C, *) -> the same and the state after it.

    The mean of x over its positions drives one step of the cell, to h and c (of its last layer).
    With init="official", y = norm(x) * h + c, as the authors': at the start h is about 1/4, so the
    layer shrinks its input. With init="identity", y = norm(x) * (weight + a * h) + (bias + a * c)
    with a at 0: the layer begins as a plain norm, and training opens it channel by channel.

    >>> import torch
    >>> from morse.modules import DynamicNormRelay
    >>> norm = DynamicNormRelay(8)
    >>> x = torch.randn(2, 8, 4, 4)
    >>> y, state = norm(x)            # the first step of a relay
    >>> y, state = norm(x, state)     # the next one
    >>> y.shape, state.h.shape
    (torch.Size([2, 8, 4, 4]), torch.Size([1, 2, 8]))

    Args:
        channels: Channels C.
        base: The norm: "group" depends on no other sample; "batch" is the authors', with running
            statistics; "none" leaves x as it is.
        num_groups: Groups of base="group", the only one with any; they divide C. None for the most
            that do, up to 32 and of at least 4 channels.
        eps: Added to variances.
        momentum: Share of a batch in running statistics, a number, not torch's None for their
            plain average: `num_batches_tracked` stays at 0.
        cell: A cell shared with other norms, which the network must hold beside them; here it is no
            child. None for an own cell, the child `lstm`.
        init: See above.

    Raises:
        ValueError: If an argument is out of its range, or the cell of another width.
    """

    def __init__(
        self,
        channels: int,
        *,
        base: Base = "group",
        num_groups: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        cell: RelayCell | None = None,
        init: Init = "identity",
    ) -> None:
        """Create statistics, affine parameters and cell, as far as the settings ask for them."""
        super().__init__()
        for name, value, allowed in (("base", base, Base), ("init", init, Init)):
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {value!r}")
        if cell is not None and (cell.channels, cell.hidden) != (channels, channels):
            raise ValueError(
                f"cell must read and give channels={channels}, got one of {cell.channels} and "
                f"{cell.hidden}; where the width changes, a relay starts anew with another cell"
            )
        if base == "batch" and momentum is None:
            raise ValueError(
                "momentum must be a number such as 0.1, got None, an average over all batches, "
                "which base='batch' does not keep"
            )
        self.channels, self.base, self.init = channels, base, init
        self.eps, self.momentum = eps, momentum
        self.norm_groups = checked_groups(channels, num_groups)
        # In a tuple, so that a shared cell is a child of the network alone.
        self._shared = () if cell is None else (cell,)
        if cell is None:
            self.lstm = RelayCell(channels)
        if base == "batch":
            self.register_buffer("running_mean", torch.empty(channels))
            self.register_buffer("running_var", torch.empty(channels))
            self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.long))
        if init == "identity":
            self.weight = nn.Parameter(torch.empty(channels))
            self.bias = nn.Parameter(torch.empty(channels))
            self.a = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise statistics and affine parameters anew; a cell's layers do so themselves."""
        own = dict(self.named_parameters(recurse=False)) | dict(self.named_buffers(recurse=False))
        with torch.no_grad():
            for name, value in own.items():
                value.fill_(name in ("weight", "running_var"))

    @classmethod
    def from_norm(cls, norm: nn.Module, **options: object) -> Self:
        """Make a layer that begins exactly as `norm`, whose settings and values it copies.

        A `CrossTemporalNorm` (`morse.modules.dnr_clips`), whose groups of frames have statistics of
        their own, does so with batch norm in evaluation alone.

        Args:
            norm: A `torch.nn.GroupNorm`, or a `BatchNorm1d`, `2d` or `3d` with running statistics.
            options: Options of the class that a norm lacks, such as `cell`.

        Raises:
            TypeError: If `norm` is something else.
            ValueError: If batch norm has no running statistics or no momentum.
        """
        if isinstance(norm, nn.GroupNorm):
            layer = cls(norm.num_channels, base="group", eps=norm.eps, init="identity", **options)
            layer.norm_groups = norm.num_groups
        elif isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            if norm.running_mean is None or norm.momentum is None:
                raise ValueError("norm must have running statistics and a momentum")
            options |= {"eps": norm.eps, "momentum": norm.momentum}
            layer = cls(norm.num_features, base="batch", init="identity", **options)
        else:
            raise TypeError(f"norm must be a GroupNorm or BatchNorm, got {type(norm).__name__}")
        for name in ("weight", "bias"):
            if getattr(norm, name) is None:
                setattr(layer, name, None)
        state = norm.state_dict()
        if state:
            layer.to(next(iter(state.values())))
        layer.load_state_dict(state, strict=False)
        return layer.train(norm.training)

    @property
    def cell(self) -> RelayCell:
        """The relay's cell, own or shared."""
        return self._shared[0] if self._shared else self.lstm

    def forward(self, x: Tensor, state: RelayState | None = None) -> tuple[Tensor, RelayState]:
        """Take one step of the relay and normalise with its result.

        Args:
            x: (N, C, *).
            state: What the neighbour handed over; None at the start of a relay.

        Returns:
            y, (N, C, *), and the state to hand on.

        Raises:
            ValueError: If a shape or device does not fit.
        """
        self._check(x)
        pooled = x.flatten(2).mean(2) if x.dim() > 2 else x
        state = self.cell(pooled, state)
        return self._modulate(x, state), state

    def modulate(self, x: Tensor, state: RelayState) -> Tensor:
        """Normalise with the scale and shift of a given state, which takes no step.

        Takes, returns and raises what `forward` does, without the state.
        """
        self._check(x)
        self.cell.check(state, x)
        return self._modulate(x, state)

    def _modulate(self, x: Tensor, state: RelayState) -> Tensor:
        scale, shift = (part[-1].view(*x.shape[:2], *(1,) * (x.dim() - 2)) for part in state)
        normalized = self._normalize(x, update=self.init == "official")
        if self.init == "official":
            return (normalized * scale + shift).to(normalized.dtype)
        # Apart from the relay's share, so that at a = 0 this is the plain norm to the last bit.
        plain = self._normalize(x, self.weight, self.bias)
        share = _per_channel(self.a, x) * (normalized * scale + shift)
        return plain + share.to(plain.dtype)

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (N, {self.channels}, ...), got {tuple(x.shape)}")

    def _normalize(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
        update: bool = True,
    ) -> Tensor:  # fmt: skip
        """Normalise, scale and shift as the plain norm; `update` moves the running statistics."""
        if self.base == "group":
            return functional.group_norm(x, self.norm_groups, weight, bias, self.eps)
        if self.base == "batch":
            moved = update or not self.training
            statistics = (self.running_mean, self.running_var) if moved else (None, None)
            options = weight, bias, self.training, self.momentum, self.eps
            return functional.batch_norm(x, *statistics, *options)
        if weight is None:
            return x
        return x * _per_channel(weight, x) + _per_channel(bias, x)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (x.dim() - 2))


def checked_groups(channels: int, num_groups: int | None, name: str = "num_groups") -> int:
    """Return the groups that base="group" has; ValueError unless they divide the channels."""
    if num_groups is None:
        return next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{name} must divide channels={channels}, got {num_groups}")
    return num_groups
