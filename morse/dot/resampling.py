"""How Dot's up-sampling blocks double the resolution: by copying, or as Ske2Grid learns to.

Ske2Grid's up-sampling transform (Cai et al., ICML 2023, arXiv 2308.07571) is a learned matrix from
the cells of a grid to those of a finer one, for all channels the same. Its transform of indices
places the results on cells. Here that one stays as it starts: every row of the matrix is learned,
so that a learned order of the rows could add nothing.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from morse.modules.ske2grid_index import MAX_ENTRIES
from morse.modules.ske2grid_upsampling import Shape, UpsamplingTransform

Resample = Literal["nearest", "ske2grid"]


class GridUpsample(nn.Module):
    """Double the resolution with learned weights: (B, C, h, w) -> (B, C, 2h, 2w).

    At first each position is copied to 2x2, as `torch.nn.Upsample` does.

    Args:
        size: Height h and width w of what comes in.

    Raises:
        ValueError: If a matrix for this size would be too large.
    """

    def __init__(self, size: Shape) -> None:
        """Create the matrix."""
        super().__init__()
        height, width = size
        self.fine_size = (2 * height, 2 * width)
        entries = 4 * (height * width) ** 2
        if entries > MAX_ENTRIES:
            raise ValueError(
                f"resample='ske2grid' would learn a matrix of {entries} weights from {height}x"
                f"{width} to {2 * height}x{2 * width} positions, and {MAX_ENTRIES} are allowed: "
                "use resample='nearest', or smaller pictures."
            )
        self.upt = UpsamplingTransform.from_grids(size, self.fine_size, "nearest")
        self.register_buffer("placement", self.upt.placement, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Interpolate and place the positions."""
        nodes = self.upt(hidden.flatten(2).transpose(1, 2))
        return nodes.index_select(1, self.placement).transpose(1, 2).unflatten(2, self.fine_size)


def set_upsamplers(
    up_blocks: Sequence[nn.Module],
    resample: Resample,
    sample_size: Sequence[int] | None,
    size_multiple: int,
    patch_size: int,
) -> None:
    """Give Dot's up-sampling blocks their up-samplers.

    Args:
        up_blocks: The blocks, from the innermost outwards.
        resample: "nearest" changes nothing.
        sample_size: Height and width of the samples, for "ske2grid".
        size_multiple: What both must be multiples of.
        patch_size: Rows and columns of the sample in one position.

    Raises:
        ValueError: If `resample` is not known, or `sample_size` does not suit it.
    """
    if resample not in get_args(Resample):
        raise ValueError(f"resample must be one of {get_args(Resample)}, got {resample!r}.")
    if resample == "nearest":
        if sample_size is not None:
            raise ValueError(
                f"sample_size is {tuple(sample_size)}, but only resample='ske2grid' is bound to a "
                "size: leave sample_size out."
            )
        return
    if sample_size is None:
        raise ValueError(
            "sample_size is None, but resample='ske2grid' learns weights for one size, which Dash "
            "does not name: give sample_size=(height, width)."
        )
    height, width = sample_size
    if min(height, width) < 1 or height % size_multiple or width % size_multiple:
        raise ValueError(
            f"sample_size must be positive multiples of {size_multiple}, got {height}x{width}."
        )
    # Samples of patches are filled up until Dot's blocks divide them: see `Grid.spread`.
    multiple = patch_size * 2 ** len(up_blocks)
    rows, columns = (-(-side // multiple) for side in (height, width))
    for level, block in enumerate(up_blocks):
        block.upsample = GridUpsample((rows * 2**level, columns * 2**level))
