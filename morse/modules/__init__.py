"""Layers that a Dot may be built of, each from its own paper; torch only."""

from morse.modules.dnr import DynamicNormRelay
from morse.modules.dnr_cell import RelayCell, RelayState
from morse.modules.dnr_clips import CrossTemporalNorm
from morse.modules.gridconv import GridConv2d
from morse.modules.gridconv_attention import GridAttention, grid_temperature
from morse.modules.gridconv_transform import SemanticGridTransform
from morse.modules.kernel_warehouse import Warehouse
from morse.modules.kernel_warehouse_layers import (
    BuildOrderError,
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
)
from morse.modules.kernel_warehouse_plan import WarehousePlan
from morse.modules.odconv import ODConv2d
from morse.modules.ske2grid import ProgressiveSchedule, StageSpec, coco_adjacency
from morse.modules.ske2grid_index import GraphNodeIndexTransform
from morse.modules.ske2grid_layout import GridStage, SkeletonToGrid
from morse.modules.ske2grid_upsampling import UpsamplingTransform
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
