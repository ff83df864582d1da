"""What `morse eval fid` measures, and generates before: its settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from morse.evaluation.fid.extractors import (
    FASHION_MNIST,
    Extractor,
    ExtractorOptions,
    load_extractor,
)
from morse.evaluation.fid.feature_sets import STATISTICS_SUFFIX, is_statistics
from morse.evaluation.fid.image_sets import HUB, SetOptions
from morse.evaluation.prompts import read_prompts
from morse.settings import (
    Dtype,
    changed,
    option,
    require_least,
    require_places,
    require_positive,
)

if TYPE_CHECKING:
    import torch

# What only generating takes.
GENERATION = (
    "dot", "scheduler", "timestep_spacing", "lsd", "num_inference_steps", "speed_ratio",
    "reference_steps", "num_images", "seed", "guidance_scale", "dtype", "output_dir",
)  # fmt: skip
LEAST = {
    "num_images": 2, "batch_size": 1, "kid_subset_size": 2, "lsd": 1, "num_inference_steps": 1,
    "reference_steps": 1, "resolution": 1,
}  # fmt: skip


@dataclass(frozen=True)
class FidConfig:
    """Measure FID and other distances of images, or of those that a pipeline makes first."""

    real: str | None = option(
        None,
        'folder, IDX file, hub:NAME, statistics .npz, or "fashion-mnist", which is the default '
        "for the embedded pipeline of that name",
    )
    fake: str | None = option(None, "likewise, what is measured; or give --pipeline")
    pipeline: str | None = option(None, "fashion-mnist, a folder or a hub id: generate images")
    dot: str | None = option(None, "a Dot's folder or hub id; the pipeline's own if left out")
    scheduler: str | None = option(None, "ddim, dpmsolver++, ...; the pipeline's own if left out")
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = option(
        None,
        "where steps lie but those of saved plans, which bring theirs; if left out as in `morse "
        "bench` and `morse plan`, trailing, with --scheduler, else the pipeline's own",
    )
    lsd: tuple[float, ...] = option((), "budgets to generate within by Dash and Dot, in LSD")
    num_inference_steps: tuple[int, ...] = option(
        (), "numbers of steps to generate with by the bare pipeline"
    )
    speed_ratio: float | None = option(
        None, "N, Dash's time over Dot's; what Dot's config says if left out"
    )
    reference_steps: int | None = option(
        None, "also measure PSNR and SSIM to the bare pipeline's images of so many steps"
    )
    lpips: bool = option(False, "and LPIPS, which needs --lpips_weights")
    lpips_weights: Path | None = option(None, "safetensors file of torchvision's AlexNet")
    num_images: int = option(5000, "images to generate for each budget")
    seed: int = option(0, "image i starts from the noise of seed + i")
    batch_size: int = option(
        64,
        "consecutive images sampled, or read, at a time; each has its noise whatever this is, and "
        "pixels agree to rounding",
    )
    prompts: tuple[str, ...] = option(
        (), "texts, or one file of them, one a line; image i takes i modulo all"
    )
    class_names: tuple[str, ...] = option(
        (), "prompts in turn; for a class-conditional pipeline names or numbers"
    )
    guidance_scale: float | None = option(None, "the pipeline's own if left out")
    dtype: Dtype = option("float32", "the pipeline's")
    output_dir: Path = option(
        Path("fid_output"), "folder for generated images; goes on where it was, also to more"
    )
    extractor: str | None = option(
        None,
        "inception, clip, dinov2, fashion-mnist, or your own nn.Module by module.path:Name; if "
        "left out inception, or fashion-mnist where --real is. Without --real it gives the "
        "Inception score, or with prompts CLIP's",
    )
    inception_weights: Path | None = option(None, "safetensors file of Inception-v3 of 2015")
    clip_model: str = option(ExtractorOptions.clip_model, "folder or hub id")
    dinov2_model: str = option(ExtractorOptions.dinov2_model, "folder or hub id")
    kid_subset_size: int = option(1000, "at most half of the images is taken")
    split: str = option("train", "of IDX folders and hub data sets")
    image_column: str = option("image", "of hub data sets")
    dataset_config_name: str | None = option(
        None, "of hub data sets that have several configurations"
    )
    resolution: int | None = option(
        None,
        "for features crop the centre square of all images, real and measured, and resize it to "
        "this, as training does; those of IDX files are fitted as training fits them, where there "
        "is room by a border; if left out all are taken as they are",
    )
    strict: bool = option(False, "fail at an unreadable image instead of leaving it out")
    save_stats: Path | None = option(None, "write the real images' mu and sigma to this .npz file")
    json: Path | None = option(None, "also write the result to this file")
    device: str = option("auto", "cpu, cuda or another torch device; auto takes a GPU")

    def __post_init__(self) -> None:
        """Check ranges, and which options go together."""
        require_least(self, LEAST)
        require_positive(self, ("speed_ratio",))
        # Images may all be there, and output_dir is written to before any is sampled.
        require_places(self, files=("json", "save_stats"), kept=("output_dir",))
        read_prompts(self.prompts)  # an error is told before anything is loaded
        if self.fake is not None and self.pipeline is not None:
            raise ValueError("fake and pipeline were both given; give one of the two")
        if self.pipeline is not None:
            own = self.pipeline == FASHION_MNIST and self.extractor in (None, FASHION_MNIST)
            if self.real is None and own:
                object.__setattr__(self, "real", FASHION_MNIST)
            self._check_generation()
        else:
            self._check_sources()
        if self.dataset_config_name is not None and not self._reads_hub():
            raise ValueError(
                f"dataset_config_name is {self.dataset_config_name!r}, but it is for data sets of "
                f"the hub; give {HUB}NAME as --real or --fake, or leave it out"
            )
        if self.save_stats is not None and (self.real is None or is_statistics(self.real)):
            raise ValueError(
                f"save_stats writes the statistics of real images, but real is {self.real}; give "
                "a folder or another source of images"
            )
        if self.save_stats is not None and not str(self.save_stats).endswith(STATISTICS_SUFFIX):
            raise ValueError(
                f"save_stats is {self.save_stats}, but --real tells statistics from images by "
                f"their ending; give {self.save_stats}.npz"
            )
        if self.lpips and self.reference_steps is None:
            raise ValueError("lpips compares with a reference; give --reference_steps")
        if self.lpips_weights is not None and not self.lpips:
            raise ValueError(
                f"lpips_weights is {self.lpips_weights}, but LPIPS is not asked for: give --lpips "
                "as well, or leave the weights out"
            )

    def _check_generation(self) -> None:
        if not (self.lsd or self.num_inference_steps):
            raise ValueError(
                "pipeline was given without a budget; give --lsd for Dash and Dot, "
                "--num_inference_steps for the bare pipeline, or both"
            )

    def _check_sources(self) -> None:
        if found := changed(self, GENERATION):
            raise ValueError(
                f"given without --pipeline: {', '.join(found)}; that is for generating images, so "
                "give --pipeline, or leave it out"
            )
        alone = self.fake is not None and self.extractor is not None
        if not alone and (self.real is None or (self.fake is None and self.save_stats is None)):
            raise ValueError(
                "give --real and --fake, --pipeline or --save_stats; or --fake and --extractor for "
                "what needs no real images"
            )

    def _reads_hub(self) -> bool:
        return any(source.startswith(HUB) for source in (self.real, self.fake) if source)

    @property
    def set_options(self) -> SetOptions:
        """How sources of images are read."""
        part = (self.split, self.image_column, self.dataset_config_name)
        return SetOptions(*part, self.resolution)

    @property
    def extractor_name(self) -> str:
        """The extractor asked for, or the default one."""
        default = FASHION_MNIST if self.real == FASHION_MNIST else "inception"
        return self.extractor or default

    def load_extractor(self, device: "torch.device") -> Extractor | None:
        """Load the extractor; None where nothing is measured in feature space."""
        if self.real is None and self.extractor is None:
            return None
        options = ExtractorOptions(self.inception_weights, self.clip_model, self.dinov2_model)
        return load_extractor(self.extractor_name, device, options)
