"""Graph-node index transform (GIT): a learned one-to-one placement of nodes on grid cells.

Source: Cai, Kang, Yao and Chen, "Ske2Grid: Skeleton-to-Grid Representation Learning for Action
Recognition", ICML 2023 (arXiv 2308.07571), and its code.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from morse.modules.node_matrix import multiply
from morse.modules.ske2grid_matching import Solver, match_nodes

# A matrix of a larger grid would outweigh the network that it serves.
MAX_ENTRIES = 2**20


class GraphNodeIndexTransform(nn.Module):
    """Place nodes on cells: (B, nodes, C) -> (B, cells, C), by a matching of scores M.

    `scores` (cells, nodes) holds M. Cells choose in turn, each its best node that is still free,
    so that a square M always gives a permutation. With more cells than nodes, further cells take
    their best node, which repeats; with fewer, nodes are left out. While training, the gradient
    of the assignment is that of M (straight through, without softmax).

    The matching runs on the CPU at each call, which waits for the device.

    Args:
        num_cells: Cells of the grid, at least 1.
        num_nodes: Nodes; as many by default.
        solver: "greedy" is the authors' rule; "hungarian" gives the largest sum of scores, and is
            slow for more than about 100 nodes.
        init: "uniform" draws the scores from [0, 1); a permutation, each cell's node, gives
            0.5 * onehot + 0.4 * uniform, from which either solver returns just that.
        trainable: Whether `scores` take gradients.

    Raises:
        ValueError: If an argument is out of its range, or `init` has a node twice.

    Example:
        >>> import torch
        >>> from morse.modules import GraphNodeIndexTransform
        >>> git = GraphNodeIndexTransform(3, init=[2, 0, 1])
        >>> x = torch.tensor([[[10.0], [11.0], [12.0]]])
        >>> git(x).flatten().tolist()
        [12.0, 10.0, 11.0]
        >>> torch.equal(git.inverse(git(x)), x)
        True
    """

    def __init__(
        self,
        num_cells: int,
        num_nodes: int | None = None,
        *,
        solver: Solver = "greedy",
        init: Literal["uniform"] | Sequence[int] | Tensor = "uniform",
        trainable: bool = True,
    ) -> None:
        """Create the scores."""
        super().__init__()
        num_nodes = num_cells if num_nodes is None else num_nodes
        for name, size in (("num_cells", num_cells), ("num_nodes", num_nodes)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        check_entries(num_cells, num_nodes)
        if solver not in ("greedy", "hungarian"):
            raise ValueError(f"solver must be 'greedy' or 'hungarian', got {solver!r}")
        self.num_cells, self.num_nodes, self.solver = num_cells, num_nodes, solver
        scores = torch.rand(num_cells, num_nodes)
        if not isinstance(init, str):
            nodes = _checked_permutation(init, num_cells, num_nodes)
            scores = 0.5 * functional.one_hot(nodes, num_nodes).to(scores) + 0.4 * scores
        elif init != "uniform":
            raise ValueError(f"init must be 'uniform' or a permutation, got {init!r}")
        self.scores = nn.Parameter(scores, requires_grad=trainable)

    def permutation(self) -> Tensor:
        """Return each cell's node, (cells,), of type long."""
        return match_nodes(self.scores.detach(), self.solver)

    def assignment(self) -> Tensor:
        """Return the one-hot matrix (cells, nodes), with the gradient of `scores` in training."""
        chosen = functional.one_hot(self.permutation(), self.num_nodes).to(self.scores.dtype)
        return chosen + self._straight_through() if self.training else chosen

    def forward(self, x: Tensor) -> Tensor:
        """Place nodes, to the bit: (B, nodes, C) -> (B, cells, C); ValueError for others."""
        check_nodes(x, self.num_nodes)
        placed = x.index_select(1, self.permutation())
        return placed + multiply(self._straight_through(), x) if self.training else placed

    def inverse(self, x: Tensor) -> Tensor:
        """Undo `forward`, to the bit: (B, cells, C) -> (B, nodes, C).

        ValueError unless there are as many cells as nodes, and x has as many.
        """
        if self.num_cells != self.num_nodes:
            raise ValueError(
                f"inverse needs as many cells as nodes, got num_cells={self.num_cells} and "
                f"num_nodes={self.num_nodes}"
            )
        check_nodes(x, self.num_cells)
        nodes = x.index_select(1, self.permutation().argsort())
        return nodes + multiply(self._straight_through().t(), x) if self.training else nodes

    def _straight_through(self) -> Tensor:
        """Zeros that carry the gradient, (cells, nodes)."""
        return self.scores - self.scores.detach()

    def extra_repr(self) -> str:
        """Name the sizes."""
        return f"{self.num_cells}, {self.num_nodes}, solver={self.solver!r}"


def check_nodes(x: Tensor, nodes: int) -> None:
    """Raise ValueError unless x is (B, nodes, C)."""
    if x.dim() != 3 or x.shape[1] != nodes:
        raise ValueError(f"x must be (B, {nodes}, C), got {tuple(x.shape)}")


def check_entries(rows: int, columns: int) -> None:
    """Raise ValueError if a matrix of this size is too large to be learned well."""
    if rows * columns > MAX_ENTRIES:
        raise ValueError(
            f"a matrix of {rows} x {columns} has more than {MAX_ENTRIES} entries; use smaller "
            "grids, such as those of tokens"
        )


def _checked_permutation(init: Sequence[int] | Tensor, cells: int, nodes: int) -> Tensor:
    order = torch.as_tensor(init, device="cpu")  # the checks would each wait for another
    if order.is_floating_point() or tuple(order.shape) != (cells,):
        raise ValueError(
            f"init must name a node for each of {cells} cells, got {tuple(order.shape)} of "
            f"{order.dtype}"
        )
    order = order.long()
    if order.min() < 0 or order.max() >= nodes:
        raise ValueError(
            f"init must name nodes 0 to {nodes - 1}, got {order.min()} to {order.max()}"
        )
    if len(order.unique()) < cells:
        raise ValueError(f"init must be a permutation, but has a node twice: {order.tolist()}")
    return order
