"""Sets of images to be measured: folders, IDX files or hub data sets, read in batches of bytes."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from morse.training.data import IDX_PREFIXES
from morse.training.idx import IDX_IMAGES, IDX_IMAGES_NAME, read_idx
from morse.training.image_reading import (
    BROKEN,
    IMAGE_SUFFIXES,
    has_alpha,
    is_image,
    to_bytes,
    to_channels,
)

HUB = "hub:"
NAMED_FILES = 10  # unreadable files that a result lists by name


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order, opened one by one.

    Attributes:
        name: What to call the set in results: its path, or its name on the hub.
        names: What to call each image in errors.
        open: Opens image i.
    """

    name: str
    names: list[str]
    open: Callable[[int], Image.Image]

    def __len__(self) -> int:
        """Give the number of images, readable or not."""
        return len(self.names)


@dataclass
class ReadingFacts:
    """What was met while a set was read; part of every result.

    Attributes:
        num_images: Images read.
        unreadable: "name: reason" of each image that could not be read.
        grey: Grey images whose channel was replicated because colour was wanted.
        to_grey: Colour images turned to luma because grey was wanted.
        alpha: Images with transparency, composited on white.
        sizes: How many images have each size, "width x height".
    """

    num_images: int = 0
    unreadable: list[str] = field(default_factory=list)
    grey: int = 0
    to_grey: int = 0
    alpha: int = 0
    sizes: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, object]:
        """Return the counts, and the names of the first unreadable images."""
        return {
            "num_images": self.num_images,
            "num_unreadable": len(self.unreadable),
            "unreadable": self.unreadable[:NAMED_FILES],
            "grey_replicated": self.grey,
            "colour_to_grey": self.to_grey,
            "alpha_composited_on_white": self.alpha,
            "sizes": dict(self.sizes),
        }

    def notes(self, name: str) -> list[str]:
        """Say in words what was not plain about the set `name`."""
        counts = (
            (len(self.unreadable), f"could not be read and were left out: {self._first_names()}"),
            (self.alpha, "have transparency and were composited on white"),
            (self.grey, "are grey; their channel was replicated"),
            (self.to_grey, "are in colour; their luma was used"),
        )
        found = [f"{name}: {count} images {what}" for count, what in counts if count]
        if len(self.sizes) > 1:
            found.append(f"{name}: sizes are mixed: {describe_sizes(self.sizes)}")
        if any(len(set(size.split("x"))) > 1 for size in self.sizes):
            found.append(
                f"{name}: not all images are square; Inception and DINOv2 get them squeezed, CLIP "
                "their centre"
            )
        return found

    def _first_names(self) -> str:
        more = len(self.unreadable) - NAMED_FILES
        return "; ".join(self.unreadable[:NAMED_FILES]) + (f"; and {more} more" * (more > 0))


def describe_sizes(sizes: Counter[str], most: int = 5) -> str:
    """List sizes and their counts in words, the commonest first."""
    listed = ", ".join(f"{size} ({count})" for size, count in sizes.most_common(most))
    return listed + (f" and {len(sizes) - most} more" if len(sizes) > most else "")


def open_image_set(source: str, split: str = "train", image_column: str = "image") -> ImageSet:
    """Open a set of images.

    Args:
        source: A folder, searched recursively for image files or holding IDX files; an IDX file;
            or "hub:NAME" for a data set of the Hugging Face hub.
        split: "train" or "test": which IDX file of a folder; any split of a hub data set.
        image_column: The column of a hub data set that holds the images.

    Raises:
        FileNotFoundError: If there is nothing at `source`.
        ValueError: If it holds no images.
    """
    if source.startswith(HUB):
        return _open_hub(source.removeprefix(HUB), split, image_column)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"{source} does not exist; give a folder of images, an IDX file, statistics that end "
            f'in .npz, "fashion-mnist", or {HUB}NAME for a data set of the hub'
        )
    if path.is_file():
        return _open_idx(path)
    idx_files = sorted(path.glob(f"*{IDX_IMAGES_NAME}*"))
    if idx_files:
        chosen = [file for file in idx_files if file.name.startswith(IDX_PREFIXES.get(split, "-"))]
        if not chosen:
            raise FileNotFoundError(f"split is {split!r}, but {path} has only {idx_files}")
        return _open_idx(chosen[0])
    return image_files(path, list(filter(is_image, path.rglob("*"))))


