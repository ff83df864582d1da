"""Training images behind one interface."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from morse.training.captions import read_metadata
from morse.training.contents import describe_files, describe_pixels, describe_rows
from morse.training.hub_rows import load_parts, read_captions, read_labels
from morse.training.idx import (
    IDX_IMAGES,
    IDX_IMAGES_NAME,
    find_idx,
    fit_images,
    read_idx,
    read_idx_labels,
)
from morse.training.image_reading import IMAGE_SUFFIXES, find_images, read_files, read_rows

if TYPE_CHECKING:
    from morse.training.common import TrainingConfig

T = TypeVar("T")

HELD_OUT_EVERY = 20
IDX_PREFIXES = {"train": "train", "test": "t10k"}


class ImageDataset(Dataset):
    """Images of one size as unsigned bytes.

    Args:
        fetch: Turns a list of n indices into images, (n, C, H, W) uint8.
        length: The number of images.
        labels: Class numbers, (length,) int64, where the source has them.
        captions: A text for each image, where they were asked for.
        contents: Tells these images from others, briefly; called for caches alone.
    """

    def __init__(
        self,
        fetch: Callable[[list[int]], Tensor],
        length: int,
        labels: Tensor | None = None,
        captions: list[str] | None = None,
        contents: Callable[[], str | None] | None = None,
    ) -> None:
        """Keep the source; nothing is read yet."""
        self.fetch = fetch
        self.length = length
        self.labels = labels
        self.captions = captions
        self.contents = contents

    def __len__(self) -> int:
        """Give the number of images."""
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        """Give one image, (C, H, W) uint8."""
        return self.fetch([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Give many images at once, (len(indices), C, H, W) uint8."""
        return self.fetch(list(indices))


def in_batches(images: Dataset[T], rows: Sequence[int], size: int) -> Iterator[T]:
    """Read chosen rows in batches of `size`; the last may be smaller."""
    for start in range(0, len(rows), size):
        yield images.__getitems__(list(rows[start : start + size]))


def to_model_range(images: Tensor) -> Tensor:
    """Map bytes in [0, 255] to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def open_training_images(
    config: "TrainingConfig",
    resolution: int,
    channels: int,
    split: Literal["train", "test"] = "train",
    caption_column: str | None = None,
) -> ImageDataset:
    """Open the images that a training's settings name, files or a dataset on the hub.

    The rest is as for `open_images`, but that `caption_column` may be a column of that dataset.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; it must be 1 (grey) or 3 (colour)")
    if config.dataset_name is not None:
        return _open_hub(config, resolution, channels, split, caption_column)
    return open_images(config.train_data_dir, resolution, channels, split, caption_column)


def open_images(
    train_data_dir: Path,
    resolution: int,
    channels: int,
    split: Literal["train", "test"] = "train",
    caption_column: str | None = None,
) -> ImageDataset:
    """Open image files and give all of them the same size.

    Args:
        train_data_dir: An IDX file, a folder of IDX files (`train-images-idx3-ubyte[.gz]`,
            `t10k-...`), or a folder of images, searched recursively. When that folder has both
            a `train` and a `test` folder, `split` chooses between them; a source without a
            test part holds out every 20th image.
        resolution: Height and width. IDX images that are smaller by an even number get a black
            border; all others are resized by their shorter side and cropped at the centre.
        channels: 1 for grey, 3 for colour.
        split: Which part of the data.
        caption_column: What captions are called in the nearest `metadata.jsonl`, an image's
            folder's or one's above; None for no captions.

    Raises:
        FileNotFoundError: `train_data_dir` doesn't exist.
        ValueError: No or broken images, no captions; the message names the file.
    """
    path = Path(train_data_dir)
    if not path.exists():
        raise FileNotFoundError(f"train_data_dir is {path}, which does not exist")
    is_idx_folder = any(path.glob(f"*{IDX_IMAGES_NAME}*"))
    if caption_column is not None and (path.is_file() or is_idx_folder):
        raise ValueError(
            f"caption_column is {caption_column!r}, but IDX files such as those of {path} have no "
            "captions; give class_names instead"
        )
    train_name = f"{IDX_PREFIXES['train']}{IDX_IMAGES_NAME}"
    if path.is_file() and path.name.startswith(train_name):  # its test part may lie beside it
        return _open_idx_folder(path.parent, resolution, channels, split)
    if path.is_file():
        return _open_idx(path, resolution, channels, split)
    if is_idx_folder:
        return _open_idx_folder(path, resolution, channels, split)
    return _open_folder(path, resolution, channels, split, caption_column)


