"""Up-sampling transform (UPT): learned interpolation from the nodes of a graph to more nodes.

Source: Cai, Kang, Yao and Chen, "Ske2Grid: Skeleton-to-Grid Representation Learning for Action
Recognition", ICML 2023 (arXiv 2308.07571), and its code.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from morse.modules.node_matrix import multiply
from morse.modules.ske2grid_index import check_entries, check_nodes

Shape = tuple[int, int]
Mode = Literal["nearest", "linear"]


class UpsamplingTransform(nn.Module):
    """Interpolate nodes, P x: (B, in, C) -> (B, out, C); with an adjacency G, (P G) x.

    P is [I; further rows] at first: the given nodes, then mixtures of them. The authors train all
    of it without constraint. `weight` holds P, or just the further rows if `trainable="extra"`.

    Args:
        in_nodes: Nodes given, at least 1.
        out_nodes: Nodes after it, at least as many.
        adjacency: G, (in, in), a constant that state dicts do not hold; None for the identity.
        init: Further rows. "softmax" draws random convex combinations; "nearest" and "linear"
            need `layout`; a tensor (out, in) is all of P.
        layout: ((h, w), (H, W)), where the given nodes are a coarse grid's cells, row by row, and
            those after it a finer one's. Fine cell i takes coarse cell floor(i h / H) along each
            axis ("nearest"), or interpolates at i h / H with the last cell repeated ("linear",
            for multiples only: with a factor of 2, odd cells average their neighbours). Fine
            cells that are copies come first, in the coarse grid's order; `placement` orders them.
        trainable: True, False, or "extra", by which the identity block is a constant.

    Raises:
        ValueError: If an argument is out of its range or does not fit the others.

    Example:
        >>> import torch
        >>> from morse.modules import UpsamplingTransform
        >>> upt = UpsamplingTransform(17, 25)
        >>> torch.allclose(upt(torch.ones(1, 17, 2)), torch.ones(1, 25, 2))
        True
        >>> torch.allclose(upt.left_inverse() @ upt.matrix(), torch.eye(17), atol=1e-5)
        True
    """

    adjacency: Tensor | None

    def __init__(
        self,
        in_nodes: int,
        out_nodes: int,
        *,
        adjacency: Tensor | None = None,
        init: Literal["softmax", "nearest", "linear"] | Tensor = "softmax",
        layout: tuple[Shape, Shape] | None = None,
        trainable: bool | Literal["extra"] = True,
    ) -> None:
        """Create P."""
        super().__init__()
        _check_settings(in_nodes, out_nodes, adjacency, trainable)
        self.in_nodes, self.out_nodes = in_nodes, out_nodes
        self.layout, self.trainable = _checked_layout(layout, in_nodes, out_nodes), trainable
        rows = _initial_rows(init, in_nodes, out_nodes, self.layout)
        if trainable == "extra":
            if not torch.equal(rows[:in_nodes], torch.eye(in_nodes).to(rows)):
                raise ValueError("trainable='extra' needs an init that begins with the identity")
            rows = rows[in_nodes:].clone()
        self.weight = nn.Parameter(rows, requires_grad=bool(trainable))
        if adjacency is not None:
            # Of an integer one, all that P multiplies would be rounded down.
            dtype = torch.promote_types(adjacency.dtype, torch.get_default_dtype())
            adjacency = adjacency.detach().to(rows.device, dtype, copy=True)
        self.register_buffer("adjacency", adjacency, persistent=False)

    @classmethod
    def from_grids(cls, coarse_hw: Shape, fine_hw: Shape, mode: Mode) -> "UpsamplingTransform":
        """Make the interpolation of a coarse grid's cells to a fine one's; see `layout`.

        Placed by `GraphNodeIndexTransform(H * W, init=upt.placement)`, "nearest" equals
        `torch.nn.functional.interpolate`.
        """
        coarse, fine = tuple(coarse_hw), tuple(fine_hw)
        layout = coarse, fine
        return cls(math.prod(coarse), math.prod(fine), init=mode, layout=layout)

    @property
    def placement(self) -> Tensor | None:
        """The node of each cell of the layout's fine grid, (out,), or None without a layout."""
        return None if self.layout is None else _fine_order(*self.layout).argsort()

    @property
    def keeps_nodes(self) -> bool:
        """Whether the first nodes after it always are those given."""
        return self.trainable == "extra" and self.adjacency is None

    def matrix(self) -> Tensor:
        """Return P, or P G, (out, in)."""
        rows = self.weight
        if self.trainable == "extra":
            identity = torch.eye(self.in_nodes, dtype=rows.dtype, device=rows.device)
            rows = torch.cat([identity, rows])
        return rows if self.adjacency is None else multiply(rows, self.adjacency)

    def forward(self, x: Tensor) -> Tensor:
        """Interpolate: (B, in, C) -> (B, out, C); ValueError for another number of nodes."""
        check_nodes(x, self.in_nodes)
        return multiply(self.matrix(), x)

    def left_inverse(self) -> Tensor:
        """Return the pseudo-inverse (in, out) of `matrix()`; ValueError below full rank."""
        matrix = self.matrix()
        full = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        rank = int(torch.linalg.matrix_rank(full.detach()))
        if rank < self.in_nodes:
            raise ValueError(
                f"matrix() has rank {rank}, and only with {self.in_nodes} could nodes be read "
                "back; trainable='extra' without adjacency keeps them"
            )
        with torch.autocast(full.device.type, enabled=False):
            return torch.linalg.pinv(full).to(matrix.dtype)

    def extra_repr(self) -> str:
        """Name the sizes."""
        return f"{self.in_nodes}, {self.out_nodes}, trainable={self.trainable!r}"


