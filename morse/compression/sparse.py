"""A file format for networks with many zeros, whose size follows the entries that are left.

It is a safetensors file whose tensors hold the parts of all the network's tensors one after
another: "values.F32" the numbers, "bitmask.U8", "gaps.U8", "gaps.U16" and "index.I32" their places
(see `sparse_codes`). The metadata's "json" says for each tensor, in order, [layout, dtype, shape,
stored numbers, length of its places]. One header for all keeps small tensors small.
"""

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from morse.compression.sparse_codes import decode_gaps, encode_gaps, pack_bits, unpack_bits
from morse.compression.surgery_mask import check_unmasked
from morse.files import write_bytes

FORMAT = "morse.compression.sparse"
# Names as in safetensors' headers.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Layout -> the tensor in the file that holds its places.
PLACES = {"bitmask": "bitmask.U8", "gaps8": "gaps.U8", "gaps16": "gaps.U16", "index": "index.I32"}
LARGEST = {"gaps8": 2**8 - 1, "gaps16": 2**16 - 1}


def save_sparse(
    state_or_module: nn.Module | Mapping[str, Tensor],
    path: str | PathLike[str],
    values: Literal["float32", "float16"] = "float32",
) -> None:
    """Save a network with zeros; each tensor takes the smallest of the layouts.

    With v bytes a number and m numbers other than zero among n, these are: all numbers, n * v
    bytes; a bitmask, ceil(n / 8) + m * v; 8- or 16-bit gaps, or 32-bit indices, and m * v.

    Args:
        state_or_module: A state dict, or a module, after `NetworkSurgery.finalize`.
        path: The file; it is replaced as a whole.
        values: "float32" rounds nothing, so that `load_sparse` returns every bit, in any dtype;
            "float16" rounds wider floating-point numbers to float16.

    Raises:
        TypeError: If it is neither, or holds something else than dense tensors.
        ValueError: If the module is under surgery, `values` is another, or a number is too large
            for float16.

    Example:
        >>> import pathlib
        >>> import tempfile
        >>> import torch
        >>> from morse.compression import load_sparse, save_sparse
        >>> layer = torch.nn.Linear(1000, 100)
        >>> layer.weight.data[layer.weight.abs() < 0.03] = 0  # leaves 5 %
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sparse(layer, f"{folder}/layer.safetensors")
        ...     size = pathlib.Path(folder, "layer.safetensors").stat().st_size
        ...     state = load_sparse(f"{folder}/layer.safetensors")
        >>> torch.equal(state["weight"], layer.weight), size < 0.1 * 4 * 100_100
        (True, True)
    """
    if values not in ("float32", "float16"):
        raise ValueError(f"values must be 'float32' or 'float16', got {values!r}.")
    pools: dict[str, list[Tensor]] = {}
    entries = {}
    for name, tensor in _state(state_or_module).items():
        layout, numbers, places = _pack(_stored(name, tensor, values))
        pools.setdefault(f"values.{CODES[numbers.dtype]}", []).append(numbers)
        if layout in PLACES:
            pools.setdefault(PLACES[layout], []).append(places)
        shape = list(tensor.shape)
        entries[name] = [layout, CODES[tensor.dtype], shape, len(numbers), len(places)]
    meta = {"format": FORMAT, "version": 1, "values": values, "tensors": entries}
    text = json.dumps(meta, separators=(",", ":"), ensure_ascii=False)
    tensors = {name: torch.cat(parts) for name, parts in pools.items()}
    write_bytes(Path(path), save(tensors, {"json": text}))


def load_sparse(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Load what `save_sparse` saved, as a dense state dict on the CPU, in the dtypes of then.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or has another format.
    """
    pools, metadata = _read(path)
    try:
        meta = json.loads(metadata["json"])
        if (meta["format"], meta["version"]) != (FORMAT, 1):
            raise ValueError(f"format {meta['format']!r}, version {meta['version']!r}")
        state = {}
        for name, (layout, code, shape, count, length) in meta["tensors"].items():
            dtype = DTYPES[code]
            numbers = _take(pools, f"values.{CODES[_stored_dtype(dtype, meta['values'])]}", count)
            places = None if layout == "dense" else _take(pools, PLACES[layout], length)
            flat = _unpack(layout, numbers, places, math.prod(shape))
            state[name] = flat.reshape(shape).to(dtype)
    except (ValueError, KeyError, TypeError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"{path} is damaged or was not written by save_sparse ({error})."
        ) from error
    return state


def _state(state_or_module: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    state = state_or_module
    if isinstance(state, nn.Module):
        check_unmasked(state, "save what finalize() returns")
        state = state.state_dict()
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state_or_module must be a module or state dict, got {type(state).__name__}."
        )
    for name, tensor in state.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not dense or tensor.dtype not in CODES:
            kind = tensor.dtype if dense else type(tensor).__name__
            raise TypeError(f"{name!r} must be a dense tensor of {list(CODES)}, got {kind}.")
    return state


def _stored_dtype(dtype: torch.dtype, values: str) -> torch.dtype:
    wide = dtype in (torch.float64, torch.float32)
    return torch.float16 if values == "float16" and wide else dtype


def _stored(name: str, tensor: Tensor, values: str) -> Tensor:
    tensor = tensor.detach().cpu().reshape(-1)
    stored = tensor.to(_stored_dtype(tensor.dtype, values))
    if stored.dtype != tensor.dtype and bool((stored.isinf() & ~tensor.isinf()).any()):
        raise ValueError(f"{name!r} has numbers too large for values='float16'; use 'float32'.")
    return stored


def _pack(flat: Tensor) -> tuple[str, Tensor, Tensor]:
    """Return the smallest layout, the numbers it stores and their places."""
    # By bits, since -0.0 is to come back too.
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.itemsize])
    mask = bits != 0
    index = mask.nonzero().squeeze(1)
    gaps = {layout: encode_gaps(index, largest) for layout, largest in LARGEST.items()}
    sizes = {
        "dense": len(flat) * flat.itemsize,
        "bitmask": -(-len(flat) // 8) + len(index) * flat.itemsize,
        "gaps8": len(gaps["gaps8"]) + len(index) * flat.itemsize,
        "gaps16": 2 * len(gaps["gaps16"]) + len(index) * flat.itemsize,
        "index": (4 + flat.itemsize) * len(index) if len(flat) < 2**31 else math.inf,
    }
    layout = min(sizes, key=sizes.__getitem__)
    if layout == "dense":
        return layout, flat, index[:0]
    if layout == "bitmask":
        places = pack_bits(mask)
    elif layout == "index":
        places = index.int()
    else:
        places = gaps[layout].to(DTYPES[PLACES[layout].split(".")[1]])
    return layout, flat[index], places


def _read(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        # Else tensors would follow torch's default device.
        with torch.device("cpu"), safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}).") from error


def _take(pools: dict[str, Tensor], name: str, count: int) -> Tensor:
    taken, pools[name] = pools[name].split([count, len(pools[name]) - count])
    return taken


def _unpack(layout: str, numbers: Tensor, places: Tensor | None, count: int) -> Tensor:
    if places is None:
        return numbers.clone()  # sharing no memory with its neighbours in the file
    dtype = numbers.dtype
    if dtype == torch.uint16:  # which nothing scatters
        numbers = numbers.view(torch.int16)
    flat = numbers.new_zeros(count)
    if layout == "bitmask":
        flat[unpack_bits(places, count)] = numbers
    else:
        index = decode_gaps(places, LARGEST[layout]) if layout in LARGEST else places.long()
        flat[index] = numbers
    return flat.view(dtype)
