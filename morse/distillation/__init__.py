"""Losses that teach one network the features of another, each from its own paper; torch only."""

from morse.distillation.af_dcd import AfDCDLoss
from morse.distillation.norm import NORMLoss
from morse.distillation.norm_transform import NORMTransform

__all__ = ["AfDCDLoss", "NORMLoss", "NORMTransform"]
