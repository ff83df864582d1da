"""The output folder of a run: claimed first, and written to when all that the run needs is open."""

from pathlib import Path
from typing import TYPE_CHECKING

from morse.files import remove_leftovers, replacing, write_json
from morse.settings import as_json
from morse.training.checkpoint import find_checkpoint
from morse.training.common import RunConfig, make_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image


def prepare_output_dir(output_dir: Path, resume: bool | None) -> None:
    """Create `output_dir`, and refuse to write into another run's results.

    Args:
        output_dir: The folder.
        resume: Whether the run in it goes on; None for a command that cannot do that.

    Raises:
        FileExistsError: The folder isn't empty and `resume` isn't True.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if not resume and any(output_dir.iterdir()):
        way = "" if resume is None else "continue its run with --resume_from_checkpoint latest or "
        raise FileExistsError(
            f"output_dir is {output_dir}, which is not empty; {way}give another --output_dir"
        )


def claim_output(config: RunConfig) -> "Accelerator":
    """Start accelerate, and create the output folder or check that it is empty.

    Nothing is written yet, so that a command that fails at its pipeline or data can be corrected
    and run again; see `record_run`.

    Raises:
        FileExistsError: If the folder is not empty and no run goes on, or if it has a result that
            would be overwritten.
        FileNotFoundError: If there is no checkpoint of the name that is given.
    """
    accelerator = make_accelerator(config)
    folder, wanted = config.output_dir, config.resume_from_checkpoint
    prepare_output_dir(folder, wanted is not None)
    finished = any((folder / name).exists() for name in ("config.json", "model_index.json"))
    if config.max_train_steps and finished and find_checkpoint(folder, wanted) is None:
        raise FileExistsError(
            f"output_dir is {folder}, which holds a trained network and no checkpoint to go on "
            "from, so that a run would begin anew and overwrite it; give another --output_dir"
        )
    accelerator.wait_for_everyone()
    return accelerator


def record_run(config: RunConfig, accelerator: "Accelerator") -> None:
    """Save the settings in the output folder and start the trackers.

    What a killed run was writing there is removed.
    """
    if not accelerator.is_main_process:
        return
    remove_leftovers(config.output_dir)
    settings = as_json(config)
    write_json(config.output_dir / "train_config.json", settings)
    if config.report_to != "none":
        accelerator.init_trackers("logs", {k: str(v) for k, v in settings.items()})


def save_grid(images: list["Image"], rows: int, path: Path) -> None:
    """Save pictures as one PNG, row by row, whole or not at all."""
    from diffusers.utils import make_image_grid

    with replacing(path) as temporary:
        make_image_grid(images, rows, len(images) // rows).save(temporary, "PNG")


def samples_file(config: RunConfig, step: int) -> Path:
    """Give where the samples after so many updates are drawn."""
    return config.output_dir / "samples" / f"step-{step:07d}.png"


def begin_run(config: RunConfig) -> "Accelerator":
    """Claim the output folder and record the run in it, where nothing is opened in between."""
    accelerator = claim_output(config)
    record_run(config, accelerator)
    return accelerator
