"""What the benchmark measures: its settings, and the list of methods and budgets they make."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from morse.evaluation.bench.architectures import ARCHITECTURES
from morse.evaluation.bench.checks import check_methods, check_settings
from morse.evaluation.bench.methods import Method
from morse.evaluation.bench.presets import left_out
from morse.evaluation.bench.solvers import SOLVERS
from morse.evaluation.bench.tasks import CHOOSABLE, PEER_SETTINGS, list_tasks
from morse.evaluation.fid.extractors import ExtractorOptions
from morse.evaluation.prompts import PROMPTS_HELP, read_prompts
from morse.settings import Dtype, MixedPrecision, as_json, given, option

PEER_NAMES = tuple(PEER_SETTINGS)


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measure quality against cost, and matched-quality speed-ups, of Morse and its controls."""

    output_dir: Path = option(Path("benchmark_output"), "folder for everything written")
    json: Path | None = option(None, "result file; output_dir/benchmark.json if left out")
    from_json: Path | None = option(
        None, "redraw the report of this result (.json or .json.gz); no sampling", alias="from"
    )
    resume: bool = option(False, "go on with the run in output_dir")
    quick: bool = option(
        False, "few images, budgets and methods: under two minutes on two CPU cores"
    )
    pipeline: str = option(
        "fashion-mnist",
        "fashion-mnist, fashion-mnist-text, a folder or hub id",
        alias="pretrained_model_name_or_path",
    )
    prompts: tuple[str, ...] = option((), PROMPTS_HELP)
    class_names: tuple[str, ...] = option(
        (), "the same as prompts; for a class-conditional pipeline names or numbers"
    )
    prompt_embeds: Path | None = option(
        None,
        "safetensors file with prompt_embeds (P, L, D), negative_prompt_embeds and so on, for a "
        "pipeline without a text encoder",
    )
    guidance_scale: tuple[float, ...] = option(
        (), "figures at each; the pipeline's own default if left out"
    )
    extractor: str = option(
        "auto",
        "what distances between sets of images are measured in: inception, clip, dinov2, "
        "fashion-mnist, your own nn.Module by module.path:Name, or none; auto takes fashion-mnist "
        "where images are grey, 32x32",
        alias="features",
    )
    real: str | None = option(
        None,
        "folder, IDX file, hub:NAME or statistics .npz to measure distances to; if left out to "
        "the reference's images alone, with fashion-mnist to its training images",
    )
    inception_weights: Path | None = option(None, "safetensors file of Inception-v3 of 2015")
    clip_model: str = option(ExtractorOptions.clip_model, "folder or hub id")
    dinov2_model: str = option(ExtractorOptions.dinov2_model, "folder or hub id")
    dot: str | None = option(None, "another Dot's folder or hub id; the pipeline's own if left out")
    independent_dot: str | None = option(
        None, "folder or hub id of a Dot trained to estimate alone, from the sample only: a control"
    )
    num_images: int | None = option(
        None, "images of each method, budget and seed; if left out 5000 on CUDA, else 32"
    )
    num_reference_images: int | None = option(
        None, "measure fidelity on so many of them; all if left out (100 LSD each)"
    )
    batch_size: int = option(250, "images at a time")
    lsd: tuple[int, ...] = option(
        (4, 6, 8, 12, 20, 30, 50), "budgets in whole LSD; without a GPU up to 30"
    )
    baseline_lsd: tuple[int, ...] = option(
        (3, 5, 10, 15, 25, 40, 70, 100),
        "further budgets of training-free solvers; without a GPU up to 40",
    )
    solvers: tuple[str, ...] = option(
        tuple(name for name in SOLVERS if name != "dpmsolver++1"), ", ".join(SOLVERS)
    )
    planned_solvers: tuple[str, ...] = option(
        ("leapfrog", "ddim", "dpmsolver++"),
        "those with which Morse also runs as lsd= plans, saved plans included",
    )
    kinds: tuple[str, ...] = option(CHOOSABLE, f"kinds of method: {', '.join(CHOOSABLE)}")
    peers: tuple[str, ...] = option(
        PEER_NAMES, f"other accelerators: {', '.join(PEER_NAMES)}, or none"
    )
    control_solvers: tuple[str, ...] = option(
        ("ddim", "dpmsolver++"), "those of --solvers that controls and peers run with"
    )
    ddim_ratios: tuple[float, ...] = option(
        (2.0,), "plan ratios tried with DDIM, also by controls; 0: none"
    )
    dpm_ratios: tuple[float, ...] = option(
        (1.5, 2.0), "plan ratios tried with the other solvers; 0 for none"
    )
    speed_ratio: float | None = option(
        None, "N, Dash's time over Dot's; measured at batch_size if left out"
    )
    latency_batch_sizes: tuple[int, ...] | None = option(
        None,
        "also measure N at these batch sizes, LoRA merged and not; 0 for none; if left out 1 16 "
        "64, up to --batch_size, with --arch 1 4 16 and on CUDA 64",
    )
    compile: bool = option(
        False, "sample with torch.compile'd Dash and Dot; N is measured eager too"
    )
    cuda_graphs: bool = option(
        False, "replay Dash's and Dot's kernels as CUDA graphs instead; N likewise"
    )
    merge_lora: bool = option(True, "sample with Dot's LoRA merged into a copy of the weights")
    seeds: tuple[int, ...] = option((0,), "first image seed of each repetition")
    num_replicates: int = option(1000, "bootstrap replicates for intervals; 0 for none")
    lossless_delta: tuple[str, ...] = option(
        (),
        "margins of the lossless test, such as psnr=0.3 frechet=0.02, fixed before anything is "
        "measured; of other axes the deviation between seeds",
    )
    max_seconds: float | None = option(None, "begin no measurement after so long; --resume goes on")
    latency_only: bool = option(False, "only measure N, at latency_batch_sizes; no sampling")
    arch: tuple[str, ...] = option(
        (),
        "only measure N and FLOPs of these published architectures with random weights "
        f"({', '.join(ARCHITECTURES)}); fewer layers on a CPU",
    )
    flops_only: bool = option(
        False, "with --arch: count FLOPs of the full-size models and time nothing"
    )
    dtype: Dtype = option("float32", "of the networks; the two shorter ones take half the memory")
    mixed_precision: MixedPrecision = option("no", "autocast of networks in float32")
    device: str = option("auto", "cpu, cuda or another torch device; auto takes a GPU")

    def __post_init__(self) -> None:
        """Check the ranges, and read prompts that are in a file."""
        object.__setattr__(self, "prompts", read_prompts(self.prompts))
        check_settings(self)

    def resolved(self) -> "BenchmarkConfig":
        """Fill in what depends on the device and on --quick.

        Raises:
            ValueError: If there is nothing to measure then, or solvers are named in vain.
        """
        # Prompts are read by now; a file's only one may look like a file's name itself.
        made = dataclasses.replace(self, prompts=(), **left_out(self))
        object.__setattr__(made, "prompts", self.prompts)
        check_methods(made, given(self, ("planned_solvers", "control_solvers")))
        return made

    def tasks(self) -> list[tuple[Method, int]]:
        """List every method with every budget it is measured at, what matters most first."""
        return list_tasks(self)

    def identity(self) -> dict[str, object]:
        """Return the settings that a cell depends on, as JSON; a resumed run may only add cells."""
        names = (
            "pipeline", "dot", "independent_dot", "num_images", "batch_size", "speed_ratio",
            "num_reference_images", "merge_lora", "mixed_precision", "device", "compile",
            "cuda_graphs", "prompts", "class_names", "prompt_embeds", "dtype",
            # No cell depends on the margins, but they are to be chosen before there is one.
            "lossless_delta",
        )  # fmt: skip
        settings = as_json(self)
        return {name: settings[name] for name in names}
