"""NORM's loss: each segment of the student's widened feature equals the whole teacher feature.

X. Liu, L. Li, C. Li, A. Yao, "NORM: Knowledge Distillation via N-to-One Representation Matching",
ICLR 2023, arXiv:2305.13803. `norm_transform.py` has the transform that widens the feature.
"""

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from morse.distillation.functional import at_least_float32

# (share of training at which the stage ends, factor) of the authors' two training scripts, for
# `norm_weight`.
CIFAR_STAGES = ((10 / 240, 0.1), (20 / 240, 0.5), (180 / 240, 1.0), (210 / 240, 0.5), (1.0, 0.1))
IMAGENET_STAGES = ((5 / 100, 0.1), (15 / 100, 0.5), (60 / 100, 0.9), (80 / 100, 0.5), (1.0, 0.1))


def norm_weight(progress: float, stages: tuple[tuple[float, float], ...] = CIFAR_STAGES) -> float:
    """Return the loss's factor at a point of training: a staircase, from the authors' code.

    Args:
        progress: Share of training done, in [0, 1]; their epoch / number of epochs.
        stages: (end, factor) of each stage, a stage's end belonging to the next one; ends
            increase up to 1.0, which still has the last factor. `CIFAR_STAGES` are those of the
            authors' 240 epochs on CIFAR-100, `IMAGENET_STAGES` those of their 100 on ImageNet.

    Raises:
        ValueError: If `progress` is outside [0, 1], or the ends do not increase up to 1.
    """
    ends = [end for end, _ in stages]
    if not ends or ends[-1] != 1 or any(end <= before for before, end in pairwise([0, *ends])):
        raise ValueError(f"stages must have ends that increase from above 0 to 1, got {ends!r}.")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress!r}.")
    return next((factor for end, factor in stages if progress < end), stages[-1][1])


class NORMLoss(nn.Module):
    """weight * sum over segments n of mean((E_n - T)^2) (NORM, arXiv:2305.13803); no parameters.

    `NORMTransform`, which stands in the student, makes the expanded student feature E. Segment n is
    its block of channels from n*Ct to (n+1)*Ct. For features whose scale changes, such as a
    denoiser's, divide by the teacher feature's variance.

    Args:
        n: Number of segments N, at least 1.
        pool: Whose feature is pooled where it has k times as many rows or columns as the other's;
            with "none" the sizes must fit as they are. The authors pool the teacher on CIFAR and
            the expanded student on ImageNet.
        pool_mode: "max", as the authors, or "avg", for features of both signs, which max biases.
        target: "replicate" compares each segment with all of T. "phase" (not in the paper) is for a
            teacher of sqrt(n) times the resolution: segment p is compared with T's sub-pixel phase
            p, row by row as in `pixel_unshuffle`, whose channels however are channel-major.
        weight: Factor of the loss, at least 0.

    Raises:
        ValueError: For an argument out of its range, and for a phase target whose `n` is no square.

    Example:
        >>> import torch
        >>> from morse.distillation import NORMLoss, NORMTransform
        >>> feature, teacher = torch.randn(2, 6, 5, 5), torch.randn(2, 8, 5, 5)
        >>> out, expanded = NORMTransform(6, 8, n=4)(feature)  # `out` goes on through the student
        >>> loss = NORMLoss(n=4)(expanded, teacher)
        >>> bool(loss > 0)
        True
        >>> NORMLoss(n=4)(teacher.repeat(1, 4, 1, 1), teacher).item()  # all 4 segments are equal
        0.0
    """

    def __init__(
        self,
        n: int = 8,
        *,
        pool: Literal["teacher", "student", "none"] = "teacher",
        pool_mode: Literal["max", "avg"] = "max",
        target: Literal["replicate", "phase"] = "replicate",
        weight: float = 1.0,
    ) -> None:
        """Keep the settings."""
        super().__init__()
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a whole number of at least 1, got {n!r}.")
        for name, value, allowed in (
            ("pool", pool, ("teacher", "student", "none")),
            ("pool_mode", pool_mode, ("max", "avg")),
            ("target", target, ("replicate", "phase")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"weight must be finite and at least 0, got {weight!r}.")
        self.upscale = math.isqrt(n) if target == "phase" else 1
        if target == "phase" and self.upscale**2 != n:
            raise ValueError(f"n must be a square (4, 16, ...) for target='phase', got {n!r}.")
        self.n = n
        self.pool = pool
        self.pool_mode = pool_mode
        self.target = target
        self.weight = weight

    def forward(self, expanded: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss, a scalar; sum it over layer pairs if there are several.

        Args:
            expanded: E, (B, N*Ct, H, W).
            teacher: T, (B, Ct, Ht, Wt), from a teacher in eval mode; no gradient reaches it.

        Raises:
            ValueError: If batch, channels or sizes do not fit; the authors' code rounds a ratio of
                sizes down, here it must be a whole number.
        """
        expanded = at_least_float32(expanded)
        teacher = teacher.detach().to(expanded.dtype)
        self._check_shapes(expanded, teacher)
        if self.pool == "teacher":
            size = [self.upscale * length for length in expanded.shape[2:]]
            teacher = self._pool_to("teacher", teacher, size)
        elif self.pool == "student":
            size = [length // self.upscale for length in teacher.shape[2:]]
            expanded = self._pool_to("expanded", expanded, size)
        if [self.upscale * length for length in expanded.shape[2:]] != list(teacher.shape[2:]):
            raise ValueError(
                f"teacher must have {self.upscale} times the rows and columns of expanded, got "
                f"{tuple(teacher.shape[2:])} for {tuple(expanded.shape[2:])}; see pool."
            )
        segments = expanded.unflatten(1, (self.n, teacher.shape[1]))  # (B, N, Ct, H, W)
        if self.target == "phase":
            phases = functional.pixel_unshuffle(teacher, self.upscale)
            goal = phases.unflatten(1, (teacher.shape[1], self.n)).transpose(1, 2)
        else:
            goal = teacher.unsqueeze(1).expand_as(segments)
        return self.weight * self.n * functional.mse_loss(segments, goal)

    def _check_shapes(self, expanded: Tensor, teacher: Tensor) -> None:
        shapes = f"got expanded {tuple(expanded.shape)} and teacher {tuple(teacher.shape)}"
        if expanded.ndim != 4 or teacher.ndim != 4:
            raise ValueError(f"expanded and teacher must be (B, C, H, W), {shapes}.")
        if len(expanded) != len(teacher):
            raise ValueError(f"expanded and teacher must be of the same batch, {shapes}.")
        if expanded.shape[1] != self.n * teacher.shape[1]:
            raise ValueError(f"expanded must have n={self.n} times teacher's channels, {shapes}.")

    def _pool_to(self, name: str, feature: Tensor, size: list[int]) -> Tensor:
        pairs = list(zip(feature.shape[2:], size, strict=True))
        if any(wanted < 1 or length % wanted for length, wanted in pairs):
            raise ValueError(
                f"{name} has size {tuple(feature.shape[2:])}, which must be a multiple of "
                f"{tuple(size)} to be pooled; resize a feature or choose another pool than "
                f"{self.pool!r}."
            )
        kernel = [length // wanted for length, wanted in pairs]
        if kernel == [1, 1]:
            return feature
        pool = functional.max_pool2d if self.pool_mode == "max" else functional.avg_pool2d
        return pool(feature, kernel)
