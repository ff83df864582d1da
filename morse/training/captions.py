"""The text that belongs to each training image."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from morse.training.data import ImageDataset

METADATA_NAME = "metadata.jsonl"


def read_metadata(files: Sequence[Path], column: str, root: Path) -> list[str]:
    """Read captions of image files from the `metadata.jsonl` in each one's folder or nearest above.

    It is the layout of the `datasets` library's image folders: one JSON object a line, with the
    image's path from there as "file_name" and its caption under `column`.

    Args:
        files: The images.
        column: The name that captions have.
        root: The uppermost folder that may hold a `metadata.jsonl`; all images are in it.

    Raises:
        ValueError: If an image has no caption; the message names it.
    """
    tables: dict[Path, dict[str, dict[str, object]]] = {}
    captions = []
    for file in files:
        path = _find_table(file, root)
        if path not in tables:
            tables[path] = _read_table(path)
        name = file.relative_to(path.parent).as_posix()
        caption = tables[path].get(name, {}).get(column)
        if not isinstance(caption, str):
            raise ValueError(
                f"caption_column is {column!r}, but {path} gives no such text for {name}; add a "
                f'line {{"file_name": "{name}", "{column}": "..."}}'
            )
        captions.append(caption)
    return captions


def _find_table(file: Path, root: Path) -> Path:
    for folder in file.parents:
        if (folder / METADATA_NAME).is_file():
            return folder / METADATA_NAME
        if folder == root:
            break
    raise ValueError(
        f"captions are needed, but {file.parent / METADATA_NAME} does not exist, nor one in a "
        f"folder above it up to {root}"
    )


def _read_table(path: Path) -> dict[str, dict[str, object]]:
    try:
        # JSON may hold other characters that end a line, such as U+2028, as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        return {row["file_name"]: row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} needs one JSON object with "file_name" a line: {error}'
        ) from error


def caption_images(
    images: "ImageDataset", class_names: Sequence[str] | None
) -> tuple[list[str], Tensor]:
    """Give the different captions of images, sorted, and each image's number in them, (N,) int64.

    Args:
        images: With labels or captions.
        class_names: Captions by class number; None where the images have captions.

    Raises:
        ValueError: If they have none, or no fitting labels.
    """
    if class_names is not None:
        return unique_captions(name_classes(images.labels, class_names))
    if images.captions is None:
        raise ValueError(
            "the pipeline takes text, but the images have none: give --caption_column, or "
            "--class_names for images with labels."
        )
    return unique_captions(images.captions)


def name_classes(labels: Tensor | None, class_names: Sequence[str]) -> list[str]:
    """Give every image the name of its class as caption.

    Args:
        labels: Class numbers, (N,).
        class_names: Names in the order of the numbers.

    Raises:
        ValueError: If there are no labels or more classes than names.
    """
    if labels is None:
        raise ValueError(
            f"class_names is {tuple(class_names)}, but these images have no labels; give IDX files "
            "with labels, a hub dataset with class numbers in its column label, or captions instead"
        )
    if int(labels.max()) >= len(class_names):
        raise ValueError(
            f"class_names has {len(class_names)} names, but labels go up to {int(labels.max())}"
        )
    return [class_names[label] for label in labels.tolist()]


def unique_captions(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """Give the different captions in sorted order, and each image's index in them, (N,) int64."""
    unique = sorted(set(captions))
    index = {caption: number for number, caption in enumerate(unique)}
    return unique, torch.tensor([index[caption] for caption in captions])
