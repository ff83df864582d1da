"""Semantic grid transform (SGT): a skeleton's joints laid out on a small grid, and read back.

Source: Kang, Liu, Yao, Wang and Wu, "3D Human Pose Lifting with Grid Convolution", AAAI 2023
(arXiv 2302.08760), and its code. `morse.modules.gridconv` has the convolution.

Shapes: B samples, C channels, J nodes (joints), a grid of H x W cells, numbered row by row.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from morse.modules.node_matrix import checked_grid, multiply

Cover = Literal["none", "repair"]

# Human3.6M's joints: 0 pelvis, 1-3 right hip, knee, foot, 4-6 left, 7 spine, 8 thorax, 9 nose,
# 10 head, 11-13 left shoulder, elbow, wrist, 14-16 right. MEAN is the mean of joints 8 and 9.
MEAN = -1
MEAN_NODES = [8, 9]
LAYOUTS = {
    "standard": (
        (7, 7, 7, 7, 7),
        (0, 8, 8, 8, 0),
        (4, 11, 9, 14, 1),
        (5, 12, 9, 15, 2),
        (6, 13, 10, 16, 3),
    ),
    "handcrafted": (
        (7, 7, 7, 7, 7),
        (0, 8, 8, 8, 0),
        (1, 14, MEAN, 11, 4),
        (2, 15, 9, 12, 5),
        (3, 16, 10, 13, 6),
    ),
}


class SemanticGridTransform(nn.Module):
    """Place J nodes on a grid by a binary assignment, A x, and average a grid's copies back.

    The parameter `scores` (HW, J) holds S. Each cell takes the node of its row's largest score, so
    that A is binary with one node a cell. While training, A = onehot - stopgrad(S) + S: the
    gradient of A is that of S (straight through, without softmax or temperature).

    Args:
        num_nodes: Nodes J, at least 1.
        grid_shape: Height H and width W.
        init: "standard" is the authors' prior and "handcrafted" their fixed layout, both for 17
            joints of Human3.6M on 5 x 5 cells. The middle cell of "handcrafted" always holds the
            mean of joints 8 and 9, and `inverse` ignores it. "random" is softmax of uniform noise;
            a LongTensor (H, W) names each cell's node, a float tensor (HW, J) holds the scores.
        learnable: Whether `scores` take gradients.
        cover: "none" may leave nodes without a cell (`coverage` tells), as the authors do, whereas
            "repair" gives each such node the cell that loses least score, out of those whose node
            has another.
        eps: Added to the copies' number in `inverse`, above 0; like its authors', "handcrafted"
            divides by the number alone.

    Raises:
        TypeError: If `init` is neither a name nor a tensor.
        ValueError: If an argument is out of its range, or "repair" has fewer cells than nodes.

    Example:
        >>> import torch
        >>> from morse.modules import SemanticGridTransform
        >>> sgt = SemanticGridTransform(17, (5, 5))
        >>> pose = torch.randn(4, 17, 2)
        >>> sgt(pose).shape
        torch.Size([4, 2, 5, 5])
        >>> torch.allclose(sgt.inverse(sgt(pose)), pose, atol=1e-6)
        True
    """

    mean_rows: Tensor | None

    def __init__(
        self,
        num_nodes: int,
        grid_shape: tuple[int, int],
        *,
        init: Literal["standard", "handcrafted", "random"] | Tensor = "standard",
        learnable: bool = True,
        cover: Cover = "none",
        eps: float = 1e-8,
    ) -> None:
        """Create the scores."""
        super().__init__()
        self.num_nodes, self.grid_shape = num_nodes, checked_grid(grid_shape)
        _check_settings(num_nodes, self.grid_shape, cover, eps)
        self.cover, self.eps = cover, eps
        scores = _initial_scores(init, num_nodes, self.grid_shape)
        self.scores = nn.Parameter(scores, requires_grad=learnable)
        mean_rows = None
        if isinstance(init, str) and init == "handcrafted":
            mean_rows = torch.where(scores == 0.5, scores, 0)
        self.register_buffer("mean_rows", mean_rows, persistent=False)

    def assignment(self, hard: bool = True, *, generator: torch.Generator | None = None) -> Tensor:
        """Return A (HW, J): which node each cell holds, with the gradient of `scores` in training.

        Args:
            hard: False draws a soft sample in its place, softmax of S plus Gumbel noise, as the
                authors' code can in training; its rows are positive and sum to 1.
            generator: For that draw.
        """
        if not hard:
            noise = torch.empty_like(self.scores).exponential_(generator=generator).log()
            return self._with_means((self.scores - noise).softmax(1))
        chosen = functional.one_hot(self._nodes(), self.num_nodes).to(self.scores.dtype)
        if self.training:
            # In this order of sums the value stays binary to the bit.
            chosen = chosen + (self.scores - self.scores.detach())
        return self._with_means(chosen)

    def coverage(self) -> Tensor:
        """Count the cells (J,) that `inverse` reads each node from; 0 where it has none."""
        copies = functional.one_hot(self._nodes(), self.num_nodes).to(self.scores.dtype)
        return self._without_means(copies).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        """Lay nodes out: (B, J, C) -> (B, C, H, W); ValueError if J is another."""
        if x.dim() != 3 or x.shape[1] != self.num_nodes:
            raise ValueError(f"x must be (B, {self.num_nodes}, C), got {tuple(x.shape)}")
        cells = multiply(self.assignment(), x)
        return cells.transpose(1, 2).unflatten(2, self.grid_shape)

    def inverse(self, grid: Tensor) -> Tensor:
        """Average the copies of each node: (B, C, H, W) -> (B, J, C).

        x_j = (A^T y)_j / (sum_i A_ij + eps), which is 0 for a node without a cell. ValueError if
        the grid's size is another.
        """
        if grid.dim() != 4 or tuple(grid.shape[2:]) != self.grid_shape:
            wanted = "(B, C, {}, {})".format(*self.grid_shape)
            raise ValueError(f"grid must be {wanted}, got {tuple(grid.shape)}")
        chosen = self._without_means(self.assignment())
        # In float16 the default eps would be 0.
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        copies = chosen.sum(0)
        copies = copies + self.eps if self.mean_rows is None else copies.clamp(min=self.eps)
        return multiply((chosen / copies).t(), grid.flatten(2).transpose(1, 2))

    def _nodes(self) -> Tensor:
        """Choose each cell's node, (HW,)."""
        scores = self.scores.detach()
        nodes = scores.argmax(1)
        if self.cover == "none":
            return nodes
        cells = torch.arange(len(nodes), device=nodes.device)
        for node in range(self.num_nodes):
            copies = self._without_means(functional.one_hot(nodes, self.num_nodes)).sum(0)
            loss = scores.gather(1, nodes[:, None])[:, 0] - scores[:, node]
            loss = self._without_means(loss.masked_fill(copies[nodes] < 2, math.inf), math.inf)
            # A covered node takes nothing; no branch, so that the loop compiles to one graph.
            taken = (cells == loss.argmin()) & (copies[node] == 0)
            nodes = nodes.masked_fill(taken, node)
        return nodes

    def _with_means(self, chosen: Tensor) -> Tensor:
        if self.mean_rows is None:
            return chosen
        return torch.where(self.mean_rows.any(1, keepdim=True), self.mean_rows, chosen)

    def _without_means(self, rows: Tensor, value: float = 0) -> Tensor:
        """Fill what cells of a mean have in `rows`, (HW, ...), with `value`."""
        if self.mean_rows is None:
            return rows
        means = self.mean_rows.any(1)
        return rows.masked_fill(means.view(-1, *(1,) * (rows.dim() - 1)), value)

    def extra_repr(self) -> str:
        """Name the sizes."""
        return f"{self.num_nodes}, {self.grid_shape}, cover={self.cover!r}"


