"""Folders of safetensors that are made once, shard by shard, and serve many epochs and runs."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from morse.files import atomic_save_file, read_tensors, remove_leftovers
from morse.folder_settings import claim_folder

if TYPE_CHECKING:
    from accelerate import Accelerator

_DESCRIPTION = "cache.json"


def digest(text: str) -> str:
    """Shorten a text that a description is to tell from others."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make_shards(
    folder: Path,
    name: str,
    total: int,
    shard_size: int,
    label: str,
    describe: Callable[[], dict[str, object]],
    make: Callable[[range], dict[str, Tensor]],
    accelerator: "Accelerator",
) -> list[Path]:
    """Make the missing shards, shared out among the processes.

    A shard appears whole or not at all, so that a killed run goes on at the shard where it was.

    Args:
        folder: Where they are kept.
        name: Files are `name`-00000.safetensors and so on.
        total: Rows in all.
        shard_size: Rows of each; the last may have fewer.
        label: For the progress bar on the terminal of the main process.
        describe: Says what the shards depend on beside `shard_size`, as JSON has it.
        make: Gives the tensors of these rows.
        accelerator: The run's.

    Returns:
        All shards, in order.

    Raises:
        FileExistsError: If the folder holds other safetensors files.
        ValueError: If it holds shards that were made with other settings.
    """
    from rich.progress import track

    if accelerator.is_main_process:
        _claim(folder, describe() | {"shard_rows": shard_size})
        remove_leftovers(folder, f".{name}-*.safetensors.tmp-*")
    accelerator.wait_for_everyone()
    count = -(-total // shard_size)
    paths = [folder / f"{name}-{number:05d}.safetensors" for number in range(count)]
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    missing = [number for number in mine if not paths[number].exists()]
    quiet = not (missing and accelerator.is_main_process)
    for number in track(missing, description=label, disable=quiet):
        rows = range(number * shard_size, min((number + 1) * shard_size, total))
        atomic_save_file(make(rows), paths[number])
    accelerator.wait_for_everyone()
    return paths


def read_shard(path: Path) -> dict[str, Tensor]:
    """Read one of `make_shards`' files onto the CPU.

    Raises:
        ValueError: If it is damaged.
    """
    return read_tensors(path, "delete that file alone, and the next run makes it anew")


def gather_rows(parts: Iterable[dict[str, Tensor]], size: int) -> dict[str, Tensor]:
    """Join the first `size` rows by name on the CPU, each part moved there at once.

    A shard may exceed a GPU's memory, and twice its size the CPU's: rows go where they stay.
    """
    found: dict[str, Tensor] = {}
    start = 0
    for part in parts:
        for name, value in part.items():
            if name not in found:
                found[name] = value.new_empty(size, *value.shape[1:], device="cpu")
            found[name][start : start + len(value)] = value[: size - start]
        start += len(next(iter(part.values())))
    return found


def _claim(folder: Path, description: dict[str, object]) -> None:
    """Note what a folder holds, or check that it holds just this."""
    file = folder / _DESCRIPTION
    if not file.exists() and any(folder.glob("*.safetensors")):
        raise FileExistsError(
            f"{folder} holds safetensors files and no {_DESCRIPTION}, so nobody knows what they "
            "are; give another --cache_dir"
        )
    claim_folder(file, description, "give another --cache_dir, or delete that folder")
