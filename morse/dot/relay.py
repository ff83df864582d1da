"""Dot's own blocks with dynamic normalisation and relay, DNR (`morse.modules.dnr`).

A level of Dot is one down-sampling block and the up-sampling block that mirrors it. Its norms of
one width share a cell, whose state is relayed from norm to norm and, where the last one of a Dot
step leaves it, on to the first one of the next: denoising steps take the place of the frames of
Cai, Yao and Chen (NeurIPS 2021), and the stretch between two Dash steps that of a clip.

Nothing is kept in the modules. States lie in the jump point's `memory`, so a Dash step starts the
relay anew, and branches of guidance, threads and interrupted runs each have their own.
"""

from collections.abc import Iterable
from typing import Literal, get_args

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional

from morse.modules.dnr import DynamicNormRelay
from morse.modules.dnr_cell import RelayCell, RelayState

Norm = Literal["group", "dnr"]
States = dict[RelayCell, RelayState]


class RelayResnet(nn.Module):
    """A ResNet block whose norms relay; it begins as `resnet`, whose layers it takes over."""

    def __init__(self, resnet: ResnetBlock2D, cells: nn.ModuleDict) -> None:
        """Take the layers of a block without dropout or resampling.

        Args:
            resnet: The block.
            cells: By width; it has those of the block's norms.
        """
        super().__init__()
        self.norm1, self.norm2 = (
            DynamicNormRelay.from_norm(norm, cell=cells[str(norm.num_channels)])
            for norm in (resnet.norm1, resnet.norm2)
        )
        self.conv1, self.conv2 = resnet.conv1, resnet.conv2
        self.time_emb_proj, self.conv_shortcut = resnet.time_emb_proj, resnet.conv_shortcut

    def forward(self, hidden: Tensor, time_embedding: Tensor, states: States) -> Tensor:
        """Go through the block, (B, C, H, W) -> (B, C_out, H, W); `states` move on."""
        residual = self.conv1(functional.silu(_relay(self.norm1, hidden, states)))
        time = self.time_emb_proj(functional.silu(time_embedding))
        residual = residual + time[:, :, None, None]
        residual = self.conv2(functional.silu(_relay(self.norm2, residual, states)))
        return (hidden if self.conv_shortcut is None else self.conv_shortcut(hidden)) + residual


def _relay(norm: DynamicNormRelay, hidden: Tensor, states: States) -> Tensor:
    hidden, states[norm.cell] = norm(hidden, states.get(norm.cell))
    return hidden


def install_relay(norm: Norm, levels: Iterable[tuple[nn.Module, nn.Module]]) -> nn.ModuleList:
    """Replace the ResNet blocks of Dot's levels by ones that relay, where `norm` is "dnr".

    Args:
        norm: Dot's option.
        levels: Down- and up-sampling block of each level.

    Returns:
        The cells, for each level by width, which Dot must hold; empty where `norm` is "group".

    Raises:
        ValueError: If `norm` is something else.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {get_args(Norm)}, got {norm!r}.")
    relay = nn.ModuleList()
    for down, up in levels if norm == "dnr" else ():
        resnets = [*down.resnets, *up.resnets]
        norms = (each for resnet in resnets for each in (resnet.norm1, resnet.norm2))
        widths = sorted({each.num_channels for each in norms})
        cells = nn.ModuleDict({str(width): RelayCell(width) for width in widths})
        relay.append(cells)
        for block in (down, up):
            block.resnets = nn.ModuleList(RelayResnet(resnet, cells) for resnet in block.resnets)
    return relay
