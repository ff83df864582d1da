"""Dots for one pass under classifier-free guidance: they correct the guided estimate itself.

Under guidance Dash is evaluated for two branches, and a plain Dot corrects each. A Dot of guided
estimates is evaluated once: its z_ts is u + w (c - u), its conditions are those of the branch with
the prompt, and the guidance scale w goes into its time embedding.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

DotGuidance = Literal["branches", "guided"]
# The slowest wave's period is 2 pi times this: scales of up to twenty differ by a half of it.
_SLOWEST = 12.5


def check_dot_guidance(guidance: str, independent: bool) -> None:
    """Check a Dot's settings.

    Raises:
        ValueError: If `guidance` is unknown, or a Dot that estimates alone is to be "guided".
    """
    if guidance not in get_args(DotGuidance):
        raise ValueError(f"guidance must be one of {get_args(DotGuidance)}, got {guidance!r}.")
    if guidance == "guided" and independent:
        raise ValueError(
            "guidance is 'guided' and independent is True, but a Dot that estimates alone sees no "
            "guided estimate; choose one."
        )


class GuidanceEmbedding(nn.Module):
    """Embeds guidance scales as diffusers embeds timesteps, through a layer that starts at zero.

    Args:
        dim: Size of the embedding, that of Dash's time embedding.
    """

    def __init__(self, dim: int) -> None:
        """Create the layer."""
        super().__init__()
        self.dim = dim
        self.projection = nn.Linear(2 * (dim // 2), dim)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, scale: Tensor | None, like: Tensor) -> Tensor:
        """Embed scales.

        Args:
            scale: () or (B,), best on the device of `like`, as a copy from the CPU keeps a graph
                from being captured; None for 1, which is the branch with the prompt.
            like: Time embedding, (B, dim), whose device and dtype to take.

        Returns:
            (B, dim).
        """
        scale = torch.ones((), device=like.device) if scale is None else scale
        scale = scale.to(like.device, torch.float32).reshape(-1).expand(len(like))
        exponents = torch.linspace(0, 1, self.dim // 2, device=like.device)
        angles = scale[:, None] * torch.exp(-math.log(_SLOWEST) * exponents)
        return self.projection(torch.cat([angles.sin(), angles.cos()], 1).to(like.dtype))
