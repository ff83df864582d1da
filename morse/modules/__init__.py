"""Layers that a Dot may be built of, each from its own paper; torch only."""

from morse.modules.dnr import CrossTemporalNorm, DynamicNormRelay, RelayCell, RelayState
from morse.modules.gridconv import (
    GridAttention,
    GridConv2d,
    SemanticGridTransform,
    grid_temperature,
)
from morse.modules.kernel_warehouse import (
    BuildOrderError,
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    Warehouse,
    WarehousePlan,
)
from morse.modules.odconv import ODConv2d
from morse.modules.ske2grid import (
    GraphNodeIndexTransform,
    GridStage,
    ProgressiveSchedule,
    SkeletonToGrid,
    StageSpec,
    UpsamplingTransform,
    coco_adjacency,
)
from morse.modules.temperature import linear_temperature, set_temperature

__all__ = [
    "BuildOrderError",
    "CrossTemporalNorm",
    "DynamicNormRelay",
    "GraphNodeIndexTransform",
    "GridAttention",
    "GridConv2d",
    "GridStage",
    "KWConv1d",
    "KWConv2d",
    "KWConv3d",
    "KWLinear",
    "ODConv2d",
    "ProgressiveSchedule",
    "RelayCell",
    "RelayState",
    "SemanticGridTransform",
    "SkeletonToGrid",
    "StageSpec",
    "UpsamplingTransform",
    "Warehouse",
    "WarehousePlan",
    "coco_adjacency",
    "grid_temperature",
    "linear_temperature",
    "set_temperature",
]
