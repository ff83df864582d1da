"""Ske2Grid: skeletons (graphs) as full grids, which grow while training.

Source: Cai, Kang, Yao and Chen, "Ske2Grid: Skeleton-to-Grid Representation Learning for Action
Recognition", ICML 2023 (arXiv 2308.07571), and its code. A stage interpolates nodes to as many as
the grid has cells (UPT) and places them (GIT); progressive learning (PLS) adds stages.

Shapes: B samples, C channels, J joints, a grid of H x W cells, numbered row by row.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from morse.modules.node_matrix import checked_grid
from morse.modules.ske2grid_layout import SkeletonToGrid, check_increase
from morse.modules.ske2grid_upsampling import Shape

# Each joint and those it is joined with, in the authors' directions: 0 nose, 1-2 eyes, 3-4 ears,
# 5-6 shoulders, 7-8 elbows, 9-10 wrists, 11-12 hips, 13-14 knees, 15-16 ankles.
COCO_EDGES = (
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (7, 5), (8, 6),
    (9, 7), (10, 8), (1, 2), (1, 0), (2, 0), (3, 1), (4, 2), (3, 5), (4, 6),
)  # fmt: skip


def coco_adjacency() -> Tensor:
    """Return G (17, 17) of COCO's joints: the identity and a 1 for each edge, one direction."""
    adjacency = torch.eye(17)
    adjacency[tuple(zip(*COCO_EDGES, strict=True))] = 1
    return adjacency


@dataclass(frozen=True)
class StageSpec:
    """A stage of progressive learning.

    Attributes:
        grid_shape: Height and width of its grid.
        steps: Optimizer steps that it lasts, at least 1.
        lr: Its learning rate, above 0.
    """

    grid_shape: Shape
    steps: int
    lr: float

    def __post_init__(self) -> None:
        """Raise ValueError if a field is out of its range."""
        object.__setattr__(self, "grid_shape", checked_grid(self.grid_shape))
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be finite and above 0, got {self.lr}")


class ProgressiveSchedule:
    """Progressive learning (PLS): train on a grid, grow it, freeze what placed nodes before.

    Args:
        stages: Grids in increasing size, each with its steps and learning rate.

    Raises:
        TypeError: If a stage is not a `StageSpec`.
        ValueError: If there is none, or grids do not increase.

    Example:
        >>> from morse.modules import ProgressiveSchedule, SkeletonToGrid, StageSpec
        >>> stages = [StageSpec((5, 5), 100, lr=0.1), StageSpec((6, 6), 50, lr=0.1)]
        >>> schedule = ProgressiveSchedule(stages)
        >>> schedule.stage(99), schedule.stage(100)
        (0, 1)
        >>> model = schedule.expand(SkeletonToGrid(17, [(5, 5)]))
        >>> [name for name, _ in schedule.trainable(model)]
        ['stages.1.upt.weight', 'stages.1.git.scores']
    """

    def __init__(self, stages: Sequence[StageSpec]) -> None:
        """Keep the stages."""
        self.stages = list(stages)
        if not self.stages:
            raise ValueError("stages must have at least one StageSpec, got none")
        for spec in self.stages:
            if not isinstance(spec, StageSpec):
                raise TypeError(f"stages must be of StageSpec, got {type(spec).__name__}")
        for old, new in zip(self.stages, self.stages[1:], strict=False):
            check_increase(old.grid_shape, new.grid_shape, nested=False)

    def stage(self, step: int) -> int:
        """Return the stage of an optimizer step, from 0; steps beyond the end are in the last.

        ValueError if `step` is below 0.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        for index, spec in enumerate(self.stages[:-1]):
            if step < spec.steps:
                return index
            step -= spec.steps
        return len(self.stages) - 1

    def expand(self, model: nn.Module) -> nn.Module:
        """Copy `model` with one more stage; earlier stages no longer take gradients.

        Args:
            model: A `SkeletonToGrid` or a module that has one. All else in it is copied to the
                bit, and may run on the larger grid if it is convolutional.

        Raises:
            ValueError: If `model` has none or several, other grids than this schedule's first
                ones, or the last stage already.
        """
        grids = _layout_of(model).stages
        shapes = [stage.grid_shape for stage in grids]
        if shapes != [spec.grid_shape for spec in self.stages[: len(shapes)]]:
            raise ValueError(f"model's grids {shapes} are not the first of this schedule's")
        if len(shapes) == len(self.stages):
            raise ValueError(f"model has all {len(shapes)} stages of this schedule already")
        model = copy.deepcopy(model)
        _layout_of(model).append_stage(self.stages[len(shapes)].grid_shape)
        return model

    def trainable(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Name the parameters of `model` that take gradients, for the stage's optimizer."""
        return [named for named in model.named_parameters() if named[1].requires_grad]


def _layout_of(model: nn.Module) -> SkeletonToGrid:
    found = [module for module in model.modules() if isinstance(module, SkeletonToGrid)]
    if len(found) != 1:
        raise ValueError(f"model must have one SkeletonToGrid, got {len(found)}")
    return found[0]
