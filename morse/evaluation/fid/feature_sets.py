"""The features of a set of images, and their statistics in files that pytorch-fid shares."""

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from morse.evaluation.features import load_reference
from morse.evaluation.fid.extractors import FASHION_MNIST, Extractor
from morse.evaluation.fid.image_sets import (
    AS_IT_IS,
    ImageSet,
    SetOptions,
    open_image_set,
)
from morse.evaluation.fid.reading import read_features
from morse.evaluation.metrics import feature_statistics
from morse.files import write_bytes

STATISTICS_SUFFIX = ".npz"
FASHION_RESOLUTION = 32  # of the images that the package's statistics are of


@dataclass(frozen=True)
class FeatureSet:
    """What is known of one side of a comparison.

    Attributes:
        name: Where the images are from.
        mean: (D,), float64.
        covariance: (D, D), float64, unbiased.
        num_images: How many images they are of; None where a file does not say.
        features: (N, D), float32, on the CPU; None where only statistics are known.
        logits: (N, K) class logits, if the extractor gives any.
        resolution: Height and width that the images were cropped and resized to; None if they were
            not, or where a file does not say.
        facts: What was met while reading, for results.
        notes: The same in words, for people.
    """

    name: str
    mean: Tensor
    covariance: Tensor
    num_images: int | None
    features: Tensor | None = None
    logits: Tensor | None = None
    resolution: int | None = None
    facts: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """Warn where there are too few images for a covariance of full rank."""
        dim = len(self.mean)
        if self.num_images is None or self.num_images > dim:
            return []
        return [
            f"{self.num_images} images for {dim} features: a covariance is singular, so Fréchet "
            "distances are strongly biased upwards and comparable only with others of as many "
            "images; kernel distances are unbiased, but for CMMD"
        ]


def is_statistics(source: str) -> bool:
    """Tell whether a source names statistics rather than images."""
    return source == FASHION_MNIST or source.endswith(STATISTICS_SUFFIX)


def load_feature_set(
    source: str,
    extractor: Extractor,
    batch_size: int = 64,
    strict: bool = False,
    options: SetOptions = AS_IT_IS,
    on_images: Callable[[int, int], object] | None = None,
) -> FeatureSet:
    """Load statistics, or extract the features of images.

    Args:
        source: "fashion-mnist" for the statistics that come with the package, a .npz file of
            pytorch-fid's layout, or any source of `open_image_set`.
        extractor: What the features are of.
        batch_size: Images at a time.
        strict: Raise at an unreadable image instead of leaving it out.
        options: How images are read; of statistics' images their resolution is compared with it.
        on_images: See `extract_feature_set`.
    """
    if source == FASHION_MNIST:
        if extractor.name != FASHION_MNIST:
            raise ValueError(
                f"{FASHION_MNIST} stands for statistics of extractor {FASHION_MNIST}, but "
                f"extractor is {extractor.name}; give the images, or --extractor {FASHION_MNIST}"
            )
        if options.resolution not in (None, FASHION_RESOLUTION):
            raise ValueError(
                f"resolution is {options.resolution}, but {FASHION_MNIST} stands for statistics of "
                f"images of {FASHION_RESOLUTION}x{FASHION_RESOLUTION}; leave it out, or give the "
                "images as --real"
            )
        return FeatureSet("Fashion-MNIST's training images", *load_reference(), 60_000)
    if source.endswith(STATISTICS_SUFFIX):
        return load_statistics(Path(source), extractor, options.resolution)
    images = open_image_set(source, options)
    return extract_feature_set(images, extractor, batch_size, strict, on_images)


def extract_feature_set(
    images: ImageSet,
    extractor: Extractor,
    batch_size: int = 64,
    strict: bool = False,
    on_images: Callable[[int, int], object] | None = None,
) -> FeatureSet:
    """Extract the features of every readable image, in order, and their statistics.

    Args:
        images: The set.
        extractor: See `read_features`, like the rest and what is raised.
        batch_size: See there.
        strict: See there.
        on_images: See there.

    Raises:
        ValueError: Also if fewer than two images can be read.
    """
    features, logits, facts = read_features(images, extractor, batch_size, strict, on_images)
    return FeatureSet(
        images.name,
        *feature_statistics(features),
        num_images=facts.num_images,
        features=features,
        logits=logits,
        resolution=images.resolution,
        facts=facts.to_json(),
        notes=facts.notes(images.name),
    )


def save_statistics(path: Path, features: FeatureSet, extractor: Extractor) -> None:
    """Write mu (D,) and sigma (D, D), float64, in pytorch-fid's layout, which ignores the rest.

    The rest is the number of images, what size they were brought to if they were, and what the
    features are of; `load_statistics` checks it.
    """
    cropped = {} if features.resolution is None else {"resolution": np.int64(features.resolution)}
    content = io.BytesIO()
    np.savez(
        content,
        mu=features.mean.numpy(),
        sigma=features.covariance.numpy(),
        num_images=np.int64(features.num_images),
        **cropped,
        **extractor.identity(),
    )
    write_bytes(path, content.getvalue())


def load_statistics(path: Path, extractor: Extractor, resolution: int | None = None) -> FeatureSet:
    """Read statistics written by `save_statistics` or by pytorch-fid.

    Args:
        path: The file.
        extractor: What the other features are of.
        resolution: What the other images are cropped and resized to, if they are.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, of another layout, of another extractor or another resolution.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as content:
            # Other tools' files may hold images too, or objects.
            known = {"mu", "sigma", "num_images", "resolution", *extractor.identity()}
            arrays = {name: content[name] for name in content.files if name in known}
        mean, covariance = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no statistics file with float arrays mu and sigma ({error}); make one by "
            "--real DIR --save_stats FILE.npz"
        ) from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: mu has shape {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, but "
            "they must be (D,) and (D, D)"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"{path}: mu or sigma holds NaN or infinity; make it anew")
    for key, wanted in extractor.identity().items():
        if key in arrays and str(arrays[key]) != wanted:
            raise ValueError(
                f"{path} was made with {key} {arrays[key]}, but this is {wanted}; statistics of "
                "different features cannot be compared"
            )
    num_images, cropped = (
        int(arrays[key]) if key in arrays else None for key in ("num_images", "resolution")
    )
    notes = _resolution_notes(path, cropped, resolution)
    if "extractor" not in arrays:
        notes.append(
            f"{path} does not say which extractor it was made with; it is taken to be this one, "
            f"resized by {extractor.resize}: pytorch-fid and clean-fid resize otherwise"
        )
    return FeatureSet(str(path), mean, covariance, num_images, resolution=cropped, notes=notes)


def _resolution_notes(path: Path, found: int | None, wanted: int | None) -> list[str]:
    """Compare what a file's images were brought to with what others are, and say what differs."""
    if found == wanted:
        return []
    if found is None:
        return [f"{path} does not say that its images were brought to {wanted}x{wanted}, too"]
    if wanted is None:
        return [f"{path} is of images that were cropped and resized to {found}x{found}"]
    raise ValueError(
        f"{path} is of images that were cropped and resized to {found}x{found}, but resolution is "
        f"{wanted}; give --resolution {found}, or the images"
    )