def _check_settings(num_nodes: int, grid: tuple[int, int], cover: str, eps: float) -> None:
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1, got {num_nodes}")
    if cover not in ("none", "repair"):
        raise ValueError(f"cover must be 'none' or 'repair', got {cover!r}")
    if cover == "repair" and math.prod(grid) < num_nodes:
        raise ValueError(
            f"cover='repair' needs a cell a node, but grid_shape={grid} has fewer cells than "
            f"num_nodes={num_nodes}; enlarge the grid or use cover='none'"
        )
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")


def _initial_scores(init: str | Tensor, num_nodes: int, grid: tuple[int, int]) -> Tensor:
    cells = math.prod(grid)
    if isinstance(init, Tensor):
        return _scores_of_tensor(init, num_nodes, grid)
    if not isinstance(init, str):
        raise TypeError(f"init must be a name or a tensor, got {type(init).__name__}")
    if init == "random":
        return torch.rand(cells, num_nodes).softmax(1)
    if init not in LAYOUTS:
        raise ValueError(f"init must be one of {[*LAYOUTS, 'random']} or a tensor, got {init!r}")
    if num_nodes != 17 or grid != (5, 5):
        raise ValueError(
            f"init={init!r} is a layout of 17 nodes on (5, 5), got num_nodes={num_nodes} and "
            f"grid_shape={grid}; give init='random', a layout (H, W) or scores (HW, J)"
        )
    layout = torch.tensor(LAYOUTS[init]).flatten()
    scores = functional.one_hot(layout.clamp(min=0), num_nodes).float()
    mean = torch.zeros(num_nodes)
    mean[MEAN_NODES] = 0.5
    scores[layout == MEAN] = mean
    return scores


def _scores_of_tensor(init: Tensor, num_nodes: int, grid: tuple[int, int]) -> Tensor:
    if init.is_floating_point():
        if tuple(init.shape) != (math.prod(grid), num_nodes):
            raise ValueError(
                f"init must hold scores ({math.prod(grid)}, {num_nodes}), got {tuple(init.shape)}"
            )
        return init.detach().clone()
    if tuple(init.shape) != grid:
        raise ValueError(f"init must be a layout {grid}, got {tuple(init.shape)}")
    if init.min() < 0 or init.max() >= num_nodes:
        raise ValueError(
            f"init must name nodes 0 to {num_nodes - 1}, got {init.min()} to {init.max()}"
        )
    return functional.one_hot(init.flatten().long(), num_nodes).float()
