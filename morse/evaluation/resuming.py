"""Folders of finished measurements that a stopped run goes on with."""

import json
from collections.abc import Mapping
from pathlib import Path

from morse.files import write_json


def open_folder(
    folder: Path, settings: Mapping[str, object], resume: bool, may_lack: bool = False
) -> None:
    """Note a run's settings in its folder, or check that it goes on with the same.

    Args:
        folder: Made if missing.
        settings: What finished measurements depend on.
        resume: Whether the folder may hold some already.
        may_lack: Whether settings may be new, of which an earlier version noted nothing.

    Raises:
        FileExistsError: If the folder holds a run and `resume` is off.
        ValueError: If that run had other settings.
    """
    saved = folder / "settings.json"
    if saved.exists():
        if not resume:
            raise FileExistsError(
                f"output_dir {folder} holds a run already; go on with it by --resume, or name "
                "another folder"
            )
        before = json.loads(saved.read_text("utf-8"))
        for name, value in settings.items():
            if value != before.get(name) and not (may_lack and name not in before):
                raise ValueError(
                    f"{name} is {value!r}, but the run in {folder} has {before.get(name)!r}; "
                    "repeat its settings or name another output_dir"
                )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(saved, settings)
