"""Training images behind one interface."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from morse.training.captions import read_metadata
from morse.training.idx import IDX_IMAGES, IDX_LABELS, fit_images, read_idx

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
HELD_OUT_EVERY = 20
IDX_PREFIXES = {"train": "train", "test": "t10k"}


class ImageDataset(Dataset):
    """Images of one size as unsigned bytes.

    Args:
        fetch: Turns a list of n indices into images, (n, C, H, W) uint8.
        length: The number of images.
        labels: Class numbers, (length,) int64, where the source has them.
        captions: A text for each image, where they were asked for.
    """

    def __init__(
        self,
        fetch: Callable[[list[int]], Tensor],
        length: int,
        labels: Tensor | None = None,
        captions: list[str] | None = None,
    ) -> None:
        """Keep the source; nothing is read yet."""
        self.fetch = fetch
        self.length = length
        self.labels = labels
        self.captions = captions

    def __len__(self) -> int:
        """Give the number of images."""
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        """Give one image, (C, H, W) uint8."""
        return self.fetch([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Give many images at once, (len(indices), C, H, W) uint8."""
        return self.fetch(list(indices))


def to_model_range(images: Tensor) -> Tensor:
    """Map bytes in [0, 255] to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def open_images(
    train_data_dir: Path | None,
    dataset_name: str | None,
    resolution: int,
    channels: int,
    split: Literal["train", "test"] = "train",
    image_column: str = "image",
    caption_column: str | None = None,
) -> ImageDataset:
    """Open images from exactly one source and give all of them the same size.

    Args:
        train_data_dir: An IDX file, a folder of IDX files (`train-images-idx3-ubyte[.gz]`,
            `t10k-...`), or a folder of images, searched recursively. When that folder has both
            a `train` and a `test` folder, `split` chooses between them; a source without a
            test part holds out every 20th image.
        dataset_name: A dataset on the hub, for `datasets.load_dataset`.
        resolution: Height and width. IDX images that are smaller by an even number get a black
            border; all others are resized by their shorter side and cropped at the centre.
        channels: 1 for grey, 3 for colour.
        split: Which part of the data.
        image_column: The column of a hub dataset that holds the images.
        caption_column: Where captions are found: a column of the hub dataset, or a name in the
            image folder's `metadata.jsonl`; None for no captions.

    Raises:
        FileNotFoundError: `train_data_dir` doesn't exist.
        ValueError: No or broken images, no captions; the message names the file.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; it must be 1 (grey) or 3 (colour)")
    if split not in IDX_PREFIXES:
        raise ValueError(f"split is {split!r}; it must be one of {list(IDX_PREFIXES)}")
    if (train_data_dir is None) == (dataset_name is None):
        raise ValueError(
            f"train_data_dir is {train_data_dir} and dataset_name is {dataset_name}; "
            "give exactly one of the two"
        )
    if dataset_name is not None:
        return _open_hub(dataset_name, resolution, channels, split, image_column, caption_column)
    path = Path(train_data_dir)
    if not path.exists():
        raise FileNotFoundError(f"train_data_dir is {path}, which does not exist")
    is_idx_folder = any(path.glob("*-images-idx3-ubyte*"))
    if caption_column is not None and (path.is_file() or is_idx_folder):
        raise ValueError(
            f"caption_column is {caption_column!r}, but IDX files such as those of {path} have no "
            "captions; give class_names instead"
        )
    if path.is_file():
        return _open_idx(path, resolution, channels)
    if is_idx_folder:
        prefix = IDX_PREFIXES[split]
        return _open_idx(_find_idx(path, f"{prefix}-images-idx3-ubyte"), resolution, channels)
    return _open_folder(path, resolution, channels, split, caption_column)


