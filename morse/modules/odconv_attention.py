"""ODConv's attention: a squeeze-and-excite head with one output an axis.

Source: Li, Zhou and Yao, ICLR 2022 (arXiv 2209.07947), section 3.2. `morse.modules.odconv` has the
layer and the meaning of the letters in shapes.
"""

import math
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from morse.modules.kernel_stack import check_cond, kaiming_

AttentionNorm = Literal["batch", "layer", "group", "none"]


def head_widths(
    in_channels: int, out_channels: int, kernel_size: int, groups: int, kernel_num: int
) -> dict[str, int]:
    """Width of each attention; 0 where it would change nothing or repeat another."""
    depthwise = in_channels == out_channels == groups
    return {
        "channel": in_channels,
        "filter": 0 if depthwise else out_channels,
        "spatial": kernel_size**2 if kernel_size > 1 else 0,
        "kernel": kernel_num if kernel_num > 1 else 0,
    }


def hidden_width(in_channels: int, reduction: float, min_hidden: int) -> int:
    """Width of the hidden layer; ValueError unless both settings are above 0 and finite."""
    if not (0 < reduction < math.inf and 0 < min_hidden < math.inf):
        raise ValueError(
            f"reduction and min_hidden must be above 0 and finite, got {reduction} and {min_hidden}"
        )
    return max(int(in_channels * reduction), min_hidden)


class KernelAttention(nn.Module):
    """The head: (R, C) -> the attentions, one a row (ODConv, section 3.2 and Figure 2)."""

    def __init__(
        self, channels: int, hidden: int, widths: dict[str, int], norm: AttentionNorm
    ) -> None:
        """Create the hidden layer and a head for each name with a width above 0."""
        super().__init__()
        # 1x1 convolutions and the name "bn", whatever the norm, as in the authors' state dicts.
        self.fc = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn = _norm(norm, hidden)
        self.heads = tuple(widths)
        self.kernel_size = math.isqrt(widths["spatial"])
        for name, width in widths.items():
            head = nn.Conv2d(hidden, width, 1) if width else None
            self.add_module(f"{name}_fc", head)

    @property
    def num_gates(self) -> int:
        """How many sigmoid gates the layer has: 1, 2 or 3."""
        return sum(
            name != "kernel" and getattr(self, f"{name}_fc") is not None for name in self.heads
        )

    def reset_parameters(self, zero_heads: bool) -> None:
        """Initialise as the authors do, or with heads that read nothing yet."""
        # With `fc` at zero as well, no gradient would ever reach the matrices.
        kaiming_(self.fc.weight)
        if not isinstance(self.bn, nn.Identity):
            self.bn.reset_parameters()
        for name in self.heads:
            head = getattr(self, f"{name}_fc")
            if head is not None:
                nn.init.zeros_(head.weight) if zero_heads else kaiming_(head.weight)
                nn.init.zeros_(head.bias)

    def forward(self, source: Tensor, temperature: Tensor | float) -> dict[str, Tensor | None]:
        """Return what `ODConv2d.attentions` does: "kernel" by softmax, the others by sigmoid."""
        if isinstance(self.bn, nn.BatchNorm2d) and self.bn.training and len(source) == 1:
            raise ValueError(
                "attention_norm='batch' cannot train on a single row; build the layer with "
                "attention_norm='layer', 'group' or 'none', or freeze it with .attention.bn.eval()"
            )
        hidden = functional.relu(self.bn(self.fc(source[:, :, None, None])))
        gates: dict[str, Tensor | None] = {}
        for name in self.heads:
            head = getattr(self, f"{name}_fc")
            if head is None:
                gates[name] = None
                continue
            logits = head(hidden).flatten(1) / temperature
            gates[name] = logits.softmax(1) if name == "kernel" else logits.sigmoid()
        if gates["spatial"] is not None:
            gates["spatial"] = gates["spatial"].unflatten(1, 2 * (self.kernel_size,))
        return gates


def mix_candidates(weight: Tensor, gates: dict[str, Tensor | None]) -> Tensor:
    """Mix the candidates (n, O, I/g, k, k) and gate the taps.

    Returns:
        (R, O, I/g, k, k), or (1, O, I/g, k, k) when neither attention exists.
    """
    kernel = weight
    if gates["kernel"] is not None:
        kernel = (gates["kernel"] @ kernel.flatten(1)).unflatten(1, kernel.shape[1:])
    if gates["spatial"] is not None:
        kernel = kernel * gates["spatial"][:, None, None]
    return kernel


def assemble_kernel(weight: Tensor, gates: dict[str, Tensor | None], groups: int) -> Tensor:
    """Mix the candidates and apply all gates (Equation 2): (R, O, I/g, k, k)."""
    # The channel gate is indexed by the absolute input channel: (R, g, 1, I/g, 1, 1).
    channel = gates["channel"].unflatten(1, (groups, 1, -1))[..., None, None]
    kernel = mix_candidates(weight, gates).unflatten(1, (groups, -1))
    kernel = (kernel * channel).flatten(1, 2)
    if gates["filter"] is not None:
        kernel = kernel * gates["filter"][:, :, None, None, None]
    return kernel


def _norm(name: AttentionNorm, hidden: int) -> nn.Module:
    if name == "batch":
        return nn.BatchNorm2d(hidden)
    if name == "none":
        return nn.Identity()
    if name not in ("layer", "group"):
        raise ValueError(
            f"attention_norm must be 'batch', 'layer', 'group' or 'none', got {name!r}"
        )
    if hidden < 2:
        raise ValueError(f"attention_norm={name!r} needs min_hidden of at least 2")
    # On a map of one pixel, one group is layer norm; groups of fewer than 4 values say little.
    groups = 1 if name == "layer" else next(g for g in (4, 2, 1) if g == 1 or hidden % (4 * g) == 0)
    return nn.GroupNorm(groups, hidden)


def square(kernel_size: int | tuple[int, int]) -> int:
    """Return the number of taps along each axis; ValueError unless both are equal."""
    taps = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(taps) != 2 or taps[0] != taps[1] or taps[0] < 1:
        raise ValueError(f"kernel_size must be square and at least 1, got {kernel_size}")
    return taps[0]


def check_inputs(x: Tensor, cond: Tensor | None, channels: int, cond_dim: int | None) -> None:
    """Raise ValueError unless x is (B, channels, H, W) and cond (B or 1, cond_dim) or absent."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x must be (B, {channels}, H, W), got {tuple(x.shape)}")
    check_cond(cond, len(x), cond_dim)


def check_sizes(
    in_channels: int, out_channels: int, groups: int, kernel_num: int, cond_dim: int | None
) -> None:
    """Raise ValueError unless all are at least 1 and `groups` divides the channels."""
    sizes = {
        "in_channels": in_channels, "out_channels": out_channels, "groups": groups,
        "kernel_num": kernel_num, "cond_dim": 1 if cond_dim is None else cond_dim,
    }  # fmt: skip
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if in_channels % groups or out_channels % groups:
        raise ValueError(
            f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}"
        )


def check_source(conv: nn.Conv2d, noise: float) -> None:
    """Raise TypeError or ValueError unless `ODConv2d.from_conv` can take these."""
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"conv must be a torch.nn.Conv2d, got {type(conv).__name__}")
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(
            f"conv must pad with zeros, by numbers; got padding_mode={conv.padding_mode!r}, "
            f"padding={conv.padding!r}"
        )
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
