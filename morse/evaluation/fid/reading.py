"""Sets of images, read in batches of bytes, and their features."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor

from morse.evaluation.fid.extractors import Extractor
from morse.evaluation.fid.image_sets import ImageSet, ReadingFacts, describe_sizes
from morse.training.image_reading import BROKEN, fit_image, has_alpha, to_bytes, to_channels


@torch.no_grad()
def read_features(
    images: ImageSet,
    extractor: Extractor,
    batch_size: int = 64,
    strict: bool = False,
    on_images: Callable[[int, int], object] | None = None,
) -> tuple[Tensor, Tensor | None, ReadingFacts]:
    """Extract the features of every readable image, in order.

    Args:
        images: The set.
        extractor: What the features are of.
        batch_size: Images at a time.
        strict: Raise at an unreadable image instead of leaving it out.
        on_images: Called with the number of images done and of all images, for progress bars.

    Returns:
        Features (N, D) and, if the extractor gives any, class logits (N, K), float32 on the CPU,
        and what was met while reading.

    Raises:
        ValueError: If sizes are mixed and the extractor does not resize, if features are not
            finite, or if no image can be read.
    """
    facts, features, logits = ReadingFacts(), [], []
    for batch in read_batches(images, extractor.channels, batch_size, facts, strict):
        if len(facts.sizes) > 1 and not extractor.resizes:
            raise ValueError(
                f"{images.name} has images of different sizes, {describe_sizes(facts.sizes)}, but "
                f"extractor {extractor.name} does not resize; give them one size"
            )
        batch_features, batch_logits = extractor.compute(batch)
        features.append(batch_features.float().cpu())
        if batch_logits is not None:
            logits.append(batch_logits.float().cpu())
        if on_images is not None:
            on_images(facts.num_images + len(facts.unreadable), len(images))
    found = torch.cat(features)
    if not found.isfinite().all():
        raise ValueError(
            f"extractor {extractor.name} gives features of {images.name} that are "
            "not finite; check its weights"
        )
    return found, torch.cat(logits) if logits else None, facts


def read_batches(
    images: ImageSet, channels: int, batch_size: int, facts: ReadingFacts, strict: bool = False
) -> Iterator[Tensor]:
    """Read a set in order, in batches of images of one size.

    Pixels are those of the file: EXIF rotation is left alone, as pytorch-fid and torch-fidelity do.
    Where the set has a resolution, images are turned, cropped and resized as training does.

    Args:
        images: The set.
        channels: 1 for grey, 3 for colour.
        batch_size: At most so many images a batch; a change of size begins a new one.
        facts: Filled while reading.
        strict: Raise at the first unreadable image instead of leaving it out.

    Yields:
        (B, channels, H, W), uint8.

    Raises:
        ValueError: If an image cannot be read and `strict` is on, or if none can.
    """

    def read(index: int) -> tuple[Tensor, Image.Image] | Exception:
        try:
            with images.open(index) as image:
                if images.resolution is not None:
                    return fit_image(image, images.resolution, channels), image
                return to_bytes(to_channels(image, channels)), image
        except BROKEN as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(images), batch_size):
            chunk = range(first, min(first + batch_size, len(images)))
            kept = []
            for index, result in zip(chunk, pool.map(read, chunk), strict=True):
                if isinstance(result, Exception):
                    _note_unreadable(images.names[index], result, facts, strict)
                else:
                    _note(*result, facts)
                    kept.append(result[0])
            for _, run in groupby(kept, key=lambda pixels: pixels.shape):
                yield torch.stack(list(run))
    if not facts.num_images:
        raise ValueError(
            f"{images.name}: none of {len(images)} images can be read: {facts.unreadable[0]}"
        )


def _note_unreadable(name: str, error: Exception, facts: ReadingFacts, strict: bool) -> None:
    if strict:
        raise ValueError(f"{name} cannot be read as an image: {error}; remove it") from error
    facts.unreadable.append(f"{name} ({error})")


def _note(pixels: Tensor, image: Image.Image, facts: ReadingFacts) -> None:
    """Count what an image was, and the size of what was made of it, (C, H, W)."""
    channels, height, width = pixels.shape
    is_grey = image.mode in ("L", "LA", "1")
    facts.num_images += 1
    facts.grey += is_grey and channels == 3
    facts.to_grey += not is_grey and channels == 1
    facts.alpha += has_alpha(image)
    facts.sizes[f"{width}x{height}"] += 1
