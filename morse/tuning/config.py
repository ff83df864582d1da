"""Settings of tune_dot."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from morse.evaluation.bench.solvers import check_solvers
from morse.evaluation.prompts import PROMPTS_HELP, read_prompts
from morse.settings import require, require_least, require_positive
from morse.training.common import RunConfig, check_frozen_dtype

_LEAST = {"num_images": 1, "validation_images": 1, "target_lsd": 1, "lsd": 1, "validation_steps": 0}


@dataclass(frozen=True, kw_only=True)
class TuneDotConfig(RunConfig):
    """Tune a trained Dot on whole runs of its plans, and save it as a MorseDot."""

    pretrained_model_name_or_path: str = field(
        metadata={"help": "folder or hub id of the pipeline whose denoiser is the Dash"}
    )
    dot: str | None = field(
        default=None, metadata={"help": "a Dot's folder; the pipeline's own, if any"}
    )
    dtype: Literal["float32", "float16", "bfloat16"] = field(
        default="float32",
        metadata={
            "help": "precision of the frozen networks, but for the autoencoder, and of runs; half "
            "takes half the memory; with mixed_precision fp16 or bf16 alike"
        },
    )
    solver: tuple[str, ...] = field(
        default=("leapfrog",),
        metadata={
            "help": "names of solvers, as for `morse bench`; targets are made with the first",
            "alias": "solvers",
        },
    )
    lsd: tuple[float, ...] = field(
        default=(5.0, 6.0, 8.0, 10.0),
        metadata={
            "help": "budgets; what `lsd=` runs for each, with each solver, is a plan to tune for; "
            "others may become worse"
        },
    )
    target_lsd: float = field(
        default=20.0, metadata={"help": "budget, all Dash, of the runs to come near to"}
    )
    speed_ratio: float | None = field(
        default=None,
        metadata={
            "help": "N, Dash's time over Dot's, by which budgets become plans; saved with Dot; its "
            "config's, or measured, if left out"
        },
    )
    seed: int = field(
        default=9_000_000,
        metadata={
            "help": "seed of order, and of the first noise; keep those of `morse bench` and `eval "
            "fid` off, which begin at 0"
        },
    )
    num_images: int = field(default=4096, metadata={"help": "noises to train on"})
    validation_images: int = field(default=64, metadata={"help": "further noises to validate on"})
    validation_steps: int = field(
        default=100, metadata={"help": "updates between two validations; 0 for the ends only"}
    )
    cache_dir: Path | None = field(
        default=None,
        metadata={"help": "where the runs to come near to are kept; OUTPUT_DIR/targets if not set"},
    )
    feature_networks: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "networks in whose features runs are compared too: folders of `morse "
            "train-features`, or module.path:Name; others than you evaluate with; latents are "
            "decoded for them"
        },
    )
    blend: float = field(
        default=1.0,
        metadata={
            "help": "share of each weight's change that is saved; 0.5 gives the middle between "
            "before and after"
        },
    )
    blend_from: str | None = field(
        default=None,
        metadata={
            "help": "folder of the Dot that the change is counted from, after several runs in a "
            "row; the one that this run begins with if left out"
        },
    )
    prompts: tuple[str, ...] = field(default=(), metadata={"help": PROMPTS_HELP})
    prompt_embeds: Path | None = field(
        default=None,
        metadata={"help": "safetensors file, for a text pipeline without a text encoder"},
    )
    class_names: tuple[str, ...] = field(default=(), metadata={"help": "for labels, or as prompts"})
    guidance_scale: tuple[float, ...] = field(
        default=(),
        metadata={
            "help": "one or more, each with each plan, and with targets of its own; the pipeline's "
            "own default if left out"
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "compute Dash's activations twice rather than keep those of a whole run; a "
            "large Dash needs it, with mixed_precision and without dtype all the more: each "
            "evaluation's casts of its weights are kept till the backward pass, half a Dash each"
        },
    )
    # Far fewer and dearer updates than those of train_dot, from a network that is trained.
    train_batch_size: int = field(
        default=16, metadata={"help": "runs per process in one forward pass"}
    )
    max_train_steps: int = field(default=1000, metadata={"help": "optimizer updates in all"})
    learning_rate: float = field(default=5e-5, metadata={"help": "highest learning rate"})
    lr_warmup_steps: int = field(
        default=20, metadata={"help": "updates over which the rate rises from zero"}
    )
    adam_beta2: float = field(default=0.99, metadata={"help": "AdamW's beta2"})
    ema_max_decay: float = field(default=0.98, metadata={"help": "highest decay of that average"})
    checkpointing_steps: int = field(default=50, metadata={"help": "updates between checkpoints"})
    logging_steps: int = field(default=10, metadata={"help": "updates between two logged losses"})

    def __post_init__(self) -> None:
        """Check the ranges, and read prompts that are in a file."""
        object.__setattr__(self, "prompts", read_prompts(self.prompts))
        super().__post_init__()
        check_frozen_dtype(self.dtype, self.mixed_precision)
        check_solvers(self.solver)
        require_least(self, _LEAST)
        require(bool(self.lsd), "lsd", self.lsd, "1 or more each")
        require_positive(self, ("speed_ratio",))
        for name in ("solver", "lsd", "guidance_scale"):
            given = getattr(self, name)
            require(len(set(given)) == len(given), name, given, "without repetition")
        require(0 < self.blend <= 1, "blend", self.blend, "in (0, 1]")
        counted = self.blend < 1 or self.blend_from is None
        require(counted, "blend_from", self.blend_from, "left out where --blend is 1")
        require(not self.compile, "compile", self.compile, "False: whole runs are not compiled")
