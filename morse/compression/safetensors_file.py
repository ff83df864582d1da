"""Reads and writes safetensors files with torch alone (github.com/huggingface/safetensors).

The format: a little-endian uint64 with the header's length; the header, JSON with dtype, shape and
byte range of each tensor and with string metadata; the tensors' bytes, without gaps.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from morse.files import replacing

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file; a reader sees the old one or the whole new one."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    chunks, end = [], 0
    # Wide numbers first, so that all are aligned.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        chunk = to_bytes(tensor)
        span = [end, end + len(chunk)]
        header[name] = {
            "dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span,
        }  # fmt: skip
        chunks.append(chunk)
        end = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines([len(text).to_bytes(8, "little"), text, *chunks])


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors, onto the CPU, and metadata.

    Raises:
        ValueError: If the file is damaged or has another format.
    """
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:start])
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            data = content[start + first : start + last]
            if not 0 <= first <= last <= len(content) - start:
                raise ValueError(f"{name} has bytes {first} to {last} of {len(content) - start}")
            tensors[name] = from_bytes(data, DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}).") from error
    return tensors, metadata


def to_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's numbers, row-major, as bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor of the numbers in `data`."""
    if not data:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(data), dtype=dtype)
