"""Settings of tune_dot."""

from dataclasses import dataclass
from pathlib import Path

from morse.evaluation.bench.solvers import check_solvers
from morse.evaluation.prompts import PROMPTS_HELP, read_prompts
from morse.settings import (
    REQUIRED,
    Dtype,
    option,
    require,
    require_least,
    require_places,
    require_positive,
)
from morse.training.common import RunConfig, check_frozen_dtype

_LEAST = {"num_images": 1, "validation_images": 1, "target_lsd": 1, "lsd": 1, "validation_steps": 0}


@dataclass(frozen=True, kw_only=True)
class TuneDotConfig(RunConfig):
    """Tune a trained Dot on whole runs of its plans, and save it as a MorseDot."""

    pretrained_model_name_or_path: str = option(
        REQUIRED, "folder or hub id of the pipeline whose denoiser is the Dash"
    )
    dot: str | None = option(None, "a Dot's folder or hub id; the pipeline's own, if any")
    dtype: Dtype = option(
        "float32",
        "precision of the frozen networks, but for the autoencoder, and of runs; half takes half "
        "the memory; with mixed_precision fp16 or bf16 alike",
    )
    solver: tuple[str, ...] = option(
        ("leapfrog",),
        "names of solvers, as for `morse bench`; targets are made with the first",
        alias="solvers",
    )
    lsd: tuple[float, ...] = option(
        (5.0, 6.0, 8.0, 10.0),
        "budgets; what `lsd=` runs for each, with each solver, is a plan to tune for; others may "
        "become worse",
    )
    target_lsd: float = option(20.0, "budget, all Dash, of the runs to come near to")
    speed_ratio: float | None = option(
        None,
        "N, Dash's time over Dot's, by which budgets become plans; saved with Dot; its config's, "
        "or measured, if left out",
    )
    seed: int = option(
        9_000_000,
        "seed of order, and of the first noise; keep those of `morse bench` and `eval fid` off, "
        "which begin at 0",
    )
    num_images: int = option(4096, "noises to train on")
    validation_images: int = option(64, "further noises to validate on")
    validation_steps: int = option(100, "updates between two validations; 0 for the ends only")
    cache_dir: Path | None = option(
        None, "where the runs to come near to are kept; OUTPUT_DIR/targets if not set"
    )
    feature_networks: tuple[str, ...] = option(
        (),
        "networks in whose features runs are compared too: folders of `morse train-features`, or "
        "module.path:Name; others than you evaluate with; latents are decoded for them",
    )
    blend: float = option(
        1.0,
        "share of each weight's change that is saved; 0.5 gives the middle between before and "
        "after",
    )
    blend_from: str | None = option(
        None,
        "folder or hub id of the Dot that the change is counted from, after several runs in a "
        "row; the one that this run begins with if left out",
    )
    prompts: tuple[str, ...] = option((), PROMPTS_HELP)
    prompt_embeds: Path | None = option(
        None, "safetensors file, for a text pipeline without a text encoder"
    )
    class_names: tuple[str, ...] = option((), "for labels, or as prompts")
    guidance_scale: tuple[float, ...] = option(
        (),
        "one or more, each with each plan, and with targets of its own; the pipeline's own "
        "default if left out",
    )
    gradient_checkpointing: bool = option(
        False,
        "compute Dash's activations twice rather than keep those of a whole run; a large Dash "
        "needs it, with mixed_precision and without dtype all the more: each evaluation's casts "
        "of its weights are kept till the backward pass, half a Dash each",
    )
    # Far fewer and dearer updates than those of train_dot, from a network that is trained.
    train_batch_size: int = option(16, "runs per process in one forward pass")
    max_train_steps: int = option(1000, "optimizer updates in all")
    learning_rate: float = option(5e-5, "highest learning rate")
    lr_warmup_steps: int = option(20, "updates over which the rate rises from zero")
    adam_beta2: float = option(0.99, "AdamW's beta2")
    ema_max_decay: float = option(0.98, "highest decay of that average")
    checkpointing_steps: int = option(50, "updates between checkpoints")
    logging_steps: int = option(10, "updates between two logged losses")

    def __post_init__(self) -> None:
        """Check the ranges, and read prompts that are in a file."""
        object.__setattr__(self, "prompts", read_prompts(self.prompts))
        super().__post_init__()
        check_frozen_dtype(self.dtype, self.mixed_precision)
        check_solvers(self.solver)
        require_least(self, _LEAST)
        require_places(self, kept=["cache_dir"])
        require(bool(self.lsd), "lsd", self.lsd, "1 or more each")
        require_positive(self, ("speed_ratio",))
        for name in ("solver", "lsd", "guidance_scale"):
            given = getattr(self, name)
            require(len(set(given)) == len(given), name, given, "without repetition")
        require(0 < self.blend <= 1, "blend", self.blend, "in (0, 1]")
        counted = self.blend < 1 or self.blend_from is None
        require(counted, "blend_from", self.blend_from, "left out where --blend is 1")
        require(not self.compile, "compile", self.compile, "False: whole runs are not compiled")
