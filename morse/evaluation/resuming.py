"""Folders of finished work that a stopped run goes on with, if its settings are the same."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from morse.files import write_json

SETTINGS_FILE = "settings.json"


def open_folder(
    folder: Path,
    settings: Mapping[str, object],
    resume: bool,
    may_lack: bool = False,
    absent: Mapping[str, object] | None = None,
) -> None:
    """Note a run's settings in its folder, or check that it goes on with the same.

    Args:
        folder: Made if missing.
        settings: What finished measurements depend on.
        resume: Whether the folder may hold some already.
        may_lack: Whether settings may be new, of which an earlier version noted nothing.
        absent: What new settings count as where they were not noted; others may be anything then.

    Raises:
        FileExistsError: If the folder holds a run and `resume` is off.
        ValueError: If that run had other settings, or the file with them is damaged.
    """
    if (folder / SETTINGS_FILE).exists():
        if not resume:
            raise FileExistsError(
                f"output_dir {folder} holds a run already; go on with it by --resume, or name "
                "another folder"
            )
        before = {**(absent or {}), **_read_settings(folder)}
        for name, value in settings.items():
            if value != before.get(name) and not (may_lack and name not in before):
                raise ValueError(
                    f"{name} is {value!r}, but the run in {folder} has {before.get(name)!r}; "
                    "repeat its settings or name another output_dir"
                )
    write_json(folder / SETTINGS_FILE, settings)


def check_images(folder: Path, settings: Mapping[str, object]) -> None:
    """Check that a folder is free, or holds images made with just these settings.

    Raises:
        ValueError: If it holds anything else, or the file with its settings is damaged.
    """
    if not (folder / SETTINGS_FILE).exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty and has no {SETTINGS_FILE}, so nobody knows what made its "
                "files; give another --output_dir"
            )
        return
    found = _read_settings(folder)
    if told := "; ".join(_differences(found, settings)):
        raise ValueError(
            f"{folder} holds images of other settings ({told}); give another --output_dir, or "
            "delete that folder"
        )


def _read_settings(folder: Path) -> dict[str, object]:
    file = folder / SETTINGS_FILE
    try:
        return dict(json.loads(file.read_text("utf-8")).items())
    except (ValueError, AttributeError) as error:  # no JSON, or another kind of it
        raise ValueError(f"{file} is damaged ({error}); delete {folder}") from error


def _differences(
    found: Mapping[str, object], settings: Mapping[str, object], within: str = ""
) -> Iterator[str]:
    """Name each setting that differs, and those within settings that have several of their own."""
    for key in sorted({*settings, *found}):
        was, now = found.get(key), settings.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{within}{key}.")
        elif was != now:
            yield f"{within}{key} was {_short(was)} and is {_short(now)}"


def _short(value: object, most: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else text[: most - 3] + "..."
