"""The output folder of a run: claimed first, and written to when all that the run needs is open."""

import dataclasses
from typing import TYPE_CHECKING

from morse.files import write_json
from morse.training.checkpoint import prepare_output_dir
from morse.training.common import RunConfig, make_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator


def claim_output(config: RunConfig) -> "Accelerator":
    """Start accelerate, and create the output folder or check that it is empty.

    Nothing is written yet, so that a command that fails at its pipeline or data can be corrected
    and run again; see `record_run`.
    """
    accelerator = make_accelerator(config)
    prepare_output_dir(config.output_dir, config.resume_from_checkpoint is not None)
    accelerator.wait_for_everyone()
    return accelerator


def record_run(config: RunConfig, accelerator: "Accelerator") -> None:
    """Save the settings in the output folder and start the trackers."""
    if not accelerator.is_main_process:
        return
    settings = {k: _plain(v) for k, v in dataclasses.asdict(config).items()}
    write_json(config.output_dir / "train_config.json", settings)
    if config.report_to != "none":
        accelerator.init_trackers("logs", {k: str(v) for k, v in settings.items()})


def begin_run(config: RunConfig) -> "Accelerator":
    """Claim the output folder and record the run in it, where nothing is opened in between."""
    accelerator = claim_output(config)
    record_run(config, accelerator)
    return accelerator


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, (int, float, str, tuple)) else str(value)
