"""Files and folders that are written whole or not at all, and tensors read back from them."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_LEFT_BEHIND = 3600  # seconds; no file takes as long to write


def temporary_for(path: Path) -> Path:
    """Name a place beside `path` for what is to become it; each process has its own."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def remove_leftovers(folder: Path, pattern: str = ".*.tmp-*") -> None:
    """Remove what killed processes were writing in a folder and below.

    By its age: the number of a process says nothing where another machine or container wrote.
    """
    for path in list(folder.rglob(pattern)):
        with contextlib.suppress(FileNotFoundError):  # another run was just about to finish it
            if time.time() - path.stat().st_mtime > _LEFT_BEHIND:
                path.unlink() if path.is_file() else shutil.rmtree(path)


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
    # A folder, for safetensors fills a file beside the one that it is given, under a name of its
    # own, which would tell nobody what it is when the process is killed.
    folder = temporary_for(path)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(content, folder / path.name, metadata)
        put_in_place(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
