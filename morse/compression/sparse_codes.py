"""Codes for the places of a tensor's non-zero entries: a bitmask, or gaps between them.

All work on flat tensors on the CPU. Gaps are the layout of Han, Mao and Dally, "Deep Compression",
ICLR 2016 (arXiv 1510.00149), section 2, but a gap that is too large is escaped, not padded with
zeros.
"""

import torch
from torch import Tensor

# Here and below the device is given, so that a default device of torch changes nothing.
BITS = 2 ** torch.arange(8, dtype=torch.uint8, device="cpu")


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool mask (n,) into bytes (ceil(n / 8),), the first entry in the lowest bit."""
    padded = mask.new_zeros(-(-len(mask) // 8) * 8, dtype=torch.uint8)
    padded[: len(mask)] = mask
    return (padded.view(-1, 8) * BITS).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Undo `pack_bits` for n = `count` entries."""
    return (packed[:, None] & BITS).ne(0).flatten()[:count]


def encode_gaps(index: Tensor, largest: int) -> Tensor:
    """Code increasing indices (m,) as numbers 0 to `largest`, int64.

    Each index is the number of entries skipped since the one before; `largest` itself says that as
    many are skipped and the gap goes on.
    """
    gaps = torch.diff(index, prepend=index.new_tensor([-1])) - 1
    ends = (gaps // largest + 1).cumsum(0)
    units = index.new_full((int(ends[-1]) if len(ends) else 0,), largest)
    units[ends - 1] = gaps % largest
    return units


def decode_gaps(units: Tensor, largest: int) -> Tensor:
    """Undo `encode_gaps`."""
    units = units.long()
    passed = units.cumsum(0)[units < largest]
    return passed + torch.arange(len(passed), device=passed.device)
