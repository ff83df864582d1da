"""Layers that a Dot may be built of, each from its own paper; torch only."""

from morse.modules.gridconv import (
    GridAttention,
    GridConv2d,
    SemanticGridTransform,
    grid_temperature,
)
from morse.modules.odconv import ODConv2d, linear_temperature, set_temperature
from morse.modules.ske2grid import (
    GraphNodeIndexTransform,
    GridStage,
    ProgressiveSchedule,
    SkeletonToGrid,
    StageSpec,
    UpsamplingTransform,
    coco_adjacency,
)

__all__ = ["ODConv2d", "linear_temperature", "set_temperature"]
__all__ += ["GridAttention", "GridConv2d", "SemanticGridTransform", "grid_temperature"]
__all__ += ["GraphNodeIndexTransform", "GridStage", "ProgressiveSchedule", "SkeletonToGrid"]
__all__ += ["StageSpec", "UpsamplingTransform", "coco_adjacency"]
