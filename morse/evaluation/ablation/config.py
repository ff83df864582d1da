"""Settings of the ablation."""

from dataclasses import dataclass, replace
from pathlib import Path

from morse.evaluation.ablation.rows import ROWS, Row
from morse.settings import as_json, option, replace_defaults, require_least
from morse.training.config import TrainDotConfig
from morse.training.pairs import LossWeighting
from morse.training.windows import TimestepSampling

# What --quick puts in the place of settings that were not given.
QUICK: dict[str, object] = {
    "seeds": 1,
    "max_train_steps": 4,
    "lr_warmup_steps": 1,
    "train_batch_size": 4,
    "cache_windows": 16,
    "validation_images": 8,
    "latency_batch_size": 2,
    "latency_rounds": 3,
}
LEAST = {
    "seeds": 1, "workers": 1, "latency_batch_size": 1, "latency_rounds": 2, "cache_windows": 1,
}  # fmt: skip
# Settings that TrainDotConfig knows under the same name; every run of an ablation shares them.
_TRAINING = (
    "max_train_steps", "train_batch_size", "learning_rate", "lr_warmup_steps", "ema_max_decay",
    "window_steps", "pairs_per_window", "timestep_sampling", "loss_weighting", "lora_rank",
)  # fmt: skip
# Beside these, what no row may change: the windows and the order in which runs see them.
_FIXED = {
    *(name for name in _TRAINING if name not in ("lora_rank", "pairs_per_window")), "seed",
    "cache_pairs", "cache_dir", "train_data_dir", "output_dir", "mixed_precision",
    "pretrained_model_name_or_path",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Train Dots that differ in one method each, on the same windows, and compare them."""

    output_dir: Path = option(
        Path("runs/ablation"), "folder for windows, Dots and finished measurements"
    )
    report_dir: Path | None = option(
        None, "folder for ablation.json and ablation.md; output_dir if left out"
    )
    train_data_dir: Path | None = option(
        None, "folder of images or IDX files; always needed to train"
    )
    pipeline: str = option(
        "fashion-mnist", "the embedded pipeline, or a folder", alias="pretrained_model_name_or_path"
    )
    methods: tuple[str, ...] = option(
        ("all",),
        "methods or single rows, with what they are compared with; all, or of: "
        + ", ".join(dict.fromkeys(name for row in ROWS for name in (row.method, row.name))),
    )
    seeds: int = option(3, "runs of each row, of seeds 0, 1, ...")
    workers: int = option(1, "runs at a time, each a process with one thread")
    resume: bool = option(False, "go on with the runs in output_dir")
    quick: bool = option(False, "one seed, 4 updates: to see that it works")
    from_json: Path | None = option(
        None, "redraw this result's table; nothing is trained", alias="from"
    )
    max_train_steps: int = option(300, "updates of each run")
    train_batch_size: int = option(8, "windows an update")
    cache_windows: int = option(512, "windows of each seed, which Dash is evaluated for once")
    window_steps: int = option(4, "as for train_dot")
    pairs_per_window: int = option(2, "as for train_dot")
    timestep_sampling: TimestepSampling = option("plans", "as for train_dot")
    loss_weighting: LossWeighting = option("gap", "as for train_dot")
    learning_rate: float = option(2e-3, "highest learning rate")
    lr_warmup_steps: int = option(50, "as for train_dot")
    ema_max_decay: float = option(0.99, "as for train_dot")
    lora_rank: int = option(16, "of Dots whose row has no other")
    validation_images: int = option(256, "held-out images that every Dot is measured on")
    latency_batch_size: int = option(16, "samples an evaluation")
    latency_rounds: int = option(21, "timed evaluations of Dash and each Dot, in turn")

    def __post_init__(self) -> None:
        """Check the ranges, and take --quick's settings."""
        require_least(self, LEAST)
        if self.from_json is None:
            if self.train_data_dir is None:
                raise ValueError("train_data_dir is not given; name the folder of images")
            self.training(0, self.output_dir, {})  # has its own checks
        if self.quick:
            replace_defaults(self, QUICK)

    @property
    def reports(self) -> Path:
        """Where ablation.json and ablation.md go."""
        return self.report_dir or self.output_dir

    @property
    def half_the_steps(self) -> int:
        """Half of the updates."""
        return self.max_train_steps // 2

    def overrides(self, row: Row) -> dict[str, object]:
        """Return what a row sets, but for sizes that another row's training decides."""
        return {**row.overrides, **{name: getattr(self, own) for name, own in row.derived.items()}}

    def training(self, seed: int, output_dir: Path, overrides: dict[str, object]) -> TrainDotConfig:
        """Return the settings of one run.

        Raises:
            ValueError: If `overrides` has what all runs share.
        """
        shared = sorted(_FIXED & overrides.keys())
        if shared:
            raise ValueError(f"a row sets {shared}, which all rows of an ablation share")
        settings = TrainDotConfig(
            **{name: getattr(self, name) for name in _TRAINING},
            pretrained_model_name_or_path=self.pipeline,
            train_data_dir=self.train_data_dir,
            output_dir=output_dir,
            cache_pairs=self.cache_windows,
            cache_dir=self.output_dir / f"windows-seed{seed}",
            seed=seed,
            mixed_precision="no",  # whatever accelerate's is
            # The run's own validation is of no use here: every Dot is measured as it was saved.
            validation_images=1,
            validation_steps=0,
            checkpointing_steps=self.max_train_steps,
            checkpoints_total_limit=1,
        )
        settings = replace(settings, **overrides)
        # A first stage takes its updates, half of them at most, from those that all rows have.
        first = min(settings.progressive_steps, self.half_the_steps)
        return replace(
            settings, progressive_steps=first, max_train_steps=self.max_train_steps - first
        )

    def identity(self) -> dict[str, object]:
        """Return the settings that a run's result depends on, as JSON."""
        names = (*_TRAINING, "pipeline", "train_data_dir", "cache_windows", "validation_images")
        names += ("latency_batch_size", "latency_rounds")
        settings = as_json(self)
        return {name: settings[name] for name in names}