def _open_idx_folder(
    folder: Path, resolution: int, channels: int, split: Literal["train", "test"]
) -> ImageDataset:
    names = {part: f"{prefix}{IDX_IMAGES_NAME}" for part, prefix in IDX_PREFIXES.items()}
    found = {part: find_idx(folder, name) for part, name in names.items()}
    has_test = found["test"] is not None
    path = found[split if has_test else "train"]
    if path is None:
        name = names["train"]
        raise FileNotFoundError(f"{folder} has IDX files, but neither {name} nor {name}.gz")
    return _open_idx(path, resolution, channels, None if has_test else split)


def _open_idx(path: Path, resolution: int, channels: int, split: str | None) -> ImageDataset:
    """Open a whole IDX file, or its part for a `split` where it serves for both."""
    array = read_idx(path, IDX_IMAGES)
    labels = read_idx_labels(path, len(array))
    if split is not None:
        rows = np.array(held_out_rows(len(array), split))
        array, labels = array[rows], None if labels is None else labels[rows]
    images = fit_images(torch.from_numpy(array)[:, None], resolution)
    contents = partial(describe_pixels, images)
    return ImageDataset(partial(_gather, images, channels), len(images), labels, contents=contents)


def _gather(images: Tensor, channels: int, indices: list[int]) -> Tensor:
    chosen = images[torch.tensor(indices)]
    return chosen if channels == 1 else chosen.repeat(1, channels, 1, 1)


def _open_folder(
    root: Path, resolution: int, channels: int, split: str, caption_column: str | None
) -> ImageDataset:
    has_splits = all((root / name).is_dir() for name in IDX_PREFIXES)
    path = root / split if has_splits else root
    files = sorted(find_images(path))
    if not files:
        raise ValueError(
            f"train_data_dir is {path}, which has no images: expected files ending in "
            f"{sorted(IMAGE_SUFFIXES)} or IDX files like train-images-idx3-ubyte.gz"
        )
    if not has_splits:
        files = [files[index] for index in held_out_rows(len(files), split)]
    captions = None if caption_column is None else read_metadata(files, caption_column, root)
    fetch = partial(read_files, files, resolution, channels)
    contents = partial(describe_files, files, root)
    return ImageDataset(fetch, len(files), captions=captions, contents=contents)


def held_out_rows(length: int, split: str) -> range | list[int]:
    """Divide a source that has no test part: every 20th row is for testing, the rest for training.

    A source of fewer than 20 images serves as both.
    """
    if length < HELD_OUT_EVERY:
        return range(length)
    if split == "test":
        return range(HELD_OUT_EVERY - 1, length, HELD_OUT_EVERY)
    return [row for row in range(length) if row % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]


def _open_hub(
    config: "TrainingConfig",
    resolution: int,
    channels: int,
    split: str,
    caption_column: str | None,
) -> ImageDataset:
    """Open a dataset on the hub; for its parts see `load_parts`."""
    name, column = config.dataset_name, config.image_column
    train, test = load_parts(name, config.dataset_config_name, labelled=caption_column is None)
    if test is None:
        rows = train.select(held_out_rows(len(train), split))
    else:
        rows = train if split == "train" else test
    for option, value in (("image_column", column), ("caption_column", caption_column)):
        if value is not None and value not in rows.column_names:
            raise ValueError(f"{option} is {value!r}; {name} has columns {rows.column_names}")
    captions = None if caption_column is None else read_captions(rows, caption_column)
    fetch = partial(read_rows, rows, column, resolution, channels)
    contents = partial(describe_rows, rows)
    return ImageDataset(fetch, len(rows), read_labels(rows), captions, contents)
