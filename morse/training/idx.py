"""IDX files, the format of MNIST and Fashion-MNIST."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

IDX_IMAGES, IDX_LABELS = 0x00000803, 0x00000801  # unsigned bytes in three, in one dimension
# How the names of MNIST's files go on after "train" or "t10k".
IDX_IMAGES_NAME, _IDX_LABELS_NAME = "-images-idx3-ubyte", "-labels-idx1-ubyte"


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes (Y. LeCun's format for MNIST), plain or gzipped.

    Args:
        path: The file.
        magic: Its first four bytes: `IDX_IMAGES` or `IDX_LABELS`. The last one counts dimensions.

    Raises:
        ValueError: If it is damaged, of another kind, or holds no images where they are wanted.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}; download it again") from error
    found = int.from_bytes(content[:4], "big")
    if len(content) < 4 or found != magic:
        raise ValueError(
            f"{path} is not the expected IDX file: its magic number is 0x{found:08x}, "
            f"but must be 0x{magic:08x}"
        )
    header = 4 + 4 * (magic & 0xFF)
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise ValueError(
            f"{path} is damaged: shape {shape} needs {expected} bytes, but it has "
            f"{len(content)}; download it again"
        )
    if magic == IDX_IMAGES and 0 in shape:
        raise ValueError(f"{path} holds no images (its shape is {shape})")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def find_idx(folder: Path, name: str) -> Path | None:
    """Find an IDX file of this name in a folder, plain or gzipped."""
    paths = (folder / name, folder / f"{name}.gz")
    return next((path for path in paths if path.is_file()), None)


def read_idx_labels(path: Path, count: int) -> Tensor | None:
    """Read the class numbers beside an IDX file of images, (count,) int64.

    None if there are none, or if the images' file is not named as MNIST's are.

    Raises:
        ValueError: If they are broken or not `count`.
    """
    if IDX_IMAGES_NAME not in path.name:
        return None
    name = path.name.replace(IDX_IMAGES_NAME, _IDX_LABELS_NAME).removesuffix(".gz")
    labels_path = find_idx(path.parent, name)
    if labels_path is None:
        return None
    labels = torch.from_numpy(read_idx(labels_path, IDX_LABELS)).long()
    if len(labels) != count:
        raise ValueError(f"{labels_path} has {len(labels)} labels for {count} images")
    return labels


def fit_images(images: Tensor, resolution: int) -> Tensor:
    """Give (N, 1, H, W) bytes the shape (N, 1, resolution, resolution)."""
    height, width = images.shape[2:]
    rows, columns = resolution - height, resolution - width
    if min(rows, columns) >= 0 and rows % 2 == 0 and columns % 2 == 0:
        return F.pad(images, (columns // 2, columns // 2, rows // 2, rows // 2))
    scale = resolution / min(height, width)
    size = (max(resolution, round(height * scale)), max(resolution, round(width * scale)))
    top, left = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    parts = []
    for part in images.split(4096):
        resized = F.interpolate(part.float(), size, mode="bilinear", antialias=True)
        parts.append(resized.round().clamp(0, 255).byte())
    return torch.cat(parts)[:, :, top : top + resolution, left : left + resolution].contiguous()
