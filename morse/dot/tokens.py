"""Transformers at low resolution: one token in place of a square of tokens.

Such a token gets the *average* of its square's position embeddings. Dash's own embeddings for a
smaller sample would be others: Stable Diffusion 3 takes the centre of its table, and the positions
of Flux would count a smaller picture.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from morse.dot.grid import Grid
from morse.dot.shell import Provide, original_of, run_hooked, with_replaced

# A ControlNet's features, at Dash's resolution.
_FEATURES = (
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)


class Tap(nn.Module):
    """Takes the last layer's place, keeps what came in and returns zeros of the layer's shape."""

    def __init__(self, out_features: int) -> None:
        """Make a tap for a layer with `out_features`."""
        super().__init__()
        self.out_features = out_features
        self.tokens: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Keep the tokens, (B, N, C)."""
        self.tokens = tokens
        return tokens.new_zeros(1).expand(*tokens.shape[:-1], self.out_features)


def to_tokens(picture: Tensor) -> Tensor:
    """Line up the positions of a picture, (B, C, H, W), as tokens, (B, H * W, C)."""
    return picture.flatten(2).transpose(1, 2)


def pool_tokens(tokens: Tensor, size: tuple[int, int], factor: int) -> Tensor:
    """Average tokens (..., H * W, C) over squares of `factor`, at the border over what is left."""
    picture = tokens.transpose(-1, -2).unflatten(-1, size)
    pooled = functional.avg_pool2d(picture, factor, ceil_mode=True)
    return pooled.flatten(-2).transpose(-1, -2)


def position_embeddings(embed: nn.Module, height: int, width: int, like: Tensor) -> Tensor:
    """Give what a `PatchEmbed` adds to a sample's tokens, (1, N, C) in float32, beside `like`.

    Its weights may be elsewhere, where they are offloaded.
    """
    patch, channels = embed.patch_size, embed.proj.weight.shape[0]
    nothing = like.new_zeros(1, channels, height // patch, width // patch).float()
    shell = with_replaced(embed, {"proj": Provide(nothing)})
    function = partial(type(shell).forward, shell)
    return run_hooked(original_of(embed), function, like.new_zeros(1).expand(1, 1, height, width))


def tokens_of_patches(
    embed: nn.Module, features: Tensor, grid: Grid, factor: int
) -> tuple[Tensor, Tensor]:
    """Prepare features for a transformer that cuts pictures into patches.

    Args:
        embed: Its `PatchEmbed`.
        features: Dot's, (B, C, h, w), one position for a square of tokens.
        grid: The sample's.
        factor: Rows and columns of such a square.

    Returns:
        The tokens with their positions, (B, h * w, C), and a sample that has as many, empty.
    """
    size = grid.height // embed.patch_size, grid.width // embed.patch_size
    positions = position_embeddings(embed, grid.height, grid.width, features)
    tokens = to_tokens(features) + pool_tokens(positions, size, factor).to(features.dtype)
    height, width = (side * embed.patch_size for side in features.shape[-2:])
    return tokens, features.new_zeros(1).expand(len(features), 1, height, width)


def pool_conditions(
    conditions: dict[str, object], size: tuple[int, int], factor: int
) -> dict[str, object]:
    """Bring what Dash's forward method takes for every token to Dot's fewer tokens.

    Positions (`img_ids`) and a ControlNet's features are averaged over squares; a token stays
    masked (`attention_mask`) where its whole square is.

    Args:
        conditions: Keyword arguments of Dash's forward method; the others are handed on as given.
        size: Rows and columns of Dash's tokens.
        factor: Rows and columns of a square.
    """
    pooled = dict(conditions)
    given = {name: value for name, value in conditions.items() if value is not None}
    if "img_ids" in given:
        ids = given["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        pooled["img_ids"] = pool_tokens(ids.float(), size, factor)
    if "attention_mask" in given:
        mask = given["attention_mask"].float().unflatten(-1, size)
        pooled["attention_mask"] = functional.max_pool2d(mask, factor, ceil_mode=True).flatten(-2)
    for name in _FEATURES:
        if name in given:
            pooled[name] = [pool_tokens(each, size, factor) for each in given[name]]
    return pooled
