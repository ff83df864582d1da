"""What the benchmark compares sets of images in: an extractor's features, and real images'."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from morse.evaluation.bench.real_images import real_words
from morse.evaluation.features import (
    FashionFeatures,
    extract_features,
    load_features,
    read_features_config,
)
from morse.evaluation.fid.extractors import (
    FASHION_MNIST,
    Extractor,
    ExtractorOptions,
    load_extractor,
)
from morse.evaluation.fid.feature_sets import FeatureSet, read_features
from morse.evaluation.fid.image_sets import ImageSet, describe_sizes
from morse.evaluation.report.pictures import to_bytes, to_picture
from morse.evaluation.scoring import (
    AXES,
    Axis,
    Scorer,
    axes_of,
    axis_names,
    distance_for,
    is_fashion_like,
)

if TYPE_CHECKING:
    from morse.evaluation.bench.config import BenchmarkConfig

AUTO, NO_EXTRACTOR = "auto", "none"  # beside the names of `load_extractor`


def choose_extractor(config: "BenchmarkConfig", device: torch.device) -> Extractor | None:
    """Load the extractor that was asked for; None for none.

    Raises:
        FileNotFoundError: If its weights are not where they should be.
        ValueError: If it is unknown, or weights or a package are missing.
    """
    if config.extractor == NO_EXTRACTOR:
        return None
    options = ExtractorOptions(config.inception_weights, config.clip_model, config.dinov2_model)
    name = FASHION_MNIST if config.extractor == AUTO else config.extractor
    return load_extractor(name, device, options)


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """What is measured in feature space.

    Attributes:
        extractor: Makes the features; None for none.
        real: What is known of real images; None without any.
        is_optional: Whether images of another shape than Fashion-MNIST's have no features.
        device: Where the extractor is.
    """

    extractor: Extractor | None
    real: FeatureSet | None
    is_optional: bool
    device: torch.device

    @property
    def axes(self) -> dict[str, Axis]:
        """Every axis there may be, with titles that name the extractor."""
        return AXES if self.extractor is None else axes_of(self.extractor.titles)

    def axes_measured(self, features: Tensor) -> list[str]:
        """Name the axes that are measured where an image's features are like these, (N, D)."""
        return axis_names(features.shape[1], self.real is not None)

    @property
    def kernel_device(self) -> str:
        """Where distances between all pairs of images are computed, in float64."""
        return str(self.device) if self.device.type == "cuda" else "cpu"

    def check(self, images: Tensor) -> None:
        """Try out some images (N, C, H, W) like those to come, before all are sampled.

        Raises:
            ValueError: If the extractor cannot take images of this size, or real images have other
                sizes and it does not resize.
        """
        if not self._has_features(images):
            if self.is_optional:
                print("fidelity alone is measured: give --extractor, and --real, for distances")
            return
        self._check_size(f"{images.shape[3]}x{images.shape[2]}")
        self.extract(images)

    def scorer(self, reference: Tensor) -> Scorer:
        """Make the scorer of a repetition.

        Args:
            reference: The reference sampler's images, (R, C, H, W) in [0, 1].
        """
        if not self._has_features(reference):
            return Scorer(None, None, reference)
        return Scorer(self.extract, self.real, reference)

    def _has_features(self, images: Tensor) -> bool:
        fits = not self.is_optional or is_fashion_like(images)
        return self.extractor is not None and fits

    def extract(self, images: Tensor) -> Tensor:
        """Return the features of images (N, C, H, W) in [0, 1], (N, D), float32, on the CPU.

        The extractor gets them as if from files, 8 bits each; only Fashion-MNIST's gets the pixels
        as they were sampled, a mean of colours, which all figures with it were measured of.
        """
        if self.extractor.name == FASHION_MNIST:
            return extract_features(self._classifier, images.mean(dim=1, keepdim=True))
        try:
            return read_features(as_image_set(images), self.extractor, strict=True)[0]
        except RuntimeError as error:
            if self.extractor.resizes:
                raise
            height, width = images.shape[2:]
            raise ValueError(
                f"extractor {self.extractor.name} does not resize, and fails on sampled images of "
                f"{width}x{height} ({error}); choose one for this size, or inception, clip, dinov2"
            ) from error

    def facts(self, num_features: int) -> dict[str, object]:
        """Return what must be told with every figure, ready for JSON; {} without features."""
        if self.extractor is None or num_features == 0:
            return {}
        distance = {"frechet": "frechet", "kernel": "kernel_distance"}[distance_for(num_features)]
        about = {"words": self.extractor.words, "feature_dim": num_features}
        facts = {
            "metric": self.extractor.titles[distance],
            "features_sha256": self.extractor.sha256,
            "extractor": {**self.extractor.identity(), **about},
        }
        if self.extractor.name == FASHION_MNIST:
            facts["features_test_accuracy"] = read_features_config().get("test_accuracy")
        if self.real is not None:
            facts["real_images"] = real_words(self.real)
            facts["real"] = {
                "name": self.real.name,
                "num_images": self.real.num_images,
                "reading": self.real.facts,
                "notes": self.real.notes,
            }
        return facts

    @cached_property
    def _classifier(self) -> FashionFeatures:
        return load_features().to(self.device)

    def _check_size(self, size: str) -> None:
        """Refuse other sizes than real images have, or say that resizing tells them apart."""
        sizes = Counter({} if self.real is None else self.real.facts.get("sizes", {}))
        own = self.extractor.name == FASHION_MNIST  # it takes two sizes, and refuses others itself
        if own or not sizes or size in sizes:
            return
        found = f"real images are {describe_sizes(sizes)} and sampled ones {size}"
        if not self.extractor.resizes:
            raise ValueError(
                f"{found}, but extractor {self.extractor.name} does not resize; give --real images "
                "of that size, or choose inception, clip or dinov2"
            )
        print(f"{found}: how they were resized tells them apart")


def as_image_set(images: Tensor) -> ImageSet:
    """Give sampled images (N, C, H, W) in [0, 1] as files would have them, rounded to 8 bits."""

    def open_image(index: int) -> Image.Image:
        return to_picture(to_bytes(images[index : index + 1])[0])

    return ImageSet("sampled images", [f"image {i}" for i in range(len(images))], open_image)
