"""Finished runs and timings on disk, so that a stopped ablation goes on where it was."""

import json
from pathlib import Path

from morse.files import write_json
from morse.folder_settings import open_run

Facts = dict[str, object]


class AblationStore:
    """A folder with one JSON file a run (row and seed) and one a row's latency.

    Args:
        folder: Made if missing.
        settings: What runs depend on; saved, and compared when resuming.
        resume: Whether the folder may hold an ablation already.

    Raises:
        FileExistsError: If it holds one and `resume` is off.
        ValueError: If that one had other settings.
    """

    def __init__(self, folder: Path, settings: Facts, resume: bool) -> None:
        """Open or begin."""
        self.folder = folder
        open_run(folder, settings, resume)
        (folder / "logs").mkdir(exist_ok=True)

    def cell(self, name: str, seed: int, overrides: Facts) -> Facts | None:
        """Return a finished run; None if it is not.

        Raises:
            ValueError: If it was made with other overrides.
        """
        cell = self.any_cell(name, seed)
        if cell is not None and cell["overrides"] != json.loads(json.dumps(overrides)):
            raise ValueError(
                f"row {name!r} sets {overrides}, but {self._cell(name, seed)} was trained with "
                f"{cell['overrides']}; delete that file to train it again"
            )
        return cell

    def any_cell(self, name: str, seed: int) -> Facts | None:
        """Return a finished run, whatever its overrides; None if it is not."""
        return _read(self._cell(name, seed))

    def first_cell(self, name: str) -> Facts | None:
        """Return a row's run of seed 0; None if it is not finished."""
        return self.any_cell(name, 0)

    def add_cell(self, cell: Facts) -> None:
        """Save a finished run, and forget a latency that was measured on an older one."""
        self._latency(cell["row"]).unlink(missing_ok=True)
        write_json(self._cell(cell["row"], cell["seed"]), cell)

    def latency(self, name: str) -> Facts | None:
        """Return what was measured of a row's first Dot; None if it was not."""
        return _read(self._latency(name))

    def add_latency(self, name: str, latency: Facts) -> None:
        """Save what was measured of a row's first Dot."""
        write_json(self._latency(name), latency)

    def _cell(self, name: str, seed: int) -> Path:
        return self.folder / "cells" / f"{name}-seed{seed}.json"

    def _latency(self, name: str) -> Path:
        return self.folder / "latency" / f"{name}.json"


def _read(file: Path) -> Facts | None:
    return json.loads(file.read_text("utf-8")) if file.exists() else None
