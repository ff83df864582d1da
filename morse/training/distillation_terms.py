"""What can be asked of Dot's features in training, by name: the three losses and their controls.

None of these has been shown to make a Dot better; the controls are there to find out.

- "norm": NORM (Liu et al. 2023). A linear transform on the trunk feature is trained along and
  folded into Dot at the end; each of its N segments is held to Dash's feature.
  "norm_transform_only" has the transform without the loss.
- "af_dcd": Af-DCD (Fan et al. 2023) on the output of Dot's last block. "af_dcd_feature" and
  "af_dcd_contrast" have one of its two parts.
- "scale_kd": ScaleKD's (Fan et al. 2024) projectors and dual-view mimicking on the middle and the
  trunk feature. "scale_kd_one_view" leaves the view without the mean out. "scale_kd_tpp" sends the
  middle feature through Dash's last blocks; only for transformers.
- "feature_mse": the plain squared error of the trunk feature, one to one; the control of all three.

All are relative to the scale of Dash's features and then multiplied by the (constant) error of
Dot's output, which changes with its training and with the choice of pairs by orders of magnitude.
Weights are therefore shares of that error. They stay as they are; the staircase of NORM's authors
(`morse.distillation.norm.norm_weight`) is not applied.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from morse.distillation import (
    AfDCDLoss,
    NORMLoss,
    ScaleKDLoss,
    TapConfig,
    TeacherParameterPerception,
)

if TYPE_CHECKING:
    from morse.training.feature_taps import BlockCall, StudentFeatures, TeacherFeatures

DistillName = Literal[
    "norm",
    "af_dcd",
    "scale_kd",
    "norm_transform_only",
    "af_dcd_feature",
    "af_dcd_contrast",
    "scale_kd_one_view",
    "scale_kd_tpp",
    "feature_mse",
]
TRANSFORMS = ("norm", "norm_transform_only")
SEGMENTS = 8  # N of the authors' scripts


def check_distill(names: tuple[str, ...], weights: tuple[float, ...]) -> None:
    """Raise `ValueError` unless all names are known and fit each other and the weights."""
    known = get_args(DistillName)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"distill is {names}, but {unknown} are unknown; choose from {known}")
    families = [name for name in names if name in TRANSFORMS]
    if len(set(names)) < len(names) or len(families) > 1:
        raise ValueError(f"distill is {names}; give each once, and of {TRANSFORMS} one")
    fits = len(weights) in (1, len(names)) and all(0 <= w < math.inf for w in weights)
    if not fits:
        raise ValueError(
            f"distill_weight is {weights}; it must be one number of at least 0, or one for each of "
            f"distill={names}"
        )


def shrink(feature: Tensor, like: Tensor) -> Tensor:
    """Average a feature of Dash (B, C, H, W) over squares, to the size of `like` (B, C, h, w).

    Dot's grid is filled up at its end, then halved m times: its cell k covers the positions from
    k * 2^m on, of which the last cell has fewer. Rounding the ratio of sizes up to a power of two
    gives 2^m, or what comes to the same where a side has a single cell.
    """
    ratios = (-(-n // small) for n, small in zip(feature.shape[2:], like.shape[2:], strict=True))
    sides = [1 << (ratio - 1).bit_length() for ratio in ratios]
    return functional.avg_pool2d(feature, sides, ceil_mode=True)


def _variance(feature: Tensor) -> Tensor:
    return feature.var().clamp(min=1e-12)


class NORMTerm(nn.Module):
    """NORM's loss on what the transform made of the trunk feature; no parameters."""

    def __init__(self) -> None:
        """Create the loss."""
        super().__init__()
        self.norm = NORMLoss(SEGMENTS, pool="none")

    def forward(
        self, student: "StudentFeatures", teacher: "TeacherFeatures", rng: torch.Generator
    ) -> Tensor:
        """Give the sum of the segments' squared errors, in variances of Dash's feature."""
        goal = shrink(teacher.last, student.trunk)
        return self.norm(student.expanded.float(), goal) / _variance(goal)


class FeatureMSETerm(nn.Module):
    """The squared error of the trunk feature itself; no parameters."""

    def forward(
        self, student: "StudentFeatures", teacher: "TeacherFeatures", rng: torch.Generator
    ) -> Tensor:
        """Give it in variances of Dash's feature."""
        goal = shrink(teacher.last, student.trunk)
        return functional.mse_loss(student.trunk.float(), goal) / _variance(goal)


