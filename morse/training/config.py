"""Settings of train_dot."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from morse.dot.conv_settings import Conv, conv_settings
from morse.dot.resampling import Resample
from morse.history import check_history
from morse.spaces import BaseSpace
from morse.training.common import TrainingConfig, require
from morse.training.convolutions import annealing_steps, parse_conv_options
from morse.training.distillation_terms import DistillName, check_distill
from morse.training.pairs import LossWeighting
from morse.training.pruning import PruneMethod, check_prune_settings
from morse.training.windows import TimestepSampling


@dataclass(frozen=True, kw_only=True)
class TrainDotConfig(TrainingConfig):
    """Train a Dot for a pretrained diffusion pipeline and save it as a MorseDot."""

    pretrained_model_name_or_path: str = field(
        metadata={"help": "folder or hub id of the pipeline whose denoiser is the Dash"}
    )
    resolution: int | None = field(
        default=None,
        metadata={"help": "height and width of images; what the denoiser is made for if not given"},
    )
    caption_column: str | None = field(
        default=None,
        metadata={"help": "captions: a hub dataset's column, or a name in metadata.jsonl"},
    )
    class_names: tuple[str, ...] | None = field(
        default=None, metadata={"help": "captions for labelled images: a text for each class"}
    )
    guidance_scale: tuple[float, ...] | None = field(
        default=None,
        metadata={
            "help": "LOW HIGH: scales are drawn uniformly between them; 1 1 for no guidance; "
            "2 10, as in the paper, if not given and the pipeline has a negative prompt or class"
        },
    )
    even_guidance: bool = field(
        default=True,
        metadata={"help": "keep high scales from dominating the loss: by 1 / ((1 - w)^2 + w^2)"},
    )
    base_space: BaseSpace | None = field(
        default=None,
        metadata={
            "help": "what of Dash's latest estimate Dot corrects; if not given it is trained on "
            "raw outputs and the scheduler decides when sampling"
        },
    )
    num_down_blocks: Literal[1, 2, 3] = field(
        default=2, metadata={"help": "m: Dash's layers see 4^m times fewer positions"}
    )
    progressive_steps: int = field(
        default=0,
        metadata={
            "help": "before the max_train_steps, train a Dot with a down block fewer for so many "
            "updates, in output_dir/first_stage, and grow it"
        },
    )
    block_out_channels: tuple[int, ...] | None = field(
        default=None, metadata={"help": "channels of the m extra blocks; 16 32 64 if not given"}
    )
    layers_per_block: int = field(default=1, metadata={"help": "ResNet blocks in an extra block"})
    lora_rank: int = field(default=16, metadata={"help": "rank of the LoRA on Dash's layers"})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "scale of the LoRA times its rank; the rank if not given"}
    )
    conv: Conv = field(
        default="conv",
        metadata={"help": "convolutions of the extra blocks: plain ones or dynamic ones"},
    )
    conv_options: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "settings of dynamic ones, NAME=VALUE ...: condition=features|time; odconv: "
            "num_kernels; kernel_warehouse: budget, cell_ratio, sharing=shapes|all; gridconv: "
            "sample_size, paddings"
        },
    )
    conv_annealing_steps: int | None = field(
        default=None,
        metadata={"help": "updates until their final temperature; a tenth of all if not given"},
    )
    resample: Resample = field(
        default="nearest",
        metadata={
            "help": "how the extra blocks double the resolution: copy positions, or learn to "
            "interpolate them (for this size of images alone)"
        },
    )
    independent: bool = field(
        default=False, metadata={"help": "train the control that estimates from the sample alone"}
    )
    norm: Literal["group", "dnr"] = field(
        default="group",
        metadata={
            "help": "norms of the extra blocks; dnr hands states on from one Dot step to the next, "
            "and learns it from all steps of a window, of which it needs two or more"
        },
    )
    history: Literal[0, 1] = field(
        default=0,
        metadata={
            "help": "earlier estimates of Dash that Dot uses besides the latest; 0 is the paper"
        },
    )
    extrapolation_cap: float = field(
        default=1.0,
        metadata={
            "help": "with history, how far the base follows the line through both estimates; "
            "0 to let Dot see the line and no more"
        },
    )
    timestep_sampling: TimestepSampling = field(
        default="uniform",
        metadata={"help": "uniform as in Algorithm 1, or neighbours on the grids of real plans"},
    )
    window_steps: int = field(
        default=1,
        metadata={"help": "solver steps from the noised image on; 1 is Algorithm 1"},
    )
    pairs_per_window: int = field(
        default=1, metadata={"help": "training pairs taken from each window in one update"}
    )
    loss_weighting: LossWeighting = field(
        default="none",
        metadata={"help": "none as in Algorithm 1; gap: by 1 / (t_s - t_i)"},
    )
    on_policy: bool = field(
        default=False,
        metadata={"help": "make a window's steps with Dot's own estimates; needs fresh windows"},
    )
    cache_pairs: int | None = field(
        default=None,
        metadata={"help": "evaluate Dash once, for so many windows, and train on these"},
    )
    cache_dir: Path | None = field(
        default=None, metadata={"help": "where the cache lies; output_dir/pairs if not given"}
    )
    cache_latents: bool = field(
        default=False,
        metadata={"help": "encode all images once; for fresh windows of a latent pipeline"},
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={"help": "replay Dot's kernels as CUDA graphs; for one process on one GPU"},
    )
    distill: tuple[DistillName, ...] = field(
        default=(),
        metadata={
            "help": "learn Dash's features too, for one more evaluation of Dash a pair: norm, "
            "af_dcd, scale_kd; the other names are their controls"
        },
    )
    distill_weight: tuple[float, ...] = field(
        default=(0.1,),
        metadata={
            "help": "factor of all such losses, or one for each, in errors of Dot's output: so "
            "much smaller are these than those of features"
        },
    )
    init_from: Path | None = field(
        default=None,
        metadata={
            "help": "a saved Dot whose weights to start from, with or without history; one with a "
            "down block fewer grows: what it has is frozen, but for the LoRA"
        },
    )
    prune: float | None = field(
        default=None,
        metadata={"help": "share of each of Dot's own weight matrices to prune while training"},
    )
    prune_method: PruneMethod = field(
        default="surgery",
        metadata={"help": "prune and splice as weights move, or once by magnitude: a control"},
    )
    prune_start: int | None = field(
        default=None,
        metadata={
            "help": "updates before pruning; a third of max_train_steps if not given, with "
            "init_from none"
        },
    )
    prune_stop: int | None = field(
        default=None,
        metadata={
            "help": "update from which the masks of surgery stay; after seven tenths of those "
            "from prune_start on if not given"
        },
    )
    prune_gamma: float = field(
        default=1e-3,
        metadata={
            "help": "in surgery's iteration i a layer's masks move with probability "
            "(1 + gamma * i) ** -power"
        },
    )
    prune_power: float = field(default=1.0, metadata={"help": "power in that probability"})
    validation_steps: int = field(
        default=1000, metadata={"help": "updates between two validations; 0 for none"}
    )
    fit_gate: bool = field(
        default=False,
        metadata={
            "help": "at the end fit factors in [0, 1] on the residual by gap and timestep, on "
            "held-out images; with init_from and max_train_steps 0 for a Dot that there is"
        },
    )
    validation_images: int = field(
        default=256, metadata={"help": "held-out images (the test split) to validate on"}
    )

    @property
    def least_train_steps(self) -> int:
        """Least number of updates: 0 where a gate is fitted to a Dot that there is."""
        return 0 if self.fit_gate and self.init_from is not None else 1

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        super().__post_init__()
        for name in ("window_steps", "pairs_per_window", "layers_per_block", "validation_images"):
            require(getattr(self, name) > 0, name, getattr(self, name), "at least 1")
        require(self.validation_steps >= 0, "validation_steps", self.validation_steps, "0 or more")
        require(
            self.cache_pairs is None or self.cache_pairs > 0,
            "cache_pairs",
            self.cache_pairs,
            "at least 1",
        )
        check_prune_settings(self)
        self._check_progressive()
        self._check_gate()
        self._check_conditions()
        self._check_relay()
        self._check_distillation()
        check_history(self.history, self.extrapolation_cap, self.independent)
        if self.history and (self.on_policy or self.window_steps < 2):
            raise ValueError(
                f"history is {self.history}, which needs windows of 2 steps or more made by Dash, "
                f"but window_steps is {self.window_steps} and on_policy is {self.on_policy}; with "
                "5 steps the segments of most plans fit in"
            )
        self._check_convolutions()
        if self.cuda_graphs and (self.compile or self.on_policy):
            raise ValueError("cuda_graphs is True and so is compile or on_policy; choose one")
        if self.on_policy and (self.cache_pairs or self.window_steps == 1):
            raise ValueError(
                f"on_policy needs fresh windows of several steps, but cache_pairs is "
                f"{self.cache_pairs} and window_steps is {self.window_steps}"
            )
        if self.cache_latents and self.cache_pairs:
            raise ValueError(
                "cache_latents is True and cache_pairs is given, which holds latents already; "
                "choose one"
            )

    def _check_relay(self) -> None:
        if self.norm != "dnr":
            return
        if self.window_steps == 1:
            raise ValueError(
                "norm is 'dnr' and window_steps is 1, but a relay from one Dot step to the next is "
                "learnt from windows of several: give --window_steps 2 or more, such as 3."
            )
        if self.pairs_per_window > 1:
            raise ValueError(
                f"norm is 'dnr' and pairs_per_window is {self.pairs_per_window}, but it learns "
                "from all steps of a window, in order: leave --pairs_per_window away."
            )
        for name in ("cuda_graphs", "distill", "history"):
            if getattr(self, name):
                raise ValueError(
                    f"norm is 'dnr' and {name} is {getattr(self, name)}, but {name} works on "
                    f"single pairs, not on sequences of them: leave --{name} away."
                )

    def _check_gate(self) -> None:
        if self.fit_gate and (self.independent or self.norm == "dnr"):
            raise ValueError(
                f"fit_gate is True, which needs residuals of single pairs, but independent is "
                f"{self.independent} and norm is {self.norm!r}; leave --fit_gate away"
            )

    def _check_progressive(self) -> None:
        steps = self.progressive_steps
        require(steps >= 0, "progressive_steps", steps, "0 or more")
        if steps and (self.num_down_blocks == 1 or self.prune is not None):
            raise ValueError(
                f"progressive_steps is {steps}, which needs num_down_blocks of 2 or 3 and no prune,"
                f" but they are {self.num_down_blocks} and {self.prune}"
            )

    def _check_conditions(self) -> None:
        scale = self.guidance_scale
        require(
            scale is None or (len(scale) == 2 and 1 <= scale[0] <= scale[1]),
            "guidance_scale",
            scale,
            "two numbers LOW HIGH with 1 <= LOW <= HIGH",
        )
        if self.caption_column is not None and self.class_names is not None:
            raise ValueError(
                f"caption_column is {self.caption_column!r} and class_names is "
                f"{self.class_names}; give one of the two"
            )

    def _check_distillation(self) -> None:
        if not self.distill:
            return
        check_distill(self.distill, self.distill_weight)
        if self.prune is not None:
            raise ValueError(
                f"distill is {self.distill} and prune is {self.prune}; distill first, then prune "
                "the result with init_from"
            )
        if self.compile or self.cuda_graphs:
            raise ValueError(
                f"distill is {self.distill}, whose features are read with hooks, and so can "
                "neither be compiled nor captured; leave compile and cuda_graphs away"
            )
        if self.conv != "conv":
            raise ValueError(
                f"distill is {self.distill} and conv is {self.conv!r}, which was not tried; "
                "choose one"
            )

    def _check_convolutions(self) -> None:
        steps = self.conv_annealing_steps
        require(steps is None or steps >= 0, "conv_annealing_steps", steps, "0 or more")
        settings = conv_settings(self.conv, parse_conv_options(self.conv_options))
        if settings is None and steps is not None:
            raise ValueError(
                f"conv_annealing_steps is {steps}, but conv is 'conv', a plain convolution without "
                "a temperature; choose another conv or leave it away"
            )
        if (
            self.cuda_graphs
            and self.conv in ("odconv", "kernel_warehouse")
            and annealing_steps(self)
        ):
            raise ValueError(
                f"cuda_graphs is True and conv is {self.conv!r}, whose temperature a graph would "
                "keep as it was at the first update; choose one, or set conv_annealing_steps to 0"
            )
