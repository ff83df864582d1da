"""Shards of caches fit in memory, whatever the windows are."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.configuration_utils import FrozenDict

from morse.training.cache import _batch_size
from morse.training.cache_sizes import choose_rows, size_on_disk, window_shards
from morse.training.frozen import FrozenPipeline

FOUR_STEPS = SimpleNamespace(window_steps=4)


def source(side, channels, captions=0, caption_bytes=0, **settings):
    """Images of a size with so many captions, as far as sizes of shards depend on them."""
    model = SimpleNamespace(config=FrozenDict(in_channels=channels, **settings))
    negative = {"embeds": torch.empty(1, caption_bytes // 2, dtype=torch.half, device="meta")}
    pipeline = SimpleNamespace(
        dash=SimpleNamespace(model=model),
        sample_size=(side, side),
        guidance_scale=(2.0, 10.0) if captions else (1.0, 1.0),
        encoder=SimpleNamespace(negative=negative if captions else None),
    )
    return SimpleNamespace(pipeline=pipeline, table=SimpleNamespace(values=range(captions)))


@pytest.mark.parametrize(
    ("images", "rows", "on_disk"),
    [
        (source(32, 1), 4096, "410.0 MB"),
        (source(64, 3, out_channels=3), 4096, "4.9 GB"),
        (source(256, 3, out_channels=3), 256, "78.6 GB"),
        (source(256, 3, out_channels=6), 128, "118.0 GB"),
        (source(64, 4, 5, 2 * 77 * 768), 2048, "9.8 GB"),  # Stable Diffusion, classes as captions
        (source(64, 4, 20000, 2 * 77 * 768), 1024, "12.2 GB"),
        (source(128, 16, 20000, 2 * 333 * 4096), 64, "211.8 GB"),  # Stable Diffusion 3
    ],
)
def test_shards_stay_within_a_gigabyte(images, rows, on_disk):
    shard_bytes = window_shards(images, FOUR_STEPS)
    assert choose_rows(shard_bytes) == rows
    assert shard_bytes(rows) <= 2**30 and (rows == 4096 or shard_bytes(2 * rows) > 2**30)
    assert size_on_disk(20000, rows, shard_bytes) == on_disk


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("resolution", [8, 512, 1024, 4096])
@pytest.mark.parametrize("parameters", [10**6, 10**9])
def test_batches_are_powers_of_two_as_shards_are(device, resolution, parameters):
    model = SimpleNamespace(num_parameters=lambda: parameters)
    pipeline = SimpleNamespace(
        device=torch.device(device), dash=SimpleNamespace(model=model), resolution=resolution
    )
    pipeline.batch_size = lambda *sizes: FrozenPipeline.batch_size(pipeline, *sizes)
    assert _batch_size(pipeline).bit_count() == 1
