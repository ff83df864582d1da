"""Samples as pictures of a size that Dot's blocks halve evenly, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from morse.dot.ports import Ports

# Reading positions off a GPU waits for it; pipelines give the same tensor at every step.
_SIZES = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Grid:
    """How one call's sample lies in the plane.

    Attributes:
        height: Of the sample as a picture.
        width: Of the same.
        packed: Whether the sample is a sequence of the picture's positions, (B, H * W, C).
        multiple: Pictures are filled up to multiples of this; 1 leaves them as they are.
    """

    height: int
    width: int
    packed: bool
    multiple: int

    def spread(self, sample: Tensor) -> Tensor:
        """Lay a sample out as a picture, (B, C, H', W'), its last row and column repeated."""
        if self.packed:
            sample = sample.transpose(1, 2).unflatten(2, (self.height, self.width))
        missing = (0, -self.width % self.multiple, 0, -self.height % self.multiple)
        return functional.pad(sample, missing, mode="replicate") if any(missing) else sample

    def gather(self, picture: Tensor) -> Tensor:
        """Undo `spread`."""
        picture = picture[..., : self.height, : self.width]
        return picture.flatten(2).transpose(1, 2) if self.packed else picture


def find_grid(
    ports: Ports, sample: Tensor, img_ids: Tensor | None, config: Mapping[str, object]
) -> Grid:
    """Find the grid of a sample.

    Args:
        ports: Those of Dash.
        sample: (B, C, H, W), or packed (B, L, C).
        img_ids: Positions of packed samples, (L, 3): a constant, the row and the column.
        config: Dot's: `size_multiple`, `patch_size` and `num_down_blocks`.

    Raises:
        ValueError: If the size does not fit.
    """
    size_multiple, num_down_blocks = config["size_multiple"], config["num_down_blocks"]
    # A UNet's halvings follow its own rules, which `size_multiple` has in it.
    fill = 1 if ports.features == "picture" else config["patch_size"] * 2**num_down_blocks
    if ports.features == "packed":
        return Grid(*_packed_size(sample.shape[1], img_ids), packed=True, multiple=fill)
    height, width = sample.shape[-2:]
    if height % size_multiple or width % size_multiple:
        raise ValueError(
            f"sample is {height}x{width}, but this Dot (num_down_blocks={num_down_blocks}) needs "
            f"multiples of {size_multiple}: use such a size, or train a Dot with fewer down blocks."
        )
    return Grid(height, width, packed=False, multiple=fill)


def with_sample_size(options: dict[str, object], size: object) -> dict[str, object]:
    """Complete options that tie a Dot to one size of samples.

    Args:
        options: Those of `MorseDot`.
        size: What Dash's config names: height and width, one number for both, or None.
    """
    conv_options = options.get("conv_options") or {}
    if options.get("conv") == "gridconv" and conv_options.get("sample_size") is None:
        options = {**options, "conv_options": {**conv_options, "sample_size": size}}
    if options.get("resample") == "ske2grid" and size and not options.get("sample_size"):
        pair = (size, size) if isinstance(size, int) else tuple(size)
        options = {**options, "sample_size": pair}
    return options


def check_size(grid: Grid, size: Sequence[int] | None, option: str) -> None:
    """Raise `ValueError` unless a sample has the size that an option ties Dot to.

    Args:
        grid: The sample's.
        size: Height and width; None for any.
        option: What ties it, as one writes it: "conv='gridconv'".
    """
    if size is not None and tuple(size) != (grid.height, grid.width):
        height, width = size
        raise ValueError(
            f"sample is {grid.height}x{grid.width}, but this Dot ({option}) is made for "
            f"{height}x{width} alone: use that size, or train a Dot for this one or without "
            f"{option}."
        )


def _packed_size(length: int, img_ids: Tensor | None) -> tuple[int, int]:
    if img_ids is None:
        raise ValueError("img_ids is None, but a packed sample's height and width come from it.")
    if img_ids not in _SIZES:
        _SIZES[img_ids] = _read_size(img_ids[0] if img_ids.ndim == 3 else img_ids)
    height, width = _SIZES[img_ids]
    if height * width != length:
        raise ValueError(
            f"sample has {length} tokens, but img_ids are {tuple(img_ids.shape)} positions that "
            f"are {f'a {height}x{width} picture' if height else 'not the rows of one picture'}; "
            "a weight-shared Dot needs one picture's tokens and nothing else (no reference "
            "pictures appended). Leave Dot out here, or attach one of your own."
        )
    return height, width


def _read_size(img_ids: Tensor) -> tuple[int, int]:
    """Give rows and columns of positions (L, 3), (0, 0) if they are not those of one picture."""
    length = len(img_ids)
    if img_ids.is_meta:  # where only shapes count
        width = int(length**0.5)
        return length // width, width
    width = int((img_ids[:, 1] == img_ids[0, 1]).sum())
    if length % width:
        return 0, 0
    constant, row, column = img_ids.unflatten(0, (-1, width)).unbind(-1)
    steady = (constant == constant[0, 0]) & (row == row[:, :1]) & (column == column[:1])
    return (length // width, width) if bool(steady.all()) else (0, 0)
