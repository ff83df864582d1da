"""Af-DCD: augmentation-free dense contrastive distillation (for training only).

Most positions of the student's map are masked, a small generator restores the map, and the result
is held to the teacher's: by squared error, and by a contrast inside local patches.

Source: Fan, Li, Liu, Song, Yao, "Augmentation-Free Dense Contrastive Knowledge Distillation for
Efficient Semantic Segmentation", NeurIPS 2023, arXiv 2312.04168.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from morse.distillation.functional import (
    at_least_float32,
    check_contrast,
    check_fits,
    check_groups,
    omni_contrastive_loss,
    require,
)

GeneratorKind = Literal["plain", "enhanced"]
Reduction = Literal["official", "mean"]
Normalize = Literal["teacher_rms"]

# Names in the reference implementation (its spelling) -> names here, replaced in this order.
OFFICIAL_NAMES = {"projetor": "generator", "block_1.0": "hidden1", "block_2.0": "hidden2",
                  "adpator_1": "out1", "adpator_2": "out2"}  # fmt: skip


class EnhancedGenerator(nn.Module):
    """The larger generator: two hidden layers and the mean of two outputs, (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        """Create the four 3x3 convolutions."""
        super().__init__()
        self.hidden1, self.hidden2, self.out1, self.out2 = (_conv3x3(channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Restore masked maps."""
        hidden1 = self.hidden1(x).relu()
        return (self.out1(hidden1) + self.out2(self.hidden2(hidden1).relu())) / 2


class AfDCDOutput(NamedTuple):
    """Scalars `loss` = fd_weight * `feature` + ctr_weight * `contrast`; the map (B, Ct, H, W)."""

    loss: Tensor
    feature: Tensor
    contrast: Tensor
    reconstruction: Tensor


class AfDCDLoss(nn.Module):
    """Augmentation-free dense contrastive distillation (Fan et al. 2023, arXiv 2312.04168).

    Its parameters are trained along with the student; the reference clips their gradients alone, at
    an L2 norm of 15. Similarities depend on the maps' scale: see `temperature` and `normalize`.

    Args:
        student_channels: Channels Cs; a 1x1 convolution aligns them to Ct, none if they are equal.
        teacher_channels: Channels Ct.
        temperature: Divides the contrast's similarities; above 0.
        channel_groups: Number M of the contrast's channel groups, 2 or more; divides Ct.
        pool_size: Kernel and stride of the max-pooling before the contrast; 0 for none.
        patch_size: Height and width of the contrast's patches, in pooled positions.
        mask_ratio: Fraction of positions that a random mask drops, in [0, 1).
        random_mask: Draw masks; otherwise drop the central third of rows and columns.
        generator: "plain" (two 3x3 convolutions) or "enhanced" (four).
        fd_weight: Weight of the squared error, at least 0 (the paper's runs: 1e-6 to 8e-6).
        ctr_weight: Weight of the contrast, at least 0 (the paper's runs: 5e-3 to 4e-2).
        reduction: "official" sums the squared error over channels and positions, and the contrast
            over groups; "mean" averages, so that weights do not depend on sizes.
        normalize: "teacher_rms" first divides both maps by the root mean square of each teacher
            sample (not in the paper).

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from morse.distillation import AfDCDLoss
        >>> loss = AfDCDLoss(6, 8, channel_groups=2, pool_size=0, reduction="mean")
        >>> student, teacher = torch.randn(2, 6, 8, 8), torch.randn(2, 8, 8, 8)
        >>> out = loss(student, teacher, rng=torch.Generator().manual_seed(0))
        >>> bool(out.loss > 0), out.reconstruction.shape
        (True, torch.Size([2, 8, 8, 8]))
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        temperature: float = 0.07,
        channel_groups: int = 16,
        pool_size: int = 4,
        patch_size: tuple[int, int] = (4, 4),
        mask_ratio: float = 0.75,
        random_mask: bool = True,
        generator: GeneratorKind = "plain",
        fd_weight: float = 4e-5,
        ctr_weight: float = 1e-3,
        reduction: Reduction = "official",
        normalize: Normalize | None = None,
    ) -> None:
        """Check the settings and create the layers."""
        super().__init__()
        for name, channels in (("student", student_channels), ("teacher", teacher_channels)):
            require(channels >= 1, f"{name}_channels must be 1 or more, got {channels}.")
        check_contrast(temperature, channel_groups, patch_size, pool_size)
        check_groups(teacher_channels, channel_groups)
        require(0 <= mask_ratio < 1, f"mask_ratio (dropped) must be in [0, 1), got {mask_ratio}.")
        for name, weight in (("fd_weight", fd_weight), ("ctr_weight", ctr_weight)):
            require(0 <= weight < math.inf, f"{name} must be finite, 0 or more, got {weight}.")
        for name, value, allowed in (
            ("generator", generator, get_args(GeneratorKind)),
            ("reduction", reduction, get_args(Reduction)),
            ("normalize", normalize, (None, *get_args(Normalize))),
        ):
            require(value in allowed, f"{name} must be one of {allowed}, got {value!r}.")
        self.channels = (student_channels, teacher_channels)
        self.contrast = {
            "temperature": temperature, "channel_groups": channel_groups,
            "patch_size": patch_size, "pool_size": pool_size,
        }  # fmt: skip
        self.mask_ratio, self.random_mask = mask_ratio, random_mask
        self.fd_weight, self.ctr_weight = fd_weight, ctr_weight
        self.reduction, self.normalize = reduction, normalize
        same = student_channels == teacher_channels
        self.align = nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, 1)
        if generator == "enhanced":
            self.generator = EnhancedGenerator(teacher_channels)
        else:
            layers = (_conv3x3(teacher_channels), nn.ReLU(), _conv3x3(teacher_channels))
            self.generator = nn.Sequential(*layers)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        mask: Tensor | None = None,
        rng: torch.Generator | None = None,
    ) -> AfDCDOutput:
        """Compare two feature maps of the same height and width.

        Args:
            student: Student's map, (B, Cs, H, W).
            teacher: Teacher's map, (B, Ct, H, W); it is detached.
            mask: Positions to keep, (B, 1, H, W): 1 keeps, 0 drops. None makes one (`make_mask`).
            rng: Source of a random mask.

        Returns:
            The weighted loss, its two parts without weights, and the restored map.

        Raises:
            ValueError: If a shape does not fit, or the pooled maps do not split into patches.
        """
        _check_maps(student, teacher, self.channels)
        teacher = teacher.detach()
        if self.normalize:
            rms = at_least_float32(teacher).square().mean((1, 2, 3), keepdim=True).sqrt()
            rms = torch.where(rms > 0, rms, 1)  # zeros stay zeros
            student, teacher = (student / rms).to(student.dtype), (teacher / rms).to(teacher.dtype)
        mask = self.make_mask(student, rng) if mask is None else mask
        expected = (len(student), 1, *student.shape[2:])
        require(mask.shape == expected, f"mask must be {expected}, got {tuple(mask.shape)}.")
        aligned = self.align(student)
        reconstruction = self.generator(aligned * mask.to(aligned))
        error = at_least_float32(reconstruction) - at_least_float32(teacher)
        feature = error.square().sum() / len(student)
        contrast = omni_contrastive_loss(reconstruction, teacher, **self.contrast) / len(student)
        if self.reduction == "mean":
            feature = feature / teacher[0].numel()
            contrast = contrast / self.contrast["channel_groups"]
        loss = self.fd_weight * feature + self.ctr_weight * contrast
        return AfDCDOutput(loss, feature, contrast, reconstruction)

    def make_mask(self, like: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Make a mask (B, 1, H, W), 1 where a position is kept, for maps `like` (B, C, H, W).

        It is drawn on the device of `rng`, or without one on that of `like`.
        """
        batch, _, height, width = like.shape
        if not self.random_mask:
            mask = torch.ones(batch, 1, height, width, device=like.device)
            mask[..., height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = 0
            return mask
        device = like.device if rng is None else rng.device
        draws = torch.rand(batch, 1, height, width, generator=rng, device=device)
        return (draws <= 1 - self.mask_ratio).to(like.device, torch.float32)

    def load_official(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the reference implementation's weights; `ValueError` if names or shapes differ."""
        state = {}
        for name, value in state_dict.items():
            for theirs, ours in OFFICIAL_NAMES.items():
                name = name.replace(theirs, ours)
            state[name] = value
        check_fits(state, self, "state_dict")
        self.load_state_dict(state)


def _conv3x3(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1)


def _check_maps(student: Tensor, teacher: Tensor, channels: tuple[int, int]) -> None:
    for name, x, expected in zip(("student", "teacher"), (student, teacher), channels, strict=True):
        fits = x.ndim == 4 and x.shape[1] == expected and len(x) > 0
        require(fits, f"{name} must be (B, {expected}, H, W), got {tuple(x.shape)}.")
    shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
    fits = len(student) == len(teacher) and student.shape[2:] == teacher.shape[2:]
    require(fits, f"student and teacher must agree in B, H and W, got {shapes}; resize before.")
