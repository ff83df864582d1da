"""Sets of images to be measured: folders, IDX files or hub data sets."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

from morse.training.data import IDX_PREFIXES
from morse.training.idx import IDX_IMAGES, IDX_IMAGES_NAME, fit_images, read_idx
from morse.training.image_reading import IMAGE_SUFFIXES, as_image, find_images

HUB = "hub:"
NAMED_FILES = 10  # unreadable files that a result lists by name
LISTED_SIZES = 5


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order, opened one by one.

    Attributes:
        name: What to call the set in results: its path, or its name on the hub.
        names: What to call each image in errors.
        open: Opens image i.
        resolution: Each image's centre square is resized to this height and width as it is read;
            None takes images as they are.
    """

    name: str
    names: list[str]
    open: Callable[[int], Image.Image]
    resolution: int | None = None

    def __len__(self) -> int:
        """Give the number of images, readable or not."""
        return len(self.names)


@dataclass(frozen=True)
class SetOptions:
    """How a source is read; which of it matters depends on the source.

    Attributes:
        split: "train" or "test": which IDX file of a folder; any split of a hub data set.
        image_column: The column of a hub data set that holds the images.
        dataset_config_name: The configuration of a hub data set that has several.
        resolution: Height and width that images are given as training gives them; None for
            images as they are.
    """

    split: str = "train"
    image_column: str = "image"
    dataset_config_name: str | None = None
    resolution: int | None = None


AS_IT_IS = SetOptions()


@dataclass
class ReadingFacts:
    """What was met while a set was read; part of every result.

    Attributes:
        num_images: Images read.
        unreadable: "name: reason" of each image that could not be read.
        grey: Grey images whose channel was replicated because colour was wanted.
        to_grey: Colour images turned to luma because grey was wanted.
        alpha: Images with transparency, composited on white.
        sizes: How many images have each size, "width x height", once they are cropped and resized
            if that is asked for.
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


def describe_sizes(sizes: Counter[str]) -> str:
    """List sizes and their counts in words, the commonest first."""
    listed = ", ".join(f"{size} ({count})" for size, count in sizes.most_common(LISTED_SIZES))
    more = len(sizes) - LISTED_SIZES
    return listed + (f" and {more} more" if more > 0 else "")


def open_image_set(source: str, options: SetOptions = AS_IT_IS) -> ImageSet:
    """Open a set of images.

    Args:
        source: A folder, searched recursively for image files or holding IDX files; an IDX file;
            or "hub:NAME" for a data set of the Hugging Face hub.
        options: How it is read.

    Raises:
        FileNotFoundError: If there is nothing at `source`.
        ValueError: If it holds no images.
    """
    if source.startswith(HUB):
        return _open_hub(source.removeprefix(HUB), options)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"{source} does not exist; give a folder of images, an IDX file, statistics that end "
            f'in .npz, "fashion-mnist", or {HUB}NAME for a data set of the hub'
        )
    if path.is_file():
        return _open_idx(path, options.resolution)
    idx_files = sorted(path.glob(f"*{IDX_IMAGES_NAME}*"))
    if idx_files:
        start = IDX_PREFIXES.get(options.split, "-")
        chosen = [file for file in idx_files if file.name.startswith(start)]
        if not chosen:
            raise FileNotFoundError(f"split is {options.split!r}, but {path} has only {idx_files}")
        return _open_idx(chosen[0], options.resolution)
    images = image_files(path, find_images(path))
    return replace(images, resolution=options.resolution)


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


def _natural_order(file: Path) -> list[tuple[int, str]]:
    """Compare runs of digits as numbers, so that the n-th image is the one that is numbered n."""
    parts = re.split(r"([0-9]+)", str(file))
    # Every second part is a run of digits; others may hold such as the Unicode digit "²".
    return [(int(part) if i % 2 else 0, part) for i, part in enumerate(parts)]


def _open_idx(path: Path, resolution: int | None) -> ImageSet:
    array = read_idx(path, IDX_IMAGES)
    if resolution is not None:  # by training's rule for these, which may be a border
        array = fit_images(torch.from_numpy(array)[:, None], resolution)[:, 0].numpy()
    names = [f"{path}[{i}]" for i in range(len(array))]
    return ImageSet(str(path), names, lambda i: Image.fromarray(array[i]), resolution)


def _open_hub(name: str, options: SetOptions) -> ImageSet:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{HUB}{name} needs the `datasets` package; run `pip install datasets` or give a "
            "folder instead"
        ) from error
    config_name, split, column = options.dataset_config_name, options.split, options.image_column
    try:
        rows = load_dataset(name, config_name, split=split)
    except ValueError as error:  # which lists the configurations, or splits, that there are
        raise ValueError(
            f"{HUB}{name} with dataset_config_name {config_name!r} and split {split!r}: {error}"
        ) from error
    if column not in rows.column_names:
        raise ValueError(f"image_column is {column!r}; {name} has columns {rows.column_names}")
    names = [f"{name}/{split}[{i}]" for i in range(len(rows))]
    part = ", ".join(filter(None, (config_name, split)))
    known_as = f"{HUB}{name} ({part})"
    return ImageSet(known_as, names, lambda i: as_image(rows[i][column]), options.resolution)
