"""DNR over time in the authors' clips: a relay from one group of frames to the next.

Source: Cai, Yao and Chen, "Dynamic Normalization and Relay for Video Action Recognition", NeurIPS
2021, and the authors' code where the two differ. `morse.modules.dnr` has the norm.
"""

import torch
from torch import Tensor

from morse.modules.dnr import Base, DynamicNormRelay, Init, checked_groups
from morse.modules.dnr_cell import RelayCell, RelayState


class CrossTemporalNorm(DynamicNormRelay):
    """DNR over time in the authors' layout of clips: (N*T, C, *) -> (N*T, C, *).

    The frames of each clip are cut in order into groups; each group is one step of a relay that
    starts anew with every clip. In training with base="batch", each group is normalised by its own
    statistics, which move the running ones once a group. The defaults are the authors' layer.

    >>> import torch
    >>> from morse.modules import CrossTemporalNorm
    >>> norm = CrossTemporalNorm(8, n_segment=4, num_groups=2)
    >>> norm(torch.randn(3 * 4, 8, 5, 5)).shape
    torch.Size([12, 8, 5, 5])

    Args:
        channels: Channels C.
        n_segment: Frames T of a clip.
        num_groups: Groups that the frames are cut into; divides T.
        base: As in `DynamicNormRelay`.
        norm_groups: `num_groups` there.
        eps: As there.
        momentum: As there, where a group counts as a batch.
        cell: As there.
        init: As there.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        channels: int,
        n_segment: int = 8,
        num_groups: int = 4,
        *,
        base: Base = "batch",
        norm_groups: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        cell: RelayCell | None = None,
        init: Init = "official",
    ) -> None:
        """Create the layer."""
        if num_groups < 1 or n_segment < 1 or n_segment % num_groups:
            raise ValueError(f"num_groups must divide n_segment={n_segment}, got {num_groups}")
        checked_groups(channels, norm_groups, "norm_groups")
        super().__init__(
            channels, base=base, num_groups=norm_groups, eps=eps, momentum=momentum, cell=cell,
            init=init,
        )  # fmt: skip
        self.n_segment, self.num_groups = n_segment, num_groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalise clips, whose frames follow each other; ValueError if x is not N*T frames."""
        if x.dim() < 2 or len(x) % self.n_segment:
            raise ValueError(
                f"x must be (N*T, C, ...), clips of n_segment={self.n_segment} frames, got "
                f"{tuple(x.shape)}"
            )
        clips = x.unflatten(0, (-1, self.n_segment)).transpose(1, 2)  # (N, C, T, *)
        state, groups = None, []
        for group in clips.chunk(self.num_groups, 2):
            y, state = super().forward(group, state)
            groups.append(y)
        return torch.cat(groups, 2).transpose(1, 2).flatten(0, 1)

    def modulate(self, x: Tensor, state: RelayState) -> Tensor:
        """Raise `TypeError`: each group of frames has a state of its own, made in `forward`."""
        raise TypeError(
            "CrossTemporalNorm takes no state, but makes one for each group of frames: call it, or "
            "use DynamicNormRelay.modulate"
        )
