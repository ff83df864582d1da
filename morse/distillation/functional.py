"""The contrast of Af-DCD (Fan et al. 2023, arXiv 2312.04168) as functions of feature maps."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def omni_tokens(x: Tensor, channel_groups: int, patch_size: tuple[int, int]) -> Tensor:
    """Cut maps (B, C, H, W) into tokens, one for each position and channel group of a patch.

    Returns:
        Tokens (B * P, N2 * M, C / M) of the P patches of each map, patches row-major and the batch
        outermost. Of a patch's N2 = hp * wp positions (row-major), token n * M + g holds group g,
        of M = `channel_groups` contiguous ones, at position n.

    Raises:
        ValueError: If M does not divide C, or the patch (hp, wp) does not divide (H, W).
    """
    require(x.ndim == 4, f"Maps must be (B, C, H, W), got shape {tuple(x.shape)}.")
    batch, channels, height, width = x.shape
    check_groups(channels, channel_groups)
    check_patch(height, width, patch_size)
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
    check_contrast(temperature, channel_groups, patch_size, pool_size)
    shapes = f"pred has shape {tuple(pred.shape)}, target {tuple(target.shape)}"
    require(pred.ndim == 4 and pred.shape == target.shape, f"{shapes}; both are (B, C, H, W).")
    pool = max(pool_size, 1)
    height, width = pred.shape[2] // pool, pred.shape[3] // pool
    check_patch(height, width, patch_size)
    pred, target = at_least_float32(pred), at_least_float32(target)
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


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or as it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require(condition: bool, message: str) -> None:
    """Raise `ValueError` with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_contrast(temperature: float, groups: int, patch: tuple[int, int], pool: int) -> None:
    """Check the ranges of the contrast's settings."""
    require(0 < temperature < math.inf, f"temperature must be above 0, got {temperature}.")
    require(groups >= 2, f"channel_groups must be 2 or more (else no negatives), got {groups}.")
    require(len(patch) == 2 and min(patch) >= 1, f"patch_size must be two sizes, got {patch}.")
    require(pool >= 0, f"pool_size must be 0 (none) or more, got {pool}.")


def check_groups(channels: int, groups: int) -> None:
    """Check that `groups` divides `channels`."""
    divides = groups >= 1 and channels % groups == 0
    require(divides, f"channel_groups must divide the {channels} channels, got {groups}.")


def check_patch(height: int, width: int, patch: tuple[int, int]) -> None:
    """Check that patches tile a map of `height` x `width` positions."""
    # A map smaller than the patch has a rest too, unless pooling left nothing of it.
    fits = min(height, width) > 0 and height % patch[0] == 0 and width % patch[1] == 0
    size = f"{height} x {width} positions (after pooling)"
    require(fits, f"patch_size {patch} must divide {size}; change it or pool_size.")
