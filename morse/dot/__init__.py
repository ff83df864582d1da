"""Dot: a fast network made of Dash's own frozen layers at low resolution, LoRA and extra blocks."""

from morse.dot.model import MorseDot

__all__ = ["MorseDot"]
