"""Plain Dots of a given number of parameters, as controls for methods that make Dot smaller."""

import math
from collections.abc import Callable
from itertools import product
from statistics import pvariance

from torch import nn

from morse.dot import MorseDot
from morse.dot.ports import default_widths

_TOLERANCE = 0.01
Widths = tuple[int, ...]


def parameter_counter(dash: nn.Module) -> Callable[[Widths, int], int]:
    """Return a function from widths of Dot's blocks and rank of its LoRA to its parameters."""

    def count(widths: Widths, rank: int) -> int:
        dot = MorseDot.from_dash(
            dash, num_down_blocks=len(widths), block_out_channels=widths, lora_rank=rank
        )
        return sum(parameter.numel() for parameter in dot.parameters())

    narrow = default_widths(dash)[:1]
    lora = count(narrow, 1) - count(narrow, 0)  # for each rank; the blocks do not depend on it
    known: dict[Widths, int] = {}

    def counted(widths: Widths, rank: int) -> int:
        if widths not in known:
            known[widths] = count(widths, 0)
        return known[widths] + rank * lora

    return counted


def match_size(
    count: Callable[[Widths, int], int],
    target: float,
    widths: Widths,
    rank: int,
    shrink_lora: bool,
) -> dict[str, object]:
    """Find the plain Dot nearest in size to `target` parameters.

    Of all that are within 1 % of it the one whose widths (and rank) are changed most evenly.

    Args:
        count: From widths and rank to parameters.
        target: The number of parameters wanted.
        widths: Of the plain Dot, multiples of 4; up to twice as wide is tried for a larger target.
        rank: Of the plain Dot's LoRA.
        shrink_lora: Whether the rank may change too.

    Returns:
        block_out_channels and lora_rank, as `TrainDotConfig` takes them.
    """
    limit = 1 if target <= count(widths, rank) else 2
    ranks = range(1, limit * rank + 1) if shrink_lora and rank else (rank,)
    found = []
    for sizes in product(*(range(4, limit * width + 1, 4) for width in widths)):
        for tried in ranks:
            distance = abs(count(sizes, tried) / target - 1)
            logs = [math.log(a / b) for a, b in zip(sizes, widths, strict=True)]
            if shrink_lora and rank:
                logs.append(math.log(tried / rank))
            near = distance <= _TOLERANCE
            found.append((not near, 0 if near else distance, pvariance(logs), sizes, tried))
    *_, sizes, tried = min(found)
    return {"block_out_channels": sizes, "lora_rank": tried}
