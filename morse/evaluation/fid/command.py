"""`morse eval fid`: distances between images and real ones, generated on the way if asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from morse.evaluation.fid.extractors import (
    FASHION_MNIST,
    Extractor,
    ExtractorOptions,
    load_extractor,
)
from morse.evaluation.fid.feature_sets import is_statistics
from morse.settings import as_json, given, require_least, require_positive

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

# What only generating takes.
GENERATION = (
    "dot", "scheduler", "lsd", "num_inference_steps", "speed_ratio", "reference_steps",
    "num_images", "seed", "guidance_scale", "dtype", "output_dir",
)  # fmt: skip
LEAST = {
    "num_images": 2, "batch_size": 1, "kid_subset_size": 2, "lsd": 1, "num_inference_steps": 1,
    "reference_steps": 1,
}  # fmt: skip


@dataclass(frozen=True)
class FidConfig:
    """Measure FID and other distances of images, or of those that a pipeline makes first."""

    real: str | None = field(
        default=None,
        metadata={
            "help": 'folder, IDX file, hub:NAME, statistics .npz, or "fashion-mnist", which is the '
            "default for the embedded pipeline of that name"
        },
    )
    fake: str | None = field(
        default=None, metadata={"help": "likewise, what is measured; or give --pipeline"}
    )
    pipeline: str | None = field(
        default=None, metadata={"help": "fashion-mnist, a folder or a hub id: generate images"}
    )
    dot: str | None = field(
        default=None, metadata={"help": "a Dot's folder; the pipeline's own if left out"}
    )
    scheduler: str | None = field(
        default=None, metadata={"help": "ddim, dpmsolver++, ...; the pipeline's own if left out"}
    )
    lsd: tuple[float, ...] = field(
        default=(), metadata={"help": "budgets to generate within by Dash and Dot, in LSD"}
    )
    num_inference_steps: tuple[int, ...] = field(
        default=(), metadata={"help": "numbers of steps to generate with by the bare pipeline"}
    )
    speed_ratio: float | None = field(
        default=None, metadata={"help": "N to plan with; what Dot's config says if left out"}
    )
    reference_steps: int | None = field(
        default=None,
        metadata={
            "help": "also measure PSNR and SSIM to the bare pipeline's images of so many steps"
        },
    )
    lpips: bool = field(
        default=False,
        metadata={"help": "and LPIPS, which needs --lpips_weights"},
    )
    lpips_weights: Path | None = field(
        default=None, metadata={"help": "safetensors file of torchvision's AlexNet"}
    )
    num_images: int = field(default=5000, metadata={"help": "images to generate for each budget"})
    seed: int = field(default=0, metadata={"help": "image i starts from the noise of seed + i"})
    batch_size: int = field(
        default=64, metadata={"help": "consecutive images sampled, or read, at a time"}
    )
    prompts: Path | None = field(
        default=None, metadata={"help": "file of prompts, one a line; image i takes i modulo all"}
    )
    class_names: tuple[str, ...] = field(
        default=(),
        metadata={"help": "prompts in turn; for a class-conditional pipeline names or numbers"},
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "the pipeline's own if left out"}
    )
    dtype: Literal["float32", "float16", "bfloat16"] = field(
        default="float32", metadata={"help": "the pipeline's"}
    )
    output_dir: Path = field(
        default=Path("fid_output"),
        metadata={"help": "folder for generated images; goes on where it was"},
    )
    extractor: str | None = field(
        default=None,
        metadata={
            "help": "inception, clip, dinov2, fashion-mnist, or your own nn.Module by "
            "module.path:Name; if left out inception, or fashion-mnist where --real is"
        },
    )
    inception_weights: Path | None = field(
        default=None, metadata={"help": "safetensors file of Inception-v3 of 2015"}
    )
    clip_model: str = field(
        default=ExtractorOptions.clip_model, metadata={"help": "folder or hub id"}
    )
    dinov2_model: str = field(
        default=ExtractorOptions.dinov2_model, metadata={"help": "folder or hub id"}
    )
    kid_subset_size: int = field(
        default=1000, metadata={"help": "at most half of the images is taken"}
    )
    split: str = field(default="train", metadata={"help": "of IDX folders and hub data sets"})
    image_column: str = field(default="image", metadata={"help": "of hub data sets"})
    strict: bool = field(
        default=False, metadata={"help": "fail at an unreadable image instead of leaving it out"}
    )
    save_stats: Path | None = field(
        default=None, metadata={"help": "write the real images' mu and sigma to this .npz file"}
    )
    json: Path | None = field(default=None, metadata={"help": "also write the result to this file"})
    device: str = field(
        default="auto", metadata={"help": "cpu, cuda or another torch device; auto takes a GPU"}
    )

    def __post_init__(self) -> None:
        """Check ranges, and which options go together."""
        require_least(self, LEAST)
        require_positive(self, ("speed_ratio",))
        if self.fake is not None and self.pipeline is not None:
            raise ValueError("fake and pipeline were both given; give one of the two")
        if self.pipeline is not None:
            own = self.pipeline == FASHION_MNIST and self.extractor in (None, FASHION_MNIST)
            if self.real is None and own:
                object.__setattr__(self, "real", FASHION_MNIST)
            self._check_generation()
        else:
            self._check_sources()
        if self.save_stats is not None and (self.real is None or is_statistics(self.real)):
            raise ValueError(
                f"save_stats writes the statistics of real images, but real is {self.real}; give "
                "a folder or another source of images"
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
        if found := given(self, GENERATION):
            raise ValueError(
                f"given without --pipeline: {', '.join(found)}; that is for generating images, so "
                "give --pipeline, or leave it out"
            )
        if self.real is None or (self.fake is None and self.save_stats is None):
            raise ValueError(
                "give --real and --fake, or --real and --pipeline, or --real and --save_stats"
            )

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

    def to_json(self) -> dict[str, object]:
        """Return the settings as JSON has them."""
        return as_json(self)


def run_fid(config: FidConfig) -> dict[str, object] | None:
    """Generate what is missing, measure, print a table, and write JSON if asked for.

    Under `accelerate launch` all processes generate and the main one measures.

    Returns:
        The JSON's content; None in other processes than the main one.

    Raises:
        FileNotFoundError: If a source, or weights, do not exist.
        ValueError: If images, weights, packages or settings are not what is needed.
    """
    from morse.evaluation.fid.budgets import generate_all
    from morse.evaluation.fid.lpips import check_lpips_weights
    from morse.evaluation.fid.measuring import check_real, measure
    from morse.evaluation.fid.report import print_result
    from morse.files import write_json

    state, device = _process(config.device)
    extractor = None
    if state.is_main_process:  # first, so that what is missing is told before hours of sampling
        extractor = config.load_extractor(device)
        check_real(config, extractor)
        if config.lpips:
            check_lpips_weights(config.lpips_weights)
        has_words = config.prompts is not None or config.class_names
        is_scored = extractor is not None and extractor.embed_text is not None and has_words
        if config.real is None and config.reference_steps is None and not is_scored:
            print("nothing will be measured: give --real for distances, --reference_steps for PSNR")
    rows = generate_all(config, state, device) if config.pipeline is not None else None
    is_main = state.is_main_process
    if state.num_processes > 1:
        state.destroy_process_group()  # nobody waits for the main process from here on
    if not is_main:
        return None
    result = measure(config, extractor, rows, device)
    print_result(result)
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.json, result)
        print(f"wrote {config.json}")
    return result


def _process(device: str) -> "tuple[PartialState, torch.device]":
    """Return this process's place among all, and the device it works on."""
    from accelerate import PartialState

    from morse.evaluation.environment import resolve_device

    state = PartialState(cpu=device == "cpu")
    return state, state.device if state.num_processes > 1 else resolve_device(device)
