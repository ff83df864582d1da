"""ScaleKD's dual-view feature mimicking: features compared as they are and without their mean.

Source: Fan, Li, Liu, Yao, "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers",
NeurIPS 2024, arXiv 2411.06786, and the authors' code.
"""

import math
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional

from morse.distillation.functional import (
    at_least_float32,
    check_cutoff,
    remove_low_frequencies,
    require,
)

Reduction = Literal["official", "mean"]


class DualViewMimicking(nn.Module):
    """Dual-view feature mimicking (ScaleKD, Fan et al. 2024, arXiv 2411.06786); no parameters.

    With n(.) the L2 normalisation over channels at each position, the spatial view compares n(S)
    with n(T); the frequency view compares n(F(S)) with n(F(T)), where F removes the lowest DCT
    coefficients. The authors remove the first, which is the mean of each sample and channel, so
    that any constant added to a channel drops out. Both are squared errors, summed over channels
    and positions, averaged over the batch and at most 4 * weight * H * W.

    Args:
        spatial_weight: Factor of the spatial view, finite and at least 0.
        frequency_weight: The same of the frequency view.
        low_cutoff: How many vertical and horizontal frequencies F removes, (kh, kw), those that
            are low in both. More than (1, 1) is not in the paper: a coarse map of h x w positions
            holds the frequencies up to (h, w). The map's own size leaves nothing: a loss of 0.
        reduction: "official" sums over positions; "mean" (not in the paper) averages.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from morse.distillation import DualViewMimicking
        >>> teacher = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> tokens = 3 * teacher.flatten(2).transpose(1, 2)  # (B, H * W, C)
        >>> losses = DualViewMimicking()(tokens, tokens + 1, teacher)
        >>> {name: round(loss.item(), 4) for name, loss in losses.items()}
        {'spatial': 0.0, 'frequency': 0.0}
    """

    def __init__(
        self,
        spatial_weight: float = 0.08,
        frequency_weight: float = 0.06,
        *,
        low_cutoff: tuple[int, int] = (1, 1),
        reduction: Reduction = "official",
    ) -> None:
        """Keep the settings."""
        super().__init__()
        weights = {"spatial_weight": spatial_weight, "frequency_weight": frequency_weight}
        for name, weight in weights.items():
            require(0 <= weight < math.inf, f"{name} must be finite, 0 or more, got {weight}.")
        check_cutoff(low_cutoff)
        allowed = get_args(Reduction)
        require(reduction in allowed, f"reduction must be one of {allowed}, got {reduction!r}.")
        self.spatial_weight, self.frequency_weight = spatial_weight, frequency_weight
        self.low_cutoff = tuple(low_cutoff)
        self.reduction = reduction

    def forward(
        self, tokens_spatial: Tensor, tokens_frequency: Tensor, teacher_map: Tensor
    ) -> dict[str, Tensor]:
        """Compare a student's tokens in both views.

        Args:
            tokens_spatial: Tokens for the spatial view, (B, H * W, Ct), row-major.
            tokens_frequency: Tokens for the frequency view, of the same shape.
            teacher_map: Teacher's feature, (B, Ct, H, W); no gradient reaches it.

        Returns:
            The weighted losses, scalars, "spatial" and "frequency", in float32 at least.

        Raises:
            ValueError: If a shape does not fit, or `low_cutoff` exceeds the map.
        """
        shape = tuple(teacher_map.shape)
        require(len(shape) == 4, f"teacher_map must be (B, Ct, H, W), got {shape}.")
        teacher = at_least_float32(teacher_map.detach())
        spatial = _to_map("tokens_spatial", tokens_spatial, teacher)
        frequency = _to_map("tokens_frequency", tokens_frequency, teacher)
        cut = self.low_cutoff
        views = {
            "spatial": (spatial, teacher, self.spatial_weight),
            "frequency": (
                remove_low_frequencies(frequency, cut),
                remove_low_frequencies(teacher, cut),
                self.frequency_weight,
            ),
        }
        positions = math.prod(shape[2:]) if self.reduction == "mean" else 1
        return {
            name: weight * (_normalize(x) - _normalize(goal)).square().sum() / (len(x) * positions)
            for name, (x, goal, weight) in views.items()
        }


def _to_map(name: str, tokens: Tensor, teacher: Tensor) -> Tensor:
    batch, channels, height, width = teacher.shape
    expected = (batch, height * width, channels)
    got = tuple(tokens.shape)
    require(got == expected, f"{name} must be {expected} for this teacher_map, got {got}.")
    return at_least_float32(tokens).transpose(1, 2).reshape(teacher.shape)


def _normalize(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=1, eps=1e-12)
