"""Files and folders that are written whole or not at all, and tensors read back from them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def temporary_for(path: Path) -> Path:
    """Name a place beside `path` for what is to become it; each process has its own."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def remove_leftovers(folder: Path) -> None:
    """Remove the files in a folder and below that processes which are gone were writing."""
    for path in folder.rglob(".*.tmp-*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and path.is_file() and _is_gone(int(number)):
            path.unlink(missing_ok=True)


def _is_gone(process: int) -> bool:
    """Tell whether there is no process of this number; where that cannot be asked, there may be."""
    if os.name != "posix":  # the question would end it
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        return False
    return False


def put_in_place(temporary: Path, path: Path) -> None:
    """Make a file or folder `path`, once it is on the disk."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a place to write a file to, which then becomes `path`, or is gone if writing fails.

    Folders that `path` is to be in are made if missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(path)
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; a reader sees the old one or the whole new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, data: object) -> None:
    """Write JSON as `write_bytes` does."""
    write_bytes(path, (json.dumps(data, indent=2) + "\n").encode())


def atomic_save_file(
    tensors: dict[str, "Tensor"], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors; a reader sees the old file or the whole new one."""
    from safetensors.torch import save_file

    content = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(content, temporary, metadata)


def read_tensors(path: Path, remedy: str) -> dict[str, "Tensor"]:
    """Read a safetensors file onto the CPU.

    Args:
        path: The file.
        remedy: What the user is told to do if it is broken.

    Raises:
        ValueError: If it is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {remedy}") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error


def _sync(path: Path) -> None:
    """Make the system write a file, or on POSIX the entries of a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
