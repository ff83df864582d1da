"""Latents kept on disk: each image is encoded once, and windows are drawn afresh all the same."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morse.dot.fingerprint import fingerprint
from morse.training.cache import SHARD_WINDOWS
from morse.training.config import TrainDotConfig
from morse.training.data import ImageDataset, in_batches
from morse.training.shards import make_shards, read_shard, require_noted
from morse.training.source import ConditionedImages, describe_data

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARD_IMAGES = SHARD_WINDOWS
_BATCH_SIZE = 32  # images that are read at a time; the codec takes as many of them as fit


def cache_latents(
    source: ConditionedImages, config: TrainDotConfig, accelerator: "Accelerator"
) -> ConditionedImages:
    """Encode the missing shards of a cache of latents, and give the same data set of latents.

    As with windows, shards are shared out among the processes and appear whole or not at all.

    Raises:
        ValueError: If the folder holds other latents, or unless the run goes on perhaps others.
    """
    pipeline, folder = source.pipeline, config.cache_dir or config.output_dir / "latents"
    # Captions and labels are read anew, so that latents of other images would get wrong ones.
    if config.resume_from_checkpoint is None:
        require_noted(folder, "image_files")

    def describe() -> dict[str, object]:
        return {
            "vae": fingerprint(pipeline.codec.vae),
            "scaling": pipeline.codec.constants,
            "resolution": pipeline.resolution,
        } | describe_data(source, config)

    paths = make_shards(
        folder=folder,
        name="latents",
        total=len(source),
        shard_size=SHARD_IMAGES,
        label=f"encoding, {SHARD_IMAGES} images a shard",
        describe=describe,
        make=lambda rows: {"latents": _encode(source, rows)},
        accelerator=accelerator,
    )
    shards = [read_shard(path)["latents"] for path in paths]
    images = ImageDataset(partial(_fetch, shards), len(source))
    return ConditionedImages(images, pipeline, source.numbers, source.table)


def _encode(source: ConditionedImages, rows: range) -> Tensor:
    batches = in_batches(source, rows, _BATCH_SIZE)
    return torch.cat([source.clean(batch).half().cpu() for batch in batches])


def _fetch(shards: list[Tensor], indices: list[int]) -> Tensor:
    rows = (divmod(index, SHARD_IMAGES) for index in indices)
    return torch.stack([shards[shard][row] for shard, row in rows])
