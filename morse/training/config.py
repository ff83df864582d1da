"""Settings of train_dot."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from morse.dot.conv_settings import Conv
from morse.dot.guidance import DotGuidance
from morse.dot.resampling import Resample
from morse.settings import REQUIRED, Dtype, option
from morse.spaces import BaseSpace
from morse.training.common import TrainingConfig
from morse.training.distillation_terms import DistillName
from morse.training.dot_checks import check_dot_settings
from morse.training.pairs import LossWeighting
from morse.training.pruning import PruneMethod
from morse.training.windows import TimestepSampling


@dataclass(frozen=True, kw_only=True)
class TrainDotConfig(TrainingConfig):
    """Train a Dot for a pretrained diffusion pipeline and save it as a MorseDot."""

    pretrained_model_name_or_path: str = option(
        REQUIRED, "folder or hub id of the pipeline whose denoiser is the Dash"
    )
    dtype: Dtype = option(
        "float32",
        "precision of the frozen networks, but for the autoencoder; half takes half the memory "
        "and evaluates faster on a GPU; with mixed_precision fp16 or bf16 alike",
    )
    resolution: int | None = option(
        None, "height and width of images; what the denoiser is made for if not given"
    )
    caption_column: str | None = option(
        None, "captions: a hub dataset's column, or a name in the nearest metadata.jsonl"
    )
    class_names: tuple[str, ...] | None = option(
        None, "captions for labelled images: a text for each class"
    )
    guidance_scale: tuple[float, ...] | None = option(
        None,
        "LOW HIGH: scales are drawn uniformly between them; 1 1 for no guidance; 2 10, as in the "
        "paper, if not given and the pipeline has a negative prompt or class",
    )
    guidance: DotGuidance = option(
        "branches",
        "what Dot corrects under guidance: both branches as in the paper, or the guided estimate "
        "in one pass at half the cost",
    )
    even_guidance: bool = option(
        True,
        "keep high scales from dominating the loss: by 1 / ((1 - w)^2 + w^2); the paper's loss is "
        "unweighted: --no-even_guidance",
    )
    base_space: BaseSpace | None = option(
        None,
        "what of Dash's latest estimate Dot corrects; if not given it is trained on raw outputs "
        "and the scheduler decides when sampling",
    )
    num_down_blocks: Literal[1, 2, 3] = option(2, "m: Dash's layers see 4^m times fewer positions")
    progressive_steps: int = option(
        0,
        "before the max_train_steps, train a Dot with a down block fewer for so many updates, in "
        "output_dir/first_stage, and grow it",
    )
    block_out_channels: tuple[int, ...] | None = option(
        None, "channels of the m extra blocks; 16 32 64 if not given"
    )
    layers_per_block: int = option(1, "ResNet blocks in an extra block")
    lora_rank: int = option(16, "rank of the LoRA on Dash's layers")
    lora_alpha: float | None = option(
        None, "scale times rank of the LoRA; if not given init_from's, or the rank"
    )
    conv: Conv = option("conv", "convolutions of the extra blocks: plain ones or dynamic ones")
    conv_options: tuple[str, ...] | None = option(
        None,
        "settings of dynamic ones, NAME=VALUE ...: condition=features|time; odconv: num_kernels; "
        "kernel_warehouse: budget, cell_ratio, sharing=shapes|all; gridconv: sample_size, "
        "paddings",
    )
    conv_annealing_steps: int | None = option(
        None,
        "updates until their final temperature; if not given a tenth of all, or none with "
        "init_from and for a grown Dot",
    )
    resample: Resample = option(
        "nearest",
        "how the extra blocks double the resolution: copy positions, or learn to interpolate them "
        "(for this size of images alone)",
    )
    independent: bool = option(False, "train the control that estimates from the sample alone")
    norm: Literal["group", "dnr"] = option(
        "group",
        "norms of the extra blocks; dnr hands states on from one Dot step to the next, and learns "
        "it from all steps of a window, of which it needs two or more",
    )
    history: Literal[0, 1] = option(
        0, "earlier estimates of Dash that Dot uses, too; 0 as in the paper"
    )
    extrapolation_cap: float = option(
        1.0,
        "with history, how far the base follows the line through both estimates; 0 to let Dot see "
        "the line and no more",
    )
    timestep_sampling: TimestepSampling = option(
        "uniform", "uniform as in Algorithm 1, or neighbours on the grids of real plans"
    )
    window_steps: int = option(1, "solver steps from the noised image on; 1 is Algorithm 1")
    pairs_per_window: int = option(1, "training pairs taken from each window in one update")
    loss_weighting: LossWeighting = option(
        "none", "none as in Algorithm 1; gap: by 1 / (t_s - t_i)"
    )
    on_policy: bool = option(
        False, "make a window's steps with Dot's own estimates; needs fresh windows"
    )
    cache_pairs: int | None = option(
        None, "evaluate Dash once, for so many windows, and train on these"
    )
    cache_dir: Path | None = option(
        None, "where the cache lies; output_dir/pairs or latents if not given"
    )
    cache_latents: bool = option(
        False, "encode all images once; for fresh windows of a latent pipeline"
    )
    cuda_graphs: bool = option(
        False, "replay Dot's kernels as CUDA graphs; for one process on one GPU"
    )
    distill: tuple[DistillName, ...] = option(
        (),
        "learn Dash's features too, for one more evaluation of Dash a pair: norm, af_dcd, "
        "scale_kd; the other names are their controls",
    )
    distill_weight: tuple[float, ...] = option(
        (0.1,),
        "factor of all such losses, or one for each, in errors of Dot's output: so much smaller "
        "are these than those of features",
    )
    init_from: Path | None = option(
        None,
        "a saved Dot of these settings to start from; lora_alpha, base_space, block_out_channels "
        "and conv_options are its own if not given; also one without history or of branches; one "
        "with a down block fewer grows: what it has is frozen, but for the LoRA",
    )
    prune: float | None = option(
        None, "share of each of Dot's own weight matrices to prune while training"
    )
    prune_method: PruneMethod = option(
        "surgery", "prune and splice as weights move, or once by magnitude: a control"
    )
    prune_start: int | None = option(
        None, "updates before pruning; a third of max_train_steps if not given, with init_from none"
    )
    prune_stop: int | None = option(
        None,
        "update from which the masks of surgery stay; after seven tenths of those from "
        "prune_start on if not given",
    )
    prune_gamma: float = option(
        1e-3,
        "in surgery's iteration i a layer's masks move with probability (1 + gamma * i) ** -power",
    )
    prune_power: float = option(1.0, "power in that probability")
    validation_steps: int = option(1000, "updates between two validations; 0 for none")
    fit_gate: bool = option(
        False,
        "at the end fit factors in [0, 1] on the residual by gap and timestep, on held-out "
        "images; with init_from and max_train_steps 0 for a Dot that there is",
    )
    validation_images: int = option(256, "held-out images (the test split) to validate on")

    @property
    def least_train_steps(self) -> int:
        """Least number of updates: 0 where a gate is fitted to a Dot that there is."""
        return 0 if self.fit_gate and self.init_from is not None else 1

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        super().__post_init__()
        check_dot_settings(self)
