"""Which images a data set has, in a few letters: what is cached of them is of no others."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from morse.training.shards import digest

if TYPE_CHECKING:
    from datasets import Dataset


def describe_files(files: Sequence[Path], root: Path) -> str:
    """Shorten the names of files, from `root` on, and their sizes, in order.

    They need not be read for it. Moved elsewhere the same files give the same.
    """
    rows = [(file.relative_to(root).as_posix(), file.stat().st_size) for file in files]
    return digest(repr(rows))


def describe_pixels(images: Tensor) -> str:
    """Shorten images that are in memory, bytes of any shape: IDX files of other ones are as large.

    They take a second for every GB.
    """
    return hashlib.sha256(images.contiguous().numpy()).hexdigest()[:12]


def describe_rows(rows: "Dataset") -> str | None:
    """Give the fingerprint that the `datasets` library keeps of a part of a hub data set.

    It depends on the data set's revision and on what was selected, in every process alike.
    """
    return getattr(rows, "_fingerprint", None)
