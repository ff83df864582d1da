"""ScaleKD's cross attention projector: a student's map becomes tokens of a teacher's kind.

Source: Fan, Li, Liu, Yao, "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers",
NeurIPS 2024, arXiv 2411.06786, and the authors' code.
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from morse.distillation.functional import check_fits, require

InputNorm = Literal["batch", "group", "layer", "none"]

# What names in the authors' code begin with -> here; the first that fits counts.
OFFICIAL_NAMES = {
    "proj_student.0.": "input_conv.", "proj_student.1.": "input_norm.",
    "proj_pos.0.": "query_proj.", "pos_attention.proj.": "attention.out.",
    "pos_attention.": "attention.", "ffn.layers.0.0.": "ffn.0.", "ffn.layers.1.": "ffn.2.",
    "query.weight": "query",
}  # fmt: skip


class CrossAttentionProjector(nn.Module):
    """The cross attention projector, CAP (ScaleKD, Fan et al. 2024, arXiv 2411.06786).

    Each teacher position asks, by a learned query or one given from outside, what the student's
    map holds for it: a convolution and a learned position embedding make the keys and values, one
    cross-attention and one feed-forward network the tokens. For training only.

    Args:
        student_channels: Channels Cs of the student's map.
        teacher_channels: Width Ct of the tokens.
        query_hw: Height and width of the token grid, of Lq = height * width tokens.
        input_hw: Height and width (h, w) of the student's map; those of `query_hw` by default.
        num_heads: Attention heads; divides Ct.
        softmax_scale: Factor of the attention logits beside 1 / sqrt(Ct / num_heads), above 0.
        ffn_ratio: Hidden width of the feed-forward network, in Ct.
        learned_query: Whether there are learned queries; otherwise each call gives some.
        norm: Norm after the convolution. "batch" is the authors', "layer" (over the channels of
            each position) theirs for ConvNeXt; "group" (up to 32) mixes no samples, hence no
            diffusion timesteps; "none" leaves it out.

    Raises:
        ValueError: If an argument is out of its range, or Ct is not divisible by `num_heads`.

    Example:
        >>> import torch
        >>> from morse.distillation import CrossAttentionProjector
        >>> projector = CrossAttentionProjector(6, 16, (8, 8), (4, 4), num_heads=4, norm="group")
        >>> projector(torch.zeros(2, 6, 4, 4)).shape  # 16 positions of 6 -> 64 tokens of 16
        torch.Size([2, 64, 16])
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        query_hw: tuple[int, int],
        input_hw: tuple[int, int] | None = None,
        *,
        num_heads: int = 8,
        softmax_scale: float = 5.0,
        ffn_ratio: int = 4,
        learned_query: bool = True,
        norm: InputNorm = "batch",
    ) -> None:
        """Check the settings and create the layers."""
        super().__init__()
        self.query_hw = _checked_grid("query_hw", query_hw)
        self.input_hw = _checked_grid("input_hw", query_hw if input_hw is None else input_hw)
        for name, count in (
            ("student_channels", student_channels), ("teacher_channels", teacher_channels),
            ("num_heads", num_heads), ("ffn_ratio", ffn_ratio),
        ):  # fmt: skip
            require(count >= 1, f"{name} must be 1 or more, got {count}.")
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.input_conv = nn.Conv2d(student_channels, student_channels, 3, padding=1)
        self.input_norm = _make_norm(norm, student_channels)
        self.pos_embed = nn.Parameter(torch.empty(1, student_channels, *self.input_hw))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        width = teacher_channels
        self.query_proj = nn.Conv2d(width, width, 1)
        self.attention = CrossAttention(student_channels, width, num_heads, softmax_scale)
        self.norm = nn.LayerNorm(width)
        hidden = int(ffn_ratio * width)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        query = (
            nn.Parameter(torch.randn(math.prod(self.query_hw), width)) if learned_query else None
        )
        self.register_parameter("query", query)

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """Project a student's map.

        Args:
            x: Map (B, Cs, h, w), or its tokens (B, h * w, Cs), row-major.
            query: Queries (B, Lq, Ct) in place of the learned ones.

        Returns:
            Tokens, (B, Lq, Ct), row-major.

        Raises:
            ValueError: If a shape does not fit, or there is no query at all.
        """
        x = self._to_map(x)
        grid = self._query_map(query, len(x))
        keys = self.input_norm(self.input_conv(x)).relu() + self.pos_embed
        queries = self.query_proj(grid).relu()
        tokens = self.attention(_to_tokens(queries).expand(len(x), -1, -1), _to_tokens(keys))
        tokens = self.norm(tokens)
        return tokens + self.ffn(tokens)

    def load_official(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
        """Load a projector from a state dict of the authors' code.

        Args:
            state_dict: Entries that do not begin with `prefix` are ignored.
            prefix: As in "distill_losses.loss_fmd_s3.projector_0.".

        Raises:
            ValueError: If names or shapes differ; nothing is loaded then.
        """
        self.load_state_dict(self.rename_official(state_dict, prefix))

    def rename_official(self, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Return what `load_official` loads, by the names here; it takes and raises the same."""
        state = {}
        for name, value in state_dict.items():
            if not name.startswith(prefix):
                continue
            name = name.removeprefix(prefix)
            theirs = next((each for each in OFFICIAL_NAMES if name.startswith(each)), None)
            if theirs is not None:
                name = OFFICIAL_NAMES[theirs] + name.removeprefix(theirs)
            state[name] = value
        check_fits(state, self, f"state_dict under prefix={prefix!r}")
        return state

    def _to_map(self, x: Tensor) -> Tensor:
        height, width = self.input_hw
        channels = self.student_channels
        if x.ndim == 3 and x.shape[1:] == (height * width, channels):
            return x.transpose(1, 2).unflatten(2, (height, width))
        fits = x.ndim == 4 and x.shape[1:] == (channels, height, width)
        shapes = f"(B, {channels}, {height}, {width}) or (B, {height * width}, {channels})"
        require(fits, f"x must be {shapes} by input_hw, got {tuple(x.shape)}.")
        return x

    def _query_map(self, query: Tensor | None, batch: int) -> Tensor:
        expected = (batch, math.prod(self.query_hw), self.teacher_channels)
        if query is None:
            needed = f"query must be {expected}: there is no learned one (learned_query=False)."
            require(self.query is not None, needed)
            query = self.query[None]
        else:
            got = tuple(query.shape)
            require(got == expected, f"query must be {expected} by query_hw, got {got}.")
        return query.transpose(1, 2).unflatten(2, self.query_hw)


class CrossAttention(nn.Module):
    """Multi-head attention of queries (B, Lq, Ct) to keys (B, Lk, Cs), without a residual."""

    def __init__(
        self, key_channels: int, channels: int, num_heads: int, softmax_scale: float
    ) -> None:
        """Create the four linear layers."""
        super().__init__()
        divides = channels % num_heads == 0
        require(divides, f"num_heads={num_heads} must divide teacher_channels={channels}.")
        finite = 0 < softmax_scale < math.inf
        require(finite, f"softmax_scale must be finite and above 0, got {softmax_scale}.")
        self.num_heads = num_heads
        self.scale = softmax_scale * (channels // num_heads) ** -0.5
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(key_channels, channels)
        self.v = nn.Linear(key_channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Attend; (B, Lq, Ct)."""
        q, k, v = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.q(queries), self.k(keys), self.v(keys))
        )  # (B, heads, L, Ct / heads)
        mixed = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(mixed.transpose(1, 2).flatten(2))


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of maps (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _make_norm(name: str, channels: int) -> nn.Module:
    allowed = get_args(InputNorm)
    require(name in allowed, f"norm must be one of {allowed}, got {name!r}.")
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "layer":
        return ChannelLayerNorm(channels)
    if name == "none":
        return nn.Identity()
    # Groups of fewer than 4 channels would lose most of what these hold.
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if g == 1 or channels % (4 * g) == 0)
    return nn.GroupNorm(groups, channels)


def _checked_grid(name: str, grid: tuple[int, int]) -> tuple[int, int]:
    fits = len(grid) == 2 and all(isinstance(size, int) and size >= 1 for size in grid)
    require(fits, f"{name} must be a height and a width of at least 1, got {grid}.")
    return tuple(grid)


def _to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)
