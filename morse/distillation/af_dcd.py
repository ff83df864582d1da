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
from torch.nn import functional as F

GeneratorKind = Literal["plain", "enhanced"]
Reduction = Literal["official", "mean"]
Normalize = Literal["teacher_rms"]

# Names in the reference implementation (its spelling) -> names here, replaced in this order.
OFFICIAL_NAMES = {"projetor": "generator", "block_1.0": "hidden1", "block_2.0": "hidden2",
                  "adpator_1": "out1", "adpator_2": "out2"}  # fmt: skip


def omni_tokens(x: Tensor, channel_groups: int, patch_size: tuple[int, int]) -> Tensor:
    """Cut maps (B, C, H, W) into tokens, one for each position and channel group of a patch.

    Returns:
        Tokens (B * P, N2 * M, C / M) of the P patches of each map, patches row-major and the batch
        outermost. Of a patch's N2 = hp * wp positions (row-major), token n * M + g holds group g,
        of M = `channel_groups` contiguous ones, at position n.

    Raises:
        ValueError: If M does not divide C, or the patch (hp, wp) does not divide (H, W).
    """
    _require(x.ndim == 4, f"Maps must be (B, C, H, W), got shape {tuple(x.shape)}.")
    batch, channels, height, width = x.shape
    _check_groups(channels, channel_groups)
    _check_patch(height, width, patch_size)
    hp, wp = patch_size
    size = channels // channel_groups
    x = x.reshape(batch, channel_groups, size, height // hp, hp, width // wp, wp)
    return x.permute(0, 3, 5, 4, 6, 1, 2).reshape(-1, hp * wp * channel_groups, size)


def omni_contrastive_loss(
    pred: Tensor,
    target: Tensor,
    *,
    temperature: float,
    channel_groups: int,
    patch_size: tuple[int, int],
    pool_size: int,
) -> Tensor:
    """Contrast each token of `pred` with the tokens of `target` in the same patch.

    The similarity is the negative L1 distance of raw features. A token's positive is the same token
    of `target`, its negatives are those of other channel groups at any position; the same group at
    another position is neither. Works in float32 at least. `target` is not detached.

    Args:
        pred: Restored student maps, (B, C, H, W).
        target: Teacher maps, of the same shape.
        temperature: See `AfDCDLoss`, as for the other settings.
        channel_groups: Divides C.
        patch_size: Divides the height and width after pooling.
        pool_size: A rest of rows or columns is dropped.

    Returns:
        A scalar: the mean over pooled positions, summed over groups and batch (not yet over B).

    Raises:
        ValueError: If a setting is out of range or the maps do not split so.
    """
    _check_contrast(temperature, channel_groups, patch_size, pool_size)
    shapes = f"pred has shape {tuple(pred.shape)}, target {tuple(target.shape)}"
    _require(pred.ndim == 4 and pred.shape == target.shape, f"{shapes}; both are (B, C, H, W).")
    pool = max(pool_size, 1)
    height, width = pred.shape[2] // pool, pred.shape[3] // pool
    _check_patch(height, width, patch_size)
    pred, target = _at_least_float32(pred), _at_least_float32(target)
    if pool > 1:
        pred, target = F.max_pool2d(pred, pool), F.max_pool2d(target, pool)
    anchors = omni_tokens(pred, channel_groups, patch_size)
    keys = omni_tokens(target, channel_groups, patch_size)
    logits = -torch.cdist(anchors, keys, p=1) / temperature  # (B * P, N2 * M, N2 * M)
    index = torch.arange(anchors.shape[1], device=pred.device)
    group = index % channel_groups
    ignored = (group[:, None] == group) & (index[:, None] != index)
    log_sum = logits.masked_fill(ignored, -math.inf).logsumexp(dim=2)
    return (log_sum - logits.diagonal(dim1=1, dim2=2)).sum() / (height * width)


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
            _require(channels >= 1, f"{name}_channels must be 1 or more, got {channels}.")
        _check_contrast(temperature, channel_groups, patch_size, pool_size)
        _check_groups(teacher_channels, channel_groups)
        _require(0 <= mask_ratio < 1, f"mask_ratio (dropped) must be in [0, 1), got {mask_ratio}.")
        for name, weight in (("fd_weight", fd_weight), ("ctr_weight", ctr_weight)):
            _require(0 <= weight < math.inf, f"{name} must be finite, 0 or more, got {weight}.")
        for name, value, allowed in (
            ("generator", generator, get_args(GeneratorKind)),
            ("reduction", reduction, get_args(Reduction)),
            ("normalize", normalize, (None, *get_args(Normalize))),
        ):
            _require(value in allowed, f"{name} must be one of {allowed}, got {value!r}.")
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
            rms = _at_least_float32(teacher).square().mean((1, 2, 3), keepdim=True).sqrt()
            rms = torch.where(rms > 0, rms, 1)  # zeros stay zeros
            student, teacher = (student / rms).to(student.dtype), (teacher / rms).to(teacher.dtype)
        mask = self.make_mask(student, rng) if mask is None else mask
        expected = (len(student), 1, *student.shape[2:])
        _require(mask.shape == expected, f"mask must be {expected}, got {tuple(mask.shape)}.")
        aligned = self.align(student)
        reconstruction = self.generator(aligned * mask.to(aligned))
        error = _at_least_float32(reconstruction) - _at_least_float32(teacher)
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
        given = {(name, tuple(value.shape)) for name, value in state.items()}
        own = {(name, tuple(value.shape)) for name, value in self.state_dict().items()}
        _require(
            given == own,
            f"state_dict does not fit: missing {sorted(own - given)}, unexpected "
            f"{sorted(given - own)}. Create the loss with its channels and generator.",
        )
        self.load_state_dict(state)


def _conv3x3(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_contrast(temperature: float, groups: int, patch: tuple[int, int], pool: int) -> None:
    _require(0 < temperature < math.inf, f"temperature must be above 0, got {temperature}.")
    _require(groups >= 2, f"channel_groups must be 2 or more (else no negatives), got {groups}.")
    _require(len(patch) == 2 and min(patch) >= 1, f"patch_size must be two sizes, got {patch}.")
    _require(pool >= 0, f"pool_size must be 0 (none) or more, got {pool}.")


def _check_groups(channels: int, groups: int) -> None:
    divides = groups >= 1 and channels % groups == 0
    _require(divides, f"channel_groups must divide the {channels} channels, got {groups}.")


def _check_patch(height: int, width: int, patch: tuple[int, int]) -> None:
    # A map smaller than the patch has a rest too, unless pooling left nothing of it.
    fits = min(height, width) > 0 and height % patch[0] == 0 and width % patch[1] == 0
    size = f"{height} x {width} positions (after pooling)"
    _require(fits, f"patch_size {patch} must divide {size}; change it or pool_size.")


def _check_maps(student: Tensor, teacher: Tensor, channels: tuple[int, int]) -> None:
    for name, x, expected in zip(("student", "teacher"), (student, teacher), channels, strict=True):
        fits = x.ndim == 4 and x.shape[1] == expected and len(x) > 0
        _require(fits, f"{name} must be (B, {expected}, H, W), got {tuple(x.shape)}.")
    shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
    fits = len(student) == len(teacher) and student.shape[2:] == teacher.shape[2:]
    _require(fits, f"student and teacher must agree in B, H and W, got {shapes}; resize before.")