def _find_idx(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{folder} has IDX files, but neither {name} nor {name}.gz")


def _open_idx(path: Path, resolution: int, channels: int) -> ImageDataset:
    array = read_idx(path, IDX_IMAGES)
    if array.size == 0:
        raise ValueError(f"{path} holds no images (its shape is {array.shape})")
    images = fit_images(torch.from_numpy(array)[:, None], resolution)
    labels_name = path.name.replace("-images-idx3-ubyte", "-labels-idx1-ubyte").removesuffix(".gz")
    labels = None
    for candidate in (path.with_name(labels_name), path.with_name(f"{labels_name}.gz")):
        if candidate != path and candidate.is_file():
            labels = torch.from_numpy(read_idx(candidate, IDX_LABELS)).long()
            if len(labels) != len(images):
                raise ValueError(f"{candidate} has {len(labels)} labels for {len(images)} images")
            break
    return ImageDataset(partial(_gather, images, channels), len(images), labels)


def _gather(images: Tensor, channels: int, indices: list[int]) -> Tensor:
    chosen = images[torch.tensor(indices)]
    return chosen if channels == 1 else chosen.repeat(1, channels, 1, 1)


def _open_folder(
    path: Path, resolution: int, channels: int, split: str, caption_column: str | None
) -> ImageDataset:
    has_splits = all((path / name).is_dir() for name in IDX_PREFIXES)
    path = path / split if has_splits else path
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(
            f"train_data_dir is {path}, which has no images: expected files ending in "
            f"{sorted(IMAGE_SUFFIXES)} or IDX files like train-images-idx3-ubyte.gz"
        )
    if not has_splits:
        files = [files[index] for index in held_out_rows(len(files), split)]
    captions = None if caption_column is None else read_metadata(files, caption_column)
    fetch = partial(_read_files, files, resolution, channels)
    return ImageDataset(fetch, len(files), captions=captions)


def held_out_rows(length: int, split: str) -> range | list[int]:
    """Divide a source that has no test part: every 20th row is for testing, the rest for training.

    A source of fewer than 20 images serves as both.
    """
    if length < HELD_OUT_EVERY:
        return range(length)
    if split == "test":
        return range(HELD_OUT_EVERY - 1, length, HELD_OUT_EVERY)
    return [row for row in range(length) if row % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]


def _read_files(files: list[Path], resolution: int, channels: int, indices: list[int]) -> Tensor:
    images = []
    for path in (files[index] for index in indices):
        try:
            with Image.open(path) as image:
                images.append(_to_bytes(image, resolution, channels))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}; remove it") from error
    return torch.stack(images)


def _to_bytes(image: Image.Image, resolution: int, channels: int) -> Tensor:
    """Crop the centre square and resize it, (C, resolution, resolution)."""
    image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    array = np.array(image, dtype=np.uint8).reshape(resolution, resolution, channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _open_hub(
    name: str,
    resolution: int,
    channels: int,
    split: str,
    column: str,
    caption_column: str | None,
) -> ImageDataset:
    try:
        from datasets import get_dataset_split_names, load_dataset
    except ImportError as error:
        raise ValueError(
            f"dataset_name is {name!r}, which needs the `datasets` package; "
            'run `pip install "morse-diffusion[hub]"` or give train_data_dir instead'
        ) from error
    has_split = split in get_dataset_split_names(name)
    rows = load_dataset(name, split=split if has_split else "train")
    if "test" not in get_dataset_split_names(name):
        rows = rows.select(held_out_rows(len(rows), split))
    for option, value in (("image_column", column), ("caption_column", caption_column)):
        if value is not None and value not in rows.column_names:
            raise ValueError(f"{option} is {value!r}; {name} has columns {rows.column_names}")
    labels = _read_labels(rows["label"][:]) if "label" in rows.column_names else None
    captions = None if caption_column is None else list(rows[caption_column][:])
    fetch = partial(_read_rows, rows, column, resolution, channels)
    return ImageDataset(fetch, len(rows), labels, captions)


def _read_labels(values: Sequence[object]) -> Tensor | None:
    """Give class numbers, (N,) int64; None for anything else in the column, as -1 for unknown."""
    if not all(isinstance(value, int) and value >= 0 for value in values):
        return None
    return torch.tensor(list(values), dtype=torch.int64)


def _read_rows(
    rows: Dataset, column: str, resolution: int, channels: int, indices: list[int]
) -> Tensor:
    images = rows[indices][column]
    return torch.stack([_to_bytes(image, resolution, channels) for image in images])
