"""What a resumed run is told of settings that differ from those of its checkpoint."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from morse.folder_settings import with_places
from morse.settings import as_json
from morse.training.common import RunConfig

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

# Where a run lies, what it prints and when it ends; what a checkpoint restores, or began with; what
# is told by other names.
_WITHOUT_EFFECT = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay", "cache_dir",
    "checkpointing_steps", "checkpoints_total_limit", "dataloader_num_workers", "dot",
    "ema_max_decay", "init_from", "logging_steps", "max_train_seconds", "num_images", "output_dir",
    "prune_gamma", "prune_power", "prune_start", "prune_stop", "report_to",
    "resume_from_checkpoint", "save_images_steps", "validation_images", "validation_steps",
}  # fmt: skip


def decisive_settings(config: RunConfig) -> dict[str, object]:
    """Give the settings, as JSON has them, that decide what a step of a run in progress does."""
    return {k: v for k, v in with_places(as_json(config)).items() if k not in _WITHOUT_EFFECT}


def changed_settings(
    before: Mapping[str, object],
    now: Mapping[str, object],
    config: RunConfig,
    optimizer: Optimizer,
    ema: "EMAModel | None",
) -> Iterator[str]:
    """Say which settings are others than in the run before, and which of these have no effect.

    Args:
        before: What decides what a step does, as the checkpoint has it.
        now: The same of this run.
        config: This run's settings.
        optimizer: As restored from the checkpoint.
        ema: The same, if there is one.
    """
    before = with_places(before)
    for name, value in now.items():
        if before.get(name) != value:
            yield (
                f"{name} was {before.get(name)} and is now {value}; "
                "the result may differ from that of an uninterrupted run"
            )
    for name, value in _restored(optimizer, ema).items():
        if value != getattr(config, name):
            yield f"{name} is {getattr(config, name)}, but stays {value}, as in the checkpoint"


def _restored(optimizer: Optimizer, ema: "EMAModel | None") -> dict[str, float]:
    """Give the settings that are part of a checkpoint's states, by their names in the config."""
    group = optimizer.param_groups[0]
    restored = {
        "adam_beta1": group["betas"][0],
        "adam_beta2": group["betas"][1],
        "adam_weight_decay": group["weight_decay"],
        "adam_epsilon": group["eps"],
    }
    return restored | ({} if ema is None else {"ema_max_decay": ema.decay})