def image_files(folder: Path, files: list[Path]) -> ImageSet:
    """Make a set of the given files of a folder, in the order of their names, 2.png before 10.png.

    Raises:
        ValueError: If there are none.
    """
    files = sorted(files, key=_natural_order)
    if not files:
        raise ValueError(
            f"{folder} has no images: expected files ending in {sorted(IMAGE_SUFFIXES)} or IDX "
            "files like train-images-idx3-ubyte.gz"
        )
    return ImageSet(str(folder), [str(file) for file in files], lambda i: Image.open(files[i]))


def _natural_order(file: Path) -> list[tuple[bool, int, str]]:
    """Compare runs of digits as numbers, so that the n-th image is the one that is numbered n."""
    parts = re.split(r"([0-9]+)", str(file))
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _open_idx(path: Path) -> ImageSet:
    array = read_idx(path, IDX_IMAGES)
    if array.size == 0:
        raise ValueError(f"{path} holds no images (its shape is {array.shape})")
    names = [f"{path}[{i}]" for i in range(len(array))]
    return ImageSet(str(path), names, lambda i: Image.fromarray(array[i]))


def _open_hub(name: str, split: str, column: str) -> ImageSet:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{HUB}{name} needs the `datasets` package; run `pip install datasets` or give a "
            "folder instead"
        ) from error
    rows = load_dataset(name, split=split)
    if column not in rows.column_names:
        raise ValueError(f"image_column is {column!r}; {name} has columns {rows.column_names}")
    names = [f"{name}/{split}[{i}]" for i in range(len(rows))]
    return ImageSet(f"{HUB}{name} ({split})", names, lambda i: rows[i][column])


def read_batches(
    images: ImageSet, channels: int, batch_size: int, facts: ReadingFacts, strict: bool = False
) -> Iterator[Tensor]:
    """Read a set in order, in batches of images of one size.

    Pixels are those of the file: EXIF rotation is left alone, as pytorch-fid and torch-fidelity do.

    Args:
        images: The set.
        channels: 1 for grey, 3 for colour.
        batch_size: At most so many images a batch; a change of size begins a new one.
        facts: Filled while reading.
        strict: Raise at the first unreadable image instead of leaving it out.

    Yields:
        (B, channels, H, W), uint8.

    Raises:
        ValueError: If an image cannot be read and `strict` is on, or if none can.
    """

    def read(index: int) -> tuple[Tensor, Image.Image] | Exception:
        try:
            with images.open(index) as image:
                return to_bytes(to_channels(image, channels)), image
        except BROKEN as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(images), batch_size):
            chunk = range(first, min(first + batch_size, len(images)))
            kept = []
            for index, result in zip(chunk, pool.map(read, chunk), strict=True):
                if isinstance(result, Exception):
                    _note_unreadable(images.names[index], result, facts, strict)
                else:
                    _note(result[1], channels, facts)
                    kept.append(result[0])
            for _, run in groupby(kept, key=lambda pixels: pixels.shape):
                yield torch.stack(list(run))
    if not facts.num_images:
        raise ValueError(
            f"{images.name}: none of {len(images)} images can be read: {facts.unreadable[0]}"
        )


def _note_unreadable(name: str, error: Exception, facts: ReadingFacts, strict: bool) -> None:
    if strict:
        raise ValueError(f"{name} cannot be read as an image: {error}; remove it") from error
    facts.unreadable.append(f"{name} ({error})")


def _note(image: Image.Image, channels: int, facts: ReadingFacts) -> None:
    is_grey = image.mode in ("L", "LA", "1")
    facts.num_images += 1
    facts.grey += is_grey and channels == 3
    facts.to_grey += not is_grey and channels == 1
    facts.alpha += has_alpha(image)
    facts.sizes[f"{image.width}x{image.height}"] += 1
