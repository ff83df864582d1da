"""Grid convolution (GridConv, D-GridConv): k x k convolution of graphs laid out on a small grid.

Source: Kang, Liu, Yao, Wang and Wu, "3D Human Pose Lifting with Grid Convolution", AAAI 2023
(arXiv 2302.08760), and its code.

Shapes: B samples, C input and O output channels, a grid of H x W cells, k x k taps.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from morse.modules.gridconv_attention import (
    AttentionNorm,
    GridAttention,
    check_input,
    check_sizes,
)
from morse.modules.node_matrix import checked_grid

Padding = Literal["circular", "zeros", "replicate"]

# The authors' letters stand for the same.
PADDINGS = {
    "circular": "circular", "zeros": "zeros", "replicate": "replicate",
    "c": "circular", "z": "zeros", "r": "replicate",
}  # fmt: skip
PAD_MODES = {"circular": "circular", "zeros": "constant", "replicate": "replicate"}


class _Branch(nn.Conv2d):
    """One of the two convolutions, with gates (B, k*k, H, W) on its patches if given any."""

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        if gates is None:
            return super().forward(x)
        padded = functional.pad(x, 4 * (self.kernel_size[0] // 2,), PAD_MODES[self.padding_mode])
        patches = functional.unfold(padded, self.kernel_size)
        taps = self.kernel_size[0] ** 2
        patches = patches.view(*x.shape[:2], taps, *x.shape[2:]) * gates[:, None]
        # What is left is a 1x1 convolution of gated patches, (B, C*k*k, H, W).
        weight = self.weight.flatten(1)[:, :, None, None]
        return functional.conv2d(patches.flatten(1, 2), weight, self.bias)


class GridConv2d(nn.Module):
    """Sum of two k x k convolutions with different paddings: (B, C, H, W) -> (B, O, H, W).

    At cell p the dynamic layer gives `sum_branch [sum_k W[:, :, k] (a[k, p] x_pad[p + k]) + bias]`:
    the gates a of `GridAttention` are shared by all channels and both branches, do not scale the
    bias, and tie the layer to one grid size.

    Args:
        in_channels: Input channels C.
        out_channels: Output channels O.
        kernel_size: Taps k along both axes, odd.
        paddings: How each branch pads: "circular", "zeros" or "replicate", or the authors' letters
            "c", "z" and "r". Theirs are (c, z) where joints are detected and in the static layer,
            (c, r) for ground truth.
        bias: Give both branches a bias.
        dynamic: Gate the kernel by an attention (D-GridConv).
        grid_shape: Height H and width W; needed when `dynamic`, checked wherever given.
        reduction: As in `GridAttention`.
        min_hidden: As there.
        temperature: As there; a static layer has none, and `temperature` is None.
        norm: As there.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from morse.modules import GridConv2d, grid_temperature
        >>> conv = GridConv2d(2, 16, dynamic=True, grid_shape=(5, 5))
        >>> conv(torch.randn(4, 2, 5, 5)).shape
        torch.Size([4, 16, 5, 5])
        >>> conv.set_temperature(grid_temperature(9, 99, 100))
        >>> round(float(conv.temperature), 3)
        1.029
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        paddings: tuple[Padding, Padding] = ("circular", "replicate"),
        bias: bool = True,
        dynamic: bool = False,
        grid_shape: tuple[int, int] | None = None,
        reduction: float = 16,
        min_hidden: int = 16,
        temperature: float = 30.0,
        norm: AttentionNorm = "batch",
    ) -> None:
        """Create both branches and, if dynamic, the attention."""
        super().__init__()
        check_sizes(in_channels, kernel_size, out_channels)
        GridAttention.checked_temperature(temperature)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.paddings = kernel_size, _checked_paddings(paddings)
        self.grid_shape = None if grid_shape is None else checked_grid(grid_shape)
        self.attention = None
        if self.grid_shape is not None:
            self._check_wrapping(self.grid_shape)
        if dynamic:
            if self.grid_shape is None:
                raise ValueError("dynamic=True needs grid_shape=(H, W), the size of its attention")
            self.attention = GridAttention(
                in_channels, self.grid_shape, kernel_size,
                reduction=reduction, min_hidden=min_hidden, temperature=temperature, norm=norm,
            )  # fmt: skip
        self.branches = nn.ModuleList(
            _Branch(
                in_channels, out_channels, kernel_size, padding=kernel_size // 2,
                bias=bias, padding_mode=padding,
            )
            for padding in self.paddings
        )  # fmt: skip

    @property
    def dynamic(self) -> bool:
        """Whether the layer has an attention."""
        return self.attention is not None

    @property
    def temperature(self) -> Tensor | None:
        """The attention's temperature, the state dict's `attention.temperature`."""
        return None if self.attention is None else self.attention.temperature

    def set_temperature(self, t: float) -> None:
        """Set what divides the attention's logits; nothing in a static layer.

        ValueError unless it is above 0.
        """
        if self.attention is None:
            GridAttention.checked_temperature(t)
        else:
            self.attention.set_temperature(t)

    def forward(self, x: Tensor, attention: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: Features, (B, C, H, W).
            attention: Gates (B, k*k, H, W) to use in place of the layer's own, or of none.

        Raises:
            ValueError: If a shape does not fit, or circular padding would wrap more than once.
        """
        check_input(x, self.in_channels, self.grid_shape)
        self._check_wrapping(tuple(x.shape[2:]))
        if attention is None and self.attention is None:
            return self.branches[0](x) + self.branches[1](x)
        gates = self.attention(x) if attention is None else attention
        wanted = (len(x), self.kernel_size**2, *x.shape[2:])
        if tuple(gates.shape) != wanted:
            raise ValueError(f"attention must be {wanted}, got {tuple(gates.shape)}")
        return self.branches[0](x, gates) + self.branches[1](x, gates)

    def _check_wrapping(self, grid: tuple[int, int]) -> None:
        reach = self.kernel_size // 2
        if "circular" in self.paddings and reach > min(grid):
            raise ValueError(
                f"circular padding of kernel_size={self.kernel_size} is {reach}, more than the "
                f"grid {grid} has cells; use a smaller kernel or other paddings"
            )

    def extra_repr(self) -> str:
        """Name the paddings."""
        return f"paddings={self.paddings}, dynamic={self.dynamic}"


def _checked_paddings(paddings: tuple[str, str]) -> tuple[Padding, Padding]:
    if len(paddings) != 2 or any(padding not in PADDINGS for padding in paddings):
        raise ValueError(f"paddings must be two of {sorted(PAD_MODES)}, got {paddings}")
    return PADDINGS[paddings[0]], PADDINGS[paddings[1]]
