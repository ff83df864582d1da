"""Dot's own blocks: m down-sampling ones before Dash's layers and m up-sampling ones after.

They are made of diffusers' ResNet blocks, the kind that UNets consist of, without self-attention
(Morse, section 3.3), and narrow, since they run at the higher resolutions.
"""

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from morse.dot.conv_layers import tell_time
from morse.dot.relay import States


def num_groups(channels: int) -> int:
    """GroupNorm groups for a narrow layer: four channels a group, at most 32 groups."""
    return max(1, min(32, channels // 4))


def _resnet(in_channels: int, out_channels: int, time_embed_dim: int) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels=in_channels,
        out_channels=out_channels,
        temb_channels=time_embed_dim,
        groups=num_groups(in_channels),
        groups_out=num_groups(out_channels),
    )


class DotDownBlock(nn.Module):
    """ResNet blocks, then half the resolution: (B, C, H, W) -> (B, C_out, H/2, W/2)."""

    def __init__(
        self, channels: int, out_channels: int, time_embed_dim: int, num_layers: int
    ) -> None:
        """Create `num_layers` ResNet blocks and a strided convolution."""
        super().__init__()
        self.resnets = nn.ModuleList(
            _resnet(channels, channels, time_embed_dim) for _ in range(num_layers)
        )
        # Under its default name the layer would register its convolution twice.
        self.downsampler = Downsample2D(
            channels, use_conv=True, out_channels=out_channels, name="op"
        )
        self.time_listeners: tuple[nn.Module, ...] = ()  # convolutions conditioned on the time

    def forward(
        self, hidden: Tensor, time_embedding: Tensor, *relay: States
    ) -> tuple[Tensor, Tensor]:
        """Return the halved features and, as the skip connection, those before halving.

        `relay` is the states of norms that relay (`morse.dot.relay`), and nothing for others.
        """
        tell_time(self.time_listeners, time_embedding)
        for resnet in self.resnets:
            hidden = resnet(hidden, time_embedding, *relay)
        halved = self.downsampler(hidden)
        tell_time(self.time_listeners, None)
        return halved, hidden


class DotUpBlock(nn.Module):
    """Double the resolution, join the skip connection, ResNet blocks; (B, C, 2H, 2W) out.

    Channels are reduced before up-sampling, so that nothing wide runs at the higher resolution.
    """

    def __init__(
        self, in_channels: int, channels: int, time_embed_dim: int, num_layers: int
    ) -> None:
        """Create a 1x1 convolution and `num_layers` ResNet blocks."""
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, channels, kernel_size=1)
        self.upsample: nn.Module = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.resnets = nn.ModuleList(
            _resnet(2 * channels if index == 0 else channels, channels, time_embed_dim)
            for index in range(num_layers)
        )
        self.time_listeners: tuple[nn.Module, ...] = ()  # convolutions conditioned on the time

    def forward(
        self, hidden: Tensor, skip: Tensor, time_embedding: Tensor, *relay: States
    ) -> Tensor:
        """Join `hidden` (B, C_in, H, W) and `skip` (B, C, 2H, 2W); `relay` as on the way down."""
        tell_time(self.time_listeners, time_embedding)
        hidden = torch.cat([self.upsample(self.reduce(hidden)), skip], dim=1)
        for resnet in self.resnets:
            hidden = resnet(hidden, time_embedding, *relay)
        tell_time(self.time_listeners, None)
        return hidden


def check_options(
    num_down_blocks: int, block_out_channels: tuple[int, ...], layers: int, lora_rank: int
) -> None:
    """Raise `ValueError`, naming option and value, unless Dot's options are in their ranges."""
    if num_down_blocks not in (1, 2, 3):
        raise ValueError(f"num_down_blocks must be 1, 2 or 3, got {num_down_blocks!r}.")
    widths_fit = all(width > 0 and width % 4 == 0 for width in block_out_channels)
    if len(block_out_channels) != num_down_blocks or not widths_fit:
        raise ValueError(
            f"block_out_channels must be num_down_blocks={num_down_blocks} positive multiples of "
            f"4, got {tuple(block_out_channels)!r}."
        )
    if layers < 1:
        raise ValueError(f"layers_per_block must be at least 1, got {layers!r}.")
    if lora_rank < 0:
        raise ValueError(f"lora_rank must be 0 (no LoRA) or more, got {lora_rank!r}.")
