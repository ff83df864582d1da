"""How many rows the shards of a cache have, and what all of them take on disk."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from morse.training.config import TrainDotConfig
    from morse.training.frozen import FrozenPipeline
    from morse.training.source import ConditionedImages

# Of a shard whose rows are small; a power of two, as are all that it is halved to.
MOST_ROWS = 4096
_LARGEST_SHARD = 2**30  # bytes; shards are made in memory, a whole one by each process
_HALF = 2  # bytes
# Gives the bytes of a shard of so many rows.
ShardBytes = Callable[[int], int]


def choose_rows(shard_bytes: ShardBytes) -> int:
    """Give the largest power of two of rows, 4,096 at most, that keeps a shard within 1 GiB.

    It follows from the settings, as what a shard holds depends on it.
    """
    rows = MOST_ROWS
    while rows > 1 and shard_bytes(rows) > _LARGEST_SHARD:
        rows //= 2
    return rows


def size_on_disk(total: int, rows: int, shard_bytes: ShardBytes) -> str:
    """Give what shards of `rows` take of which there are `total`, as text."""
    size = sum(shard_bytes(min(rows, total - start)) for start in range(0, total, rows))
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def window_shards(source: "ConditionedImages", config: "TrainDotConfig") -> ShardBytes:
    """Give the size of shards of windows."""
    pipeline, points = source.pipeline, config.window_steps + 1
    settings = pipeline.dash.model.config
    branches = 1 if pipeline.guidance_scale[1] == 1 else 2
    outputs = branches * (settings.get("out_channels") or settings.in_channels)
    # Each point has its timestep, a window its guidance scale and the number of its condition.
    window = points * (latent_bytes(pipeline) + outputs * _plane(pipeline) + 2) + 12
    # Captions take as much each as the one that guidance leads away from.
    condition = sum(value.nbytes for value in (pipeline.encoder.negative or {}).values())
    different = len(source.table.values)
    return lambda windows: windows * window + min(windows, different) * condition


def latent_bytes(pipeline: "FrozenPipeline") -> int:
    """Give the size of one sample of the denoiser's kind."""
    return pipeline.dash.model.config.in_channels * _plane(pipeline)


def _plane(pipeline: "FrozenPipeline") -> int:
    return _HALF * math.prod(pipeline.sample_size)
