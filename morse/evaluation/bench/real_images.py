"""The real images that the benchmark compares sampled ones with."""

import json
from pathlib import Path

import numpy as np
from torch import Tensor

from morse.evaluation.bench.store import CellStore
from morse.evaluation.fid.extractors import FASHION_MNIST, Extractor
from morse.evaluation.fid.feature_sets import (
    FeatureSet,
    extract_feature_set,
    is_statistics,
    load_feature_set,
)
from morse.evaluation.fid.image_sets import ImageSet, open_image_set
from morse.evaluation.metrics import feature_statistics
from morse.evaluation.progress import progress_bar
from morse.evaluation.scoring import distance_for
from morse.training.shards import digest

MAX_REAL = 5000  # images that are read; kernels of all pairs are computed with those sampled


def open_real(source: str | None, extractor: Extractor | None) -> ImageSet | FeatureSet | None:
    """Find the real images, so that what is missing is told before anything is sampled.

    Args:
        source: What `load_feature_set` takes; None for the statistics that come with the
            Fashion-MNIST extractor, and for no real images with another.
        extractor: What features are compared in; None for nothing.

    Returns:
        Statistics, or images that are yet to be read (`read_real`).

    Raises:
        FileNotFoundError: If there is nothing at `source`.
        ValueError: If it holds no images, or does not allow the distance that is measured.
    """
    if source is None and extractor is not None and extractor.name == FASHION_MNIST:
        source = FASHION_MNIST
    if source is None or extractor is None:
        return None
    return (
        _checked(load_feature_set(source, extractor))
        if is_statistics(source)
        else open_image_set(source)
    )


def read_real(
    opened: ImageSet | FeatureSet | None, extractor: Extractor | None, store: CellStore
) -> FeatureSet | None:
    """Extract the features of real images, or take them from the store.

    Of more than `MAX_REAL` images, as many are drawn at random, the same ones in each run.

    Args:
        opened: From `open_real`.
        extractor: What the features are of.
        store: Where they are kept.

    Raises:
        ValueError: If they cannot be read, have mixed sizes that the extractor does not take, or
            are too few.
    """
    if not isinstance(opened, ImageSet):
        return opened
    images = opened
    if len(opened) > MAX_REAL:
        chosen = np.sort(np.random.default_rng(0).permutation(len(opened))[:MAX_REAL]).tolist()
        names = [opened.names[i] for i in chosen]
        images = ImageSet(opened.name, names, lambda i: opened.open(chosen[i]))

    # Cells do not depend on them, so that a run may go on with others, be they of the same names.
    contents = [_version(name) for name in (images.name, *images.names)]
    named = json.dumps([opened.name, opened.names, extractor.identity(), contents])
    stored = f"real-{digest(named)}"

    def extract() -> Tensor:
        with progress_bar(f"features of {images.name}", shown=True) as on_images:
            found = extract_feature_set(images, extractor, on_images=on_images)
        facts = found.facts | {"num_available": len(opened)}
        store.once(stored, lambda: {"facts": facts, "notes": found.notes})
        return found.features

    features = store.features(stored, extract)
    told = store.once(stored, dict)
    for note in told["notes"]:
        print(note)
    statistics = feature_statistics(features)
    return _checked(FeatureSet(images.name, *statistics, len(features), features, **told))


def real_words(real: FeatureSet) -> str:
    """Say what the real images are, and how many of them were read."""
    if real.num_images is None:
        return f"{real.name} (of an unknown number)"
    available = real.facts.get("num_available", real.num_images)
    drawn = f" drawn at random from {available:,}" * (real.num_images < available)
    return f"{real.name} ({real.num_images:,}{drawn})"


def _version(name: str) -> tuple[int, int] | None:
    """Tell a file from another of its name; None for what is no file, such as a row of a set."""
    file = Path(name)
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None


def _checked(real: FeatureSet) -> FeatureSet:
    """Refuse real images that do not allow the distance measured with so many features."""
    dim = len(real.mean)
    if distance_for(dim) == "kernel" and real.features is None:
        raise ValueError(
            f"real is {real.name}, a mean and a covariance, but with {dim} features the kernel "
            "distance is measured, which needs the real images: give their folder, IDX file or "
            "hub:NAME, or leave --real out for the distance to the reference's images alone"
        )
    if distance_for(dim) == "frechet" and real.num_images is not None and real.num_images <= dim:
        raise ValueError(
            f"real is {real.name}, which has {real.num_images} images that can be read, but a "
            f"Fréchet distance in {dim} features needs more than {dim}; give more"
        )
    return real
