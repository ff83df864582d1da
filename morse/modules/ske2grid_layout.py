"""Ske2Grid's layout: skeletons as full grids, through one or more stages of UPT and GIT.

Source: Cai, Kang, Yao and Chen, "Ske2Grid: Skeleton-to-Grid Representation Learning for Action
Recognition", ICML 2023 (arXiv 2308.07571), and its code.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from morse.modules.node_matrix import checked_grid, multiply
from morse.modules.ske2grid_index import GraphNodeIndexTransform, check_nodes
from morse.modules.ske2grid_matching import Solver
from morse.modules.ske2grid_upsampling import Shape, UpsamplingTransform


class GridStage(nn.Module):
    """One UPT and one GIT: (B, n, C) -> (B, H*W, C).

    Args:
        upt: From n nodes to H * W.
        git: From those to as many cells.
        grid_shape: Height H and width W.

    Raises:
        ValueError: If the numbers of nodes and cells differ.
    """

    def __init__(
        self, upt: UpsamplingTransform, git: GraphNodeIndexTransform, grid_shape: Shape
    ) -> None:
        """Take both transforms."""
        super().__init__()
        self.grid_shape = checked_grid(grid_shape)
        cells = math.prod(self.grid_shape)
        if not cells == upt.out_nodes == git.num_nodes == git.num_cells:
            raise ValueError(
                f"grid_shape={self.grid_shape} has {cells} cells, which must be upt.out_nodes="
                f"{upt.out_nodes}, git.num_nodes={git.num_nodes} and git.num_cells={git.num_cells}"
            )
        self.upt, self.git = upt, git

    def forward(self, x: Tensor) -> Tensor:
        """Interpolate and place nodes: (B, n, C) -> (B, H*W, C)."""
        return self.git(self.upt(x))

    def inverse(self, cells: Tensor) -> Tensor:
        """Read the nodes back: (B, H*W, C) -> (B, n, C).

        Takes the nodes themselves where they are kept (`trainable="extra"`, no adjacency), else
        the least-squares solution by UPT's `left_inverse`, which raises below full rank.
        """
        nodes = self.git.inverse(cells)
        if self.upt.keeps_nodes:
            return nodes[:, : self.upt.in_nodes]
        return multiply(self.upt.left_inverse(), nodes)


class SkeletonToGrid(nn.Module):
    """Lay a skeleton out on a full grid through one or more stages: (B, J, C) -> (B, C, H, W).

    Like the authors' network, only the last stage is trained: earlier ones take no gradients.

    Args:
        num_nodes: Joints J.
        grid_shapes: Each stage's height and width; cells must increase.
        adjacency: G, (J, J), for the first stage, such as `coco_adjacency()`.
        nested: Whether a new stage begins with the old grid as its top left block and the old
            edge repeated beyond it. The authors' begins as a random permutation.
        trainable: As in `UpsamplingTransform`; "extra" without adjacency makes `inverse` exact.
        solver: As in `GraphNodeIndexTransform`.

    Raises:
        ValueError: If grids do not increase, or an argument is out of its range.

    Example:
        >>> import torch
        >>> from morse.modules import SkeletonToGrid
        >>> layout = SkeletonToGrid(17, [(5, 5)], trainable="extra")
        >>> pose = torch.randn(4, 17, 2)
        >>> layout(pose).shape
        torch.Size([4, 2, 5, 5])
        >>> torch.allclose(layout.inverse(layout(pose)), pose)
        True
    """

    def __init__(
        self,
        num_nodes: int,
        grid_shapes: Sequence[Shape],
        adjacency: Tensor | None = None,
        nested: bool = False,
        *,
        trainable: bool | str = True,
        solver: Solver = "greedy",
    ) -> None:
        """Create the stages."""
        super().__init__()
        if not grid_shapes:
            raise ValueError("grid_shapes must have at least one (H, W), got none")
        self.num_nodes, self.nested = num_nodes, nested
        self.trainable, self.solver = trainable, solver
        self.stages = nn.ModuleList()
        for shape in grid_shapes:
            self.append_stage(shape, None if len(self.stages) else adjacency)

    @property
    def grid_shape(self) -> Shape:
        """Height and width of the last grid."""
        return self.stages[-1].grid_shape

    def append_stage(self, grid_shape: Shape, adjacency: Tensor | None = None) -> None:
        """Freeze all stages and add one; ValueError unless the grid is larger than the last."""
        shape = checked_grid(grid_shape)
        cells, nodes, init, order = math.prod(shape), self.num_nodes, "softmax", "uniform"
        if not len(self.stages) and cells < nodes:
            raise ValueError(
                f"grid_shapes begins with {shape}, whose {cells} cells are fewer than num_nodes="
                f"{nodes}; begin with a larger grid"
            )
        if len(self.stages):
            old = self.grid_shape
            nodes = math.prod(old)
            check_increase(old, shape, self.nested)
            if self.nested:
                init, order = _nested(old, shape)
        options = {"trainable": self.trainable, "adjacency": adjacency}
        upt = UpsamplingTransform(nodes, cells, init=init, **options)
        trainable = bool(self.trainable)
        git = GraphNodeIndexTransform(cells, solver=self.solver, init=order, trainable=trainable)
        stage = GridStage(upt, git, shape).train(self.training)
        if len(self.stages):
            stage.to(self.stages[-1].git.scores)
        for parameter in self.stages.parameters():
            # An optimizer steps with what gradient there is.
            parameter.requires_grad_(False).grad = None
        self.stages.append(stage)

    def forward(self, x: Tensor) -> Tensor:
        """Lay joints out: (B, J, C) -> (B, C, H, W); ValueError if J is another."""
        check_nodes(x, self.num_nodes)
        for stage in self.stages:
            x = stage(x)
        return x.transpose(1, 2).unflatten(2, self.grid_shape)

    def inverse(self, grid: Tensor) -> Tensor:
        """Read the joints back, stage by stage: (B, C, H, W) -> (B, J, C).

        ValueError if the grid's size is another, or a stage cannot be read back.
        """
        if grid.dim() != 4 or tuple(grid.shape[2:]) != self.grid_shape:
            wanted = "(B, C, {}, {})".format(*self.grid_shape)
            raise ValueError(f"grid must be {wanted}, got {tuple(grid.shape)}")
        x = grid.flatten(2).transpose(1, 2)
        for stage in reversed(self.stages):
            x = stage.inverse(x)
        return x


def check_increase(old: Shape, new: Shape, nested: bool) -> None:
    """Raise ValueError unless `new` is larger, or with `nested` as large on both sides too."""
    if math.prod(new) <= math.prod(old):
        raise ValueError(f"grids must increase, got {new} after {old}")
    if nested and (new[0] < old[0] or new[1] < old[1]):
        raise ValueError(f"nested=True needs both sides as large as before, got {new} after {old}")


def _nested(old: Shape, new: Shape) -> tuple[Tensor, Tensor]:
    """Make P, old cells first and then copies of the nearest, and the order that nests them."""
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in new), indexing="ij")
    inside = ((rows < old[0]) & (columns < old[1])).flatten()
    nearest = rows.clamp(max=old[0] - 1) * old[1] + columns.clamp(max=old[1] - 1)
    cells = torch.cat([inside.nonzero(), (~inside).nonzero()]).flatten()
    weight = functional.one_hot(nearest.flatten()[cells], math.prod(old)).float()
    return weight, cells.argsort()
