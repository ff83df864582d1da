"""Images with the captions or classes that belong to them, and windows drawn from them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from morse.training.captions import caption_images
from morse.training.conditions import ConditionTable
from morse.training.data import ImageDataset, open_training_images, to_model_range
from morse.training.frozen import FrozenPipeline
from morse.training.guidance import UNCONDITIONAL, Conditions, draw_guidance_scale
from morse.training.windows import Window, fresh_window

if TYPE_CHECKING:
    from morse.training.config import TrainDotConfig

# Images, and the numbers of their captions or classes where the pipeline is conditioned.
Batch = Tensor | tuple[Tensor, Tensor]


class ConditionedImages(Dataset):
    """Images, or their cached latents, with the numbers of their captions or classes.

    Args:
        images: The images.
        pipeline: What they are for.
        numbers: Into `table`, (len(images),); None where the pipeline takes no conditions.
        table: The captions or classes.
    """

    def __init__(
        self,
        images: ImageDataset,
        pipeline: FrozenPipeline,
        numbers: Tensor | None,
        table: ConditionTable,
    ) -> None:
        """Keep the parts."""
        self.images, self.pipeline = images, pipeline
        self.numbers, self.table = numbers, table

    def __getstate__(self) -> dict[str, object]:
        """Leave networks behind: processes that load data get images and numbers alone."""
        return self.__dict__ | {"pipeline": None, "table": None}

    def __len__(self) -> int:
        """Give the number of images."""
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Give images, (B, C, H, W) uint8 or cached latents, and numbers, (B,)."""
        images = self.images.__getitems__(indices)
        return images if self.numbers is None else (images, self.numbers[torch.tensor(indices)])

    def clean(self, batch: Batch) -> Tensor:
        """Give the data that Dash is to denoise, (B, C, H, W)."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        images = images.to(self.pipeline.device)
        if images.is_floating_point():  # cached latents
            return images.float()
        images = to_model_range(images)
        return images if self.pipeline.codec is None else self.pipeline.codec.encode(images)

    def conditions(self, batch: Batch, guidance_scale: Tensor | None) -> Conditions:
        """Give what belongs to the images of a batch."""
        if self.numbers is None:
            return UNCONDITIONAL
        return self.table.look_up(batch[1], guidance_scale)


def open_source(
    pipeline: FrozenPipeline, config: "TrainDotConfig", split: Literal["train", "test"]
) -> ConditionedImages:
    """Open the images of one split, with captions or classes where the pipeline takes them.

    Raises:
        ValueError: If they have none, or a setting is for pipelines of another kind.
    """
    kind = pipeline.encoder.kind
    if config.cache_latents and pipeline.codec is None:
        raise ValueError(
            "cache_latents is True, but this pipeline works on pixels; leave --cache_latents out."
        )
    if kind != "text":
        for name in ("caption_column", "class_names"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name} is {getattr(config, name)!r}, but this pipeline takes no text; "
                    f"leave --{name} out."
                )
    size = (pipeline.resolution, pipeline.image_channels)
    images = open_training_images(config, *size, split, config.caption_column)
    if kind == "none":
        return ConditionedImages(images, pipeline, None, ConditionTable(pipeline.encoder, ()))
    if kind == "text":
        values, numbers = caption_images(images, config.class_names)
    else:
        values, numbers = _classes(images, pipeline)
    return ConditionedImages(images, pipeline, numbers, ConditionTable(pipeline.encoder, values))


def _classes(images: ImageDataset, pipeline: FrozenPipeline) -> tuple[list[int], Tensor]:
    settings = pipeline.dash.model.config
    count = settings.get("num_class_embeds") or settings.get("num_embeds_ada_norm")
    if images.labels is None:
        raise ValueError(
            "the pipeline takes class labels, but these images have none; give IDX files with "
            "labels or a hub dataset with class numbers in its column label."
        )
    if int(images.labels.max()) >= count:
        raise ValueError(
            f"labels go up to {int(images.labels.max())}, but the pipeline knows {count} classes."
        )
    return list(range(count)), images.labels


def describe_data(source: ConditionedImages, config: "TrainDotConfig") -> dict[str, object]:
    """Say which images a cache is made of, as JSON has it."""
    data, part = str(config.train_data_dir or config.dataset_name), config.dataset_config_name
    return {
        "data": data if part is None else f"{data}, {part}",
        "image_column": config.image_column,
        "images": len(source),
        "image_files": None if source.images.contents is None else source.images.contents(),
    }


def draw_windows(
    source: ConditionedImages,
    config: "TrainDotConfig",
    batch: Batch,
    generator: torch.Generator,
    dot: nn.Module | None = None,
    num_points: int | None = None,
) -> Window:
    """Make windows from images as `config` says, all draws from `generator`.

    `num_points` is that of a training's windows if None.
    """
    pipeline, clean = source.pipeline, source.clean(batch)
    scale = draw_guidance_scale(len(clean), pipeline.guidance_scale, generator)
    return fresh_window(
        pipeline.dash,
        clean,
        generator,
        num_points or config.window_steps + 1,
        config.timestep_sampling,
        source.conditions(batch, scale),
        dot,
    )
