"""Settings beside the files that were made with them: which folders may be gone on with.

The rule is one for all: every setting must be equal, and none missing or new. Folders and files are
noted by their path from the root, for the run may go on from another folder. What is noted is all
that the files depend on, and each kind of folder has one place that lists it:

- `morse bench`: `BenchmarkConfig.identity`, to which `measure_benchmark` adds what it has loaded
- `morse ablate`: `AblationConfig.identity`
- images of `morse eval fid`: `_settings` in `evaluation.fid.generation`; there may be more of them
  than before, and made by another number of CPU threads (`evaluation.fid.folders`)
- caches: `_describe` in `training.cache` and `tuning.targets`, `cache_latents`

A training goes on from its checkpoint whatever its settings, but warns (`training.resuming`).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from morse.files import write_json

SETTINGS_FILE = "settings.json"
_PLACES = {
    "data", "dot", "independent_dot", "pipeline", "pretrained_model_name_or_path", "prompt_embeds",
    "train_data_dir", "vae",
}  # fmt: skip


def place_of(name: object) -> object:
    """Give a folder's or file's path from the root; names of the hub, and None, as they are."""
    return str(Path(name).resolve()) if isinstance(name, str) and Path(name).exists() else name


def with_places(settings: Mapping[str, object]) -> dict[str, object]:
    """Give settings, as JSON has them, with `place_of` those that name a folder or file."""
    return {k: place_of(value) if k in _PLACES else value for k, value in settings.items()}


def open_run(folder: Path, settings: Mapping[str, object], resume: bool) -> None:
    """Begin a run in a folder, which is made if missing, or go on with the one that it holds.

    Raises:
        FileExistsError: If the folder holds a run and `resume` is off.
        ValueError: If that run had other settings, or the file with them is damaged.
    """
    file = folder / SETTINGS_FILE
    if file.exists() and not resume:
        raise FileExistsError(
            f"output_dir {folder} holds a run already; go on with it by --resume, or name "
            "another folder"
        )
    claim_folder(file, settings, "go on with those, or give another --output_dir")


def claim_folder(file: Path, settings: Mapping[str, object], way_out: str) -> None:
    """Note what a folder's files are made with, or `check_settings` if that was done."""
    if file.exists():
        check_settings(file, settings, way_out)
    else:
        write_json(file, with_places(settings))


def check_settings(file: Path, settings: Mapping[str, object], way_out: str) -> None:
    """Check that a folder's files were made with just these settings.

    Args:
        file: Where the folder's settings are noted.
        settings: As JSON has them.
        way_out: What to do if they differ; ends the error.

    Raises:
        ValueError: If a setting is another, missing or new, or the file is damaged.
    """
    noted, settings = with_places(read_settings(file)), with_places(settings)
    if told := "; ".join(_differences(noted, settings)):
        raise ValueError(f"{file.parent} holds files of other settings ({told}); {way_out}")


def read_settings(file: Path) -> dict[str, object]:
    """Return the settings that are noted in a file.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        return dict(json.loads(file.read_text("utf-8")).items())
    except (ValueError, AttributeError) as error:  # no JSON, or another kind of it
        raise ValueError(f"{file} is damaged ({error}); delete {file.parent}") from error


def _differences(
    noted: Mapping[str, object], settings: Mapping[str, object], within: str = ""
) -> Iterator[str]:
    """Name each setting that differs, and those within settings that have several of their own."""
    for key in sorted({*settings, *noted}):
        was, now = noted.get(key), settings.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{within}{key}.")
        elif was != now or (key in noted) != (key in settings):
            yield f"{within}{key} was {_shown(noted, key)} and is {_shown(settings, key)}"


def _shown(settings: Mapping[str, object], key: str, most: int = 60) -> str:
    text = json.dumps(settings[key]) if key in settings else "missing"
    return text if len(text) <= most else text[: most - 3] + "..."