class AfDCDTerm(nn.Module):
    """Af-DCD on the output of Dot's last block, which has the resolution of Dash's feature.

    Args:
        student: Features of any sample, for their shapes.
        teacher: The same of Dash.
        feature: Weight of the squared error.
        contrast: Weight of the contrast.
    """

    def __init__(
        self,
        student: "StudentFeatures",
        teacher: "TeacherFeatures",
        feature: float = 1.0,
        contrast: float = 0.1,
    ) -> None:
        """Choose sizes that divide the features, and create the loss."""
        super().__init__()
        channels, height, width = teacher.last.shape[1:]
        side = min(height, width)
        pool = 4 if side >= 32 else 2 if side >= 16 else 0
        # Groups of four channels or more, at most the paper's 16: memory grows as their square.
        groups = range(min(16, channels // 4), 1, -1)
        self.af_dcd = AfDCDLoss(
            student.fine.shape[1],
            channels,
            channel_groups=next((g for g in groups if channels % g == 0), channels),
            pool_size=pool,
            patch_size=tuple(math.gcd(each // max(pool, 1), 4) for each in (height, width)),
            fd_weight=feature,
            ctr_weight=contrast,
            reduction="mean",
            normalize="teacher_rms",
        )

    def forward(
        self, student: "StudentFeatures", teacher: "TeacherFeatures", rng: torch.Generator
    ) -> Tensor:
        """Give the weighted sum of both parts; the mask is drawn from `rng`."""
        height, width = teacher.last.shape[2:]
        fine = student.fine[..., :height, :width]  # Dot fills transformers' sizes up
        return self.af_dcd(fine.float(), teacher.last, rng=rng).loss


class ScaleKDTerm(nn.Module):
    """ScaleKD on the middle and the trunk feature, projected to Dash's full resolution.

    Args:
        student: Features of any sample, for their shapes.
        teacher: The same of Dash.
        frequency_weight: Of the view without the mean; that of the other is 1.
        tpp: Whether the middle tokens go through Dash's last blocks.

    Raises:
        ValueError: If they are to, but Dash's last layers need more than tokens.
    """

    def __init__(
        self,
        student: "StudentFeatures",
        teacher: "TeacherFeatures",
        frequency_weight: float = 0.75,
        tpp: bool = False,
    ) -> None:
        """Create the projectors."""
        super().__init__()
        self.tpp = tpp
        if tpp:
            _check_stage(teacher)
        shape = (teacher.final if tpp else teacher.last).shape
        h, w = student.trunk.shape[2:]

        def tap(feature: Tensor) -> TapConfig:
            tokens = feature.ndim == 3
            return TapConfig(
                feature.shape[2 if tokens else 1],
                shape[1],
                tuple(shape[2:]),
                (h, w) if tokens else tuple(feature.shape[2:]),
                num_heads=math.gcd(8, shape[1]),
                norm="group",  # a batch mixes timesteps
                spatial_weight=1.0,
                frequency_weight=frequency_weight,
                reduction="mean",
            )

        stage = TeacherParameterPerception(_last_blocks) if tpp else None
        self.scale_kd = ScaleKDLoss(tap(student.mid), tap(student.trunk), stage)

    def forward(
        self, student: "StudentFeatures", teacher: "TeacherFeatures", rng: torch.Generator
    ) -> Tensor:
        """Give the sum of both views of both features."""
        mid, trunk = student.mid.float(), student.trunk.float()
        if self.tpp:
            return self.scale_kd(mid, trunk, teacher.final, calls=teacher.calls).loss
        return self.scale_kd(mid, trunk, teacher.last).loss


def _last_blocks(tokens: Tensor, calls: "tuple[BlockCall, ...]") -> Tensor:
    for block, args, kwargs in calls:
        tokens = block(tokens, *args, **kwargs)
    return tokens


def _check_stage(teacher: "TeacherFeatures") -> None:
    if teacher.final is None:
        raise ValueError(
            "distill has 'scale_kd_tpp', but this Dash is a UNet: its last layers take skip "
            "connections of its encoder, which give the answer away; use 'scale_kd'."
        )
    kwargs = [call.kwargs for call in teacher.calls]
    if not kwargs or any("temb" in each for each in kwargs):
        raise ValueError(
            "distill has 'scale_kd_tpp', but this Dash has a single block or a text stream that "
            "its blocks change, in which its own picture is contained; use 'scale_kd'."
        )


Build = Callable[["StudentFeatures", "TeacherFeatures"], nn.Module]
TERMS: dict[str, Build] = {
    "norm": lambda student, teacher: NORMTerm(),
    "af_dcd": AfDCDTerm,
    "scale_kd": ScaleKDTerm,
    "af_dcd_feature": lambda s, t: AfDCDTerm(s, t, contrast=0.0),
    "af_dcd_contrast": lambda s, t: AfDCDTerm(s, t, feature=0.0),
    "scale_kd_one_view": lambda s, t: ScaleKDTerm(s, t, frequency_weight=0.0),
    "scale_kd_tpp": lambda s, t: ScaleKDTerm(s, t, tpp=True),
    "feature_mse": lambda student, teacher: FeatureMSETerm(),
}
