"""Losses that teach one network the features of another, each from its own paper; torch only."""

from morse.distillation.af_dcd import AfDCDLoss
from morse.distillation.cross_attention import CrossAttentionProjector
from morse.distillation.dual_view import DualViewMimicking
from morse.distillation.norm import NORMLoss
from morse.distillation.norm_transform import NORMTransform
from morse.distillation.scale_kd import ScaleKDLoss, ScaleKDOutput, TapConfig
from morse.distillation.teacher_perception import TeacherParameterPerception

__all__ = [
    "AfDCDLoss",
    "CrossAttentionProjector",
    "DualViewMimicking",
    "NORMLoss",
    "NORMTransform",
    "ScaleKDLoss",
    "ScaleKDOutput",
    "TapConfig",
    "TeacherParameterPerception",
]