def _check_settings(
    in_nodes: int, out_nodes: int, adjacency: Tensor | None, trainable: bool | str
) -> None:
    if in_nodes < 1:
        raise ValueError(f"in_nodes must be at least 1, got {in_nodes}")
    if out_nodes < in_nodes:
        raise ValueError(f"out_nodes must be at least in_nodes={in_nodes}, got {out_nodes}")
    check_entries(out_nodes, in_nodes)
    if adjacency is not None and tuple(adjacency.shape) != (in_nodes, in_nodes):
        raise ValueError(
            f"adjacency must be ({in_nodes}, {in_nodes}), got {tuple(adjacency.shape)}"
        )
    if trainable not in (True, False, "extra"):
        raise ValueError(f"trainable must be True, False or 'extra', got {trainable!r}")


def _checked_layout(
    layout: tuple[Shape, Shape] | None, in_nodes: int, out_nodes: int
) -> tuple[Shape, Shape] | None:
    if layout is None:
        return None
    coarse, fine = (tuple(shape) for shape in layout)
    if math.prod(coarse) != in_nodes or math.prod(fine) != out_nodes:
        raise ValueError(
            f"layout must have {in_nodes} and {out_nodes} cells, got the grids {coarse} and {fine}"
        )
    if fine[0] < coarse[0] or fine[1] < coarse[1]:
        raise ValueError(f"layout must not shrink a side, got the grids {coarse} and {fine}")
    return coarse, fine


def _initial_rows(
    init: str | Tensor, in_nodes: int, out_nodes: int, layout: tuple[Shape, Shape] | None
) -> Tensor:
    if isinstance(init, Tensor):
        if tuple(init.shape) != (out_nodes, in_nodes):
            raise ValueError(f"init must be ({out_nodes}, {in_nodes}), got {tuple(init.shape)}")
        # Integers take no gradients.
        exact = init.is_floating_point()
        dtype = init.dtype if exact else torch.promote_types(init.dtype, torch.get_default_dtype())
        return init.detach().to(dtype, copy=True)
    if init == "softmax":
        extra = torch.rand(out_nodes - in_nodes, in_nodes).softmax(1)
        return torch.cat([torch.eye(in_nodes), extra])
    if init not in ("nearest", "linear"):
        raise ValueError(f"init must be 'softmax', 'nearest', 'linear' or a tensor, got {init!r}")
    if layout is None:
        raise ValueError(f"init={init!r} needs layout=((h, w), (H, W)); or use from_grids")
    coarse, fine = layout
    axes = [_axis(*sizes, init) for sizes in zip(coarse, fine, strict=True)]
    return torch.kron(*axes)[_fine_order(coarse, fine)]


def _axis(coarse: int, fine: int, mode: Mode) -> Tensor:
    """Interpolate along one axis: (fine, coarse)."""
    position = torch.arange(fine) * coarse
    before = position // fine
    if mode == "nearest":
        return functional.one_hot(before, coarse).float()
    if fine % coarse:
        raise ValueError(
            f"init='linear' needs a multiple of {coarse} cells, got {fine}; 'nearest' takes any"
        )
    after = (before + 1).clamp(max=coarse - 1)
    share = ((position % fine).float() / fine)[:, None]
    one_hot = functional.one_hot
    return (1 - share) * one_hot(before, coarse) + share * one_hot(after, coarse)


def _fine_order(coarse: Shape, fine: Shape) -> Tensor:
    """Order the fine cells: first each coarse cell's own, then the others, row by row."""
    rows, columns = (
        # The first fine cell that "nearest" fills from each coarse one.
        -(-torch.arange(small) * large // small)
        for small, large in zip(coarse, fine, strict=True)
    )
    own = (rows[:, None] * fine[1] + columns).flatten()
    others = torch.ones(math.prod(fine), dtype=torch.bool).index_fill(0, own, False)
    return torch.cat([own, others.nonzero().flatten()])
