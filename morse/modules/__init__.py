"""Layers that a Dot may be built of, each from its own paper; torch only."""

from morse.modules.dnr import CrossTemporalNorm, DynamicNormRelay, RelayCell, RelayState
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
from morse.modules.temperature import linear_temperature, set_temperature

__all__ = [
    "BuildOrderError",
    "CrossTemporalNorm",
    "DynamicNormRelay",
    "KWConv1d",
    "KWConv2d",
    "KWConv3d",
    "KWLinear",
    "ODConv2d",
    "RelayCell",
    "RelayState",
    "Warehouse",
    "WarehousePlan",
    "linear_temperature",
    "set_temperature",
]
