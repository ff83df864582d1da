"""What every loading of a Dot or of a pipeline insists on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

# Keywords of diffusers' `from_pretrained` that say where from and how files are fetched.
FETCH_OPTIONS = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "revision",
)
_PARTS_OF_AN_ID = 2  # owner/name


def safetensors_only(kwargs: dict[str, object]) -> dict[str, object]:
    """Complete the keywords of a diffusers `from_pretrained` such that no pickle is ever read.

    Raises:
        ValueError: If `use_safetensors` says otherwise.
    """
    # diffusers hands on None to the components of a pipeline where its caller said nothing.
    if kwargs.get("use_safetensors") not in (None, True):
        raise ValueError("use_safetensors must be True: Morse never reads pickled weights.")
    return {**kwargs, "use_safetensors": True}


class PlaceError(OSError):
    """Nothing, or not all, could be loaded from a place; the message names the setting."""


@contextmanager
def loading_from(option: str, place: str | os.PathLike) -> Iterator[None]:
    """Let the errors of a loading name the setting that says from where.

    Args:
        option: Its name.
        place: Its value, a folder or a hub id.

    Raises:
        PlaceError: For an `OSError` within, and at once for a path that does not exist and is no
            hub id.
    """
    path, told = Path(place), f"{option} is {str(place)!r}"
    is_path = path.is_absolute() or str(place).startswith(".") or len(path.parts) > _PARTS_OF_AN_ID
    if is_path and not path.exists():  # the hub, where there is any, need not be asked
        raise PlaceError(f"{told}, which does not exist; give a folder, or an id of the hub")
    try:
        yield
    except PlaceError:
        raise
    except OSError as error:
        missing = "" if path.exists() else "is no folder here and "
        raise PlaceError(f"{told}, which {missing}cannot be loaded: {error}") from error


def align_weights(model: nn.Module) -> None:
    """Copy weights that begin anywhere in a file's memory to where allocations begin.

    Kernels round differently where a tensor is not aligned, so that a loaded model would not give
    the bits of the saved one.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
