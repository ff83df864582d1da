"""IDX files, such as those of Fashion-MNIST, for tests."""

import gzip

import numpy as np


def write_idx(path, array, magic=None):
    """Write an array of bytes, gzipped where the name ends in .gz; returns the path."""
    array = np.asarray(array).astype(np.uint8)
    magic = (0x800 | array.ndim) if magic is None else magic
    content = b"".join(n.to_bytes(4, "big") for n in (magic, *array.shape)) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parts(folder, train=10, t10k=6, num_classes=None):
    """Write so many random images of 8x8 pixels as each part of a data set, with labels or not."""
    for name, count in (("train", train), ("t10k", t10k)):
        images = np.random.default_rng(count).integers(0, 256, (count, 8, 8), dtype=np.uint8)
        write_idx(folder / f"{name}-images-idx3-ubyte", images)
        if num_classes is not None:
            write_idx(folder / f"{name}-labels-idx1-ubyte", np.arange(count) % num_classes)
