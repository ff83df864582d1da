"""Losses that teach one network the features of another, each from its own paper; torch only."""

from morse.distillation.af_dcd import AfDCDLoss, AfDCDOutput
from morse.distillation.cross_attention import CrossAttentionProjector
from morse.distillation.dual_view import DualViewMimicking
from morse.distillation.norm import CIFAR_STAGES, IMAGENET_STAGES, NORMLoss, norm_weight
from morse.distillation.norm_transform import NORMTransform
from morse.distillation.scale_kd import ScaleKDLoss, ScaleKDOutput, TapConfig
from morse.distillation.teacher_perception import TeacherParameterPerception

__all__ = [
    "CIFAR_STAGES",
    "IMAGENET_STAGES",
    "AfDCDLoss",
    "AfDCDOutput",
    "CrossAttentionProjector",
    "DualViewMimicking",
    "NORMLoss",
    "NORMTransform",
    "ScaleKDLoss",
    "ScaleKDOutput",
    "TapConfig",
    "TeacherParameterPerception",
    "norm_weight",
]
