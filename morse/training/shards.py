"""Folders of safetensors that are made once, shard by shard, and serve many epochs and runs."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from morse.files import atomic_save_file, read_tensors, remove_leftovers, write_json

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
    may_lack: Collection[str] = (),
) -> list[Path]:
    """Make the missing shards, shared out among the processes.

    A shard appears whole or not at all, so that a killed run goes on at the shard where it was.

    Args:
        folder: Where they are kept.
        name: Files are `name`-00000.safetensors and so on.
        total: Rows in all.
        shard_size: Rows of each; the last may have fewer.
        label: For the progress bar on the terminal of the main process.
        describe: Says what the shards depend on, as JSON has it.
        make: Gives the tensors of these rows.
        accelerator: The run's.
        may_lack: Keys of what `describe` gives that earlier versions did not note; shards without
            them are served all the same.

    Returns:
        All shards, in order.

    Raises:
        FileExistsError: If the folder holds other safetensors files.
        ValueError: If it holds shards that were made with other settings.
    """
    from rich.progress import track

    if accelerator.is_main_process:
        _claim(folder, describe(), may_lack)
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


def _claim(folder: Path, description: dict[str, object], may_lack: Collection[str]) -> None:
    """Note what a folder holds, or check that it holds just this."""
    path = folder / _DESCRIPTION
    if not path.exists():
        if any(folder.glob("*.safetensors")):
            raise FileExistsError(f"cache_dir is {folder}, which holds other safetensors files.")
        write_json(path, description)
        return
    noted = json.loads(path.read_text(encoding="utf-8"))
    unsaid = {name: description[name] for name in may_lack if name in description.keys() - noted}
    noted |= unsaid
    if noted != description:
        either = noted | description
        differing = sorted(key for key in either if noted.get(key) != description.get(key))
        raise ValueError(
            f"cache_dir is {folder}, whose contents were made with other {differing}; give another "
            "--cache_dir or the settings it was made with."
        )
    if unsaid:  # from here on it is compared
        write_json(path, noted)
