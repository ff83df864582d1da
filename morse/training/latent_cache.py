"""Latents kept on disk: each image is encoded once, and windows are drawn afresh all the same."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morse.dot.fingerprint import fingerprint
from morse.training.cache_sizes import choose_rows, latent_bytes, size_on_disk
from morse.training.config import TrainDotConfig
from morse.training.data import ImageDataset, in_batches
from morse.training.shards import gather_rows, make_shards, read_shard
from morse.training.source import ConditionedImages, describe_data

if TYPE_CHECKING:
    from accelerate import Accelerator

_BATCH_SIZE = 32  # images that are read at a time; the codec takes as many of them as fit


def cache_latents(
    source: ConditionedImages, config: TrainDotConfig, accelerator: "Accelerator"
) -> ConditionedImages:
    """Encode the missing shards of a cache of latents, and give the same data set of latents.

    As with windows, shards are shared out among the processes and appear whole or not at all.

    Raises:
        ValueError: If the folder holds other latents.
    """
    pipeline, folder = source.pipeline, config.cache_dir or config.output_dir / "latents"
    image_bytes = latent_bytes(pipeline)
    size = choose_rows(lambda rows: rows * image_bytes)
    on_disk = size_on_disk(len(source), size, lambda rows: rows * image_bytes)
    accelerator.print(f"cache: latents of {len(source)} images, {on_disk} in {folder}")

    def describe() -> dict[str, object]:
        own = {
            "vae": fingerprint(pipeline.codec.vae),
            "scaling": pipeline.codec.constants,
            "resolution": pipeline.resolution,
        }
        return own | describe_data(source, config)

    paths = make_shards(
        folder=folder,
        name="latents",
        total=len(source),
        shard_size=size,
        label=f"encoding, {size} images a shard",
        describe=describe,
        make=lambda rows: _encode(source, rows),
        accelerator=accelerator,
    )
    shards = [read_shard(path)["latents"] for path in paths]
    images = ImageDataset(partial(_fetch, shards, size), len(source))
    return ConditionedImages(images, pipeline, source.numbers, source.table)


def _encode(source: ConditionedImages, rows: range) -> dict[str, Tensor]:
    batches = in_batches(source, rows, _BATCH_SIZE)
    return gather_rows(({"latents": source.clean(batch).half()} for batch in batches), len(rows))


def _fetch(shards: list[Tensor], shard_size: int, indices: list[int]) -> Tensor:
    rows = (divmod(index, shard_size) for index in indices)
    return torch.stack([shards[shard][row] for shard, row in rows])
