"""Datasets on the hub: their parts, class numbers and captions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset


def load_parts(
    name: str, config_name: str | None = None, labelled: bool = True
) -> "tuple[Dataset, Dataset | None]":
    """Load a dataset's part to train on, and the one to test on if it has one.

    Args:
        name: Of the dataset.
        config_name: Of its configuration, where it has several.
        labelled: Whether class numbers count. Then, where `train` has them and `test` has not, as
            that of a benchmark whose answers are secret, `validation` takes its place, if it does.

    Raises:
        ValueError: If the `datasets` package is missing, or there is no such configuration.
    """
    try:
        from datasets import get_dataset_split_names, load_dataset
    except ImportError as error:
        raise ValueError(
            f"dataset_name is {name!r}, which needs the `datasets` package; "
            "run `pip install datasets` or give train_data_dir instead"
        ) from error
    try:
        names = get_dataset_split_names(name, config_name)
    except ValueError as error:  # which lists those that there are
        raise ValueError(
            f"dataset_name is {name!r} and dataset_config_name is {config_name!r}: {error}"
        ) from error
    train = load_dataset(name, config_name, split="train")
    if "test" not in names:
        return train, None
    labelled = labelled and read_labels(train) is not None
    for part in ("test", "validation"):
        if part in names:
            rows = load_dataset(name, config_name, split=part)
            if not labelled or read_labels(rows) is not None:
                return train, rows
    return train, None


def read_labels(rows: "Dataset") -> Tensor | None:
    """Give the class numbers in the column "label", (N,) int64.

    None if there is no such column or if it holds anything else, as -1 for unknown.
    """
    if "label" not in rows.column_names:
        return None
    values: Sequence[object] = rows["label"][:]
    if not all(isinstance(value, int) and value >= 0 for value in values):
        return None
    return torch.tensor(list(values), dtype=torch.int64)


def read_captions(rows: "Dataset", column: str) -> list[str]:
    """Give the texts in a column.

    Raises:
        ValueError: If it holds anything else; the message names the row.
    """
    captions = list(rows[column][:])
    for row, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(
                f"caption_column is {column!r}, whose row {row} (of its part) is {caption!r:.80}, "
                "but captions are texts; give a column with one text in each row"
            )
    return captions
