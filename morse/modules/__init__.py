"""Layers that a Dot may be built of, each from its own paper; torch only."""

from morse.modules.odconv import ODConv2d, linear_temperature, set_temperature

__all__ = ["ODConv2d", "linear_temperature", "set_temperature"]
