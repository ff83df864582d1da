"""Functions behind the losses: Af-DCD's contrast, ScaleKD's frequency view and logit term.

Sources: Af-DCD, Fan et al. 2023, arXiv 2312.04168; ScaleKD, Fan et al. 2024, arXiv 2411.06786.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
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


def dct_matrix(
    n: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Return the DCT-II matrix (n, n), 2 cos(pi (2j + 1) k / (2n)) in row k and column j.

    It is computed in float64 on the CPU, as not every accelerator has it, then brought to `dtype`
    and `device`, or else to torch's default ones.

    Raises:
        ValueError: If n is below 1.
    """
    require(n >= 1, f"n must be 1 or more, got {n}.")
    index = torch.arange(n, dtype=torch.float64, device="cpu")
    matrix = 2 * torch.cos(math.pi * (2 * index + 1) * index[:, None] / (2 * n))
    return matrix.to(device or torch.get_default_device(), dtype or torch.get_default_dtype())


def dct2(x: Tensor) -> Tensor:
    """Transform maps (..., H, W) by the unnormalised DCT-II along both axes."""
    height, width = x.shape[-2:]
    like = {"dtype": x.dtype, "device": x.device}
    with _full_precision(x):
        return dct_matrix(height, **like) @ x @ dct_matrix(width, **like).T


def idct2(X: Tensor) -> Tensor:
    """Undo `dct2`."""
    height, width = X.shape[-2:]
    with _full_precision(X):
        return _inverse_dct(height, X) @ X @ _inverse_dct(width, X).T


def _full_precision(x: Tensor) -> torch.autocast:
    """Keep autocast from multiplying matrices in a lower precision than `x` has."""
    return torch.autocast(x.device.type, enabled=False)


def _inverse_dct(n: int, like: Tensor) -> Tensor:
    # The matrix's rows are orthogonal; their squared norms are 4n for the first, 2n for the others.
    matrix = dct_matrix(n, dtype=torch.float64, device="cpu") / (2 * n)
    matrix[0] /= 2
    return matrix.T.to(like)


def remove_low_frequencies(x: Tensor, cutoff: tuple[int, int] = (1, 1)) -> Tensor:
    """Set the lowest DCT coefficients of maps to zero.

    Args:
        x: Maps, (..., H, W).
        cutoff: How many of the lowest vertical and horizontal frequencies, (kh, kw); the kh x kw
            coefficients that are low in both go. (1, 1) takes each map's mean away.

    Raises:
        ValueError: If the cutoff is negative or exceeds the map.
    """
    check_cutoff(cutoff)
    height, width = x.shape[-2:]
    fits = cutoff[0] <= height and cutoff[1] <= width
    require(fits, f"cutoff {cutoff} exceeds the map, {height} x {width} positions.")
    if tuple(cutoff) == (1, 1):
        return x - x.mean((-2, -1), keepdim=True)
    keep = torch.ones(height, width, dtype=x.dtype, device=x.device)
    keep[: cutoff[0], : cutoff[1]] = 0
    return idct2(dct2(x) * keep)


def logit_distillation_loss(
    student: Tensor, teacher: Tensor, *, weight: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Cross-entropy of the student's to the teacher's softened class probabilities (ScaleKD).

    ScaleKD's code multiplies the task's own loss by 1 - `weight` beside it.

    Args:
        student: Logits, (B, K).
        teacher: Logits, (B, K); detached.
        weight: Factor, finite and at least 0.
        temperature: T > 0 that divides the logits; the loss is multiplied by T^2.

    Raises:
        ValueError: If the shapes differ or an argument is out of its range.
    """
    shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
    require(student.ndim == 2 and student.shape == teacher.shape, f"Not twice (B, K): {shapes}.")
    require(0 <= weight < math.inf, f"weight must be finite, 0 or more, got {weight}.")
    require(0 < temperature < math.inf, f"temperature must be above 0, got {temperature}.")
    goal = (at_least_float32(teacher.detach()) / temperature).softmax(1)
    entropy = -(goal * (at_least_float32(student) / temperature).log_softmax(1)).sum(1).mean()
    return weight * temperature**2 * entropy


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or as it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require(condition: bool, message: str) -> None:
    """Raise `ValueError` with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_fits(state: Mapping[str, Tensor], module: nn.Module, where: str) -> None:
    """Check that official weights have the names and shapes of a module's.

    Args:
        state: The weights, by the names here.
        module: The one that is to load them; left as it is.
        where: Names what they were taken from.

    Raises:
        ValueError: If one is missing, has another shape or has company.
    """
    given, own = (
        {(name, tuple(value.shape)) for name, value in each.items()}
        for each in (state, module.state_dict())
    )
    require(
        given == own,
        f"{where} does not fit: missing {sorted(own - given)}, unexpected {sorted(given - own)}. "
        f"Check where they were taken from, and create the {type(module).__name__} with the "
        "settings that it was trained with.",
    )


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


def check_cutoff(cutoff: tuple[int, int]) -> None:
    """Check that a cutoff is two counts of frequencies."""
    fits = len(cutoff) == 2 and all(isinstance(k, int) and k >= 0 for k in cutoff)
    require(fits, f"A cutoff must be two whole numbers of at least 0, got {cutoff}.")
