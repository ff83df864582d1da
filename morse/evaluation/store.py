"""Finished measurements on disk, so that a stopped benchmark goes on where it was."""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from morse.evaluation.runs import Method
from morse.evaluation.scoring import Score
from morse.training.checkpoint import write_json


@dataclass(frozen=True)
class Cell:
    """One method at one budget from one seed, measured.

    Attributes:
        method: The method.
        budget: LSD asked for.
        seed: The first image's seed.
        plan: Which evaluations were Dash's, "DooDoo"; "" for the bare pipeline.
        num_dash: Dash evaluations an image.
        num_dot: Dot evaluations an image.
        lsd: LSD spent.
        seconds: Wall time for all images.
        fallbacks: Why Dash ran in Dot's place, and how often.
        scores: One `Score` an axis.
    """

    method: Method
    budget: int
    seed: int
    plan: str
    num_dash: int
    num_dot: int
    lsd: float
    seconds: float
    fallbacks: dict[str, int]
    scores: dict[str, Score]

    @classmethod
    def from_json(cls, entry: dict[str, object]) -> "Cell":
        """Rebuild a cell from `dataclasses.asdict`'s dictionary."""
        scores = {
            axis: Score(score["value"], tuple(score["replicates"]))
            for axis, score in entry["scores"].items()
        }
        return cls(**{**entry, "method": Method(**entry["method"]), "scores": scores})


class CellStore:
    """A folder with one JSON file a cell, and what else a run must not measure twice."""

    def __init__(self, folder: Path, settings: dict[str, object], resume: bool):
        """Open or begin a run.

        Args:
            folder: Made if missing.
            settings: What finished cells depend on; saved, and compared when resuming.
            resume: Whether the folder may hold a run already.

        Raises:
            FileExistsError: If the folder holds a run and `resume` is off.
            ValueError: If that run had other settings.
        """
        self.folder = folder
        saved = folder / "settings.json"
        if saved.exists():
            if not resume:
                raise FileExistsError(
                    f"output_dir {folder} holds a benchmark already; go on with it by --resume, or "
                    "name another folder"
                )
            before = json.loads(saved.read_text())
            changed = [name for name in settings if settings[name] != before.get(name)]
            if changed:
                name = changed[0]
                raise ValueError(
                    f"{name} is {settings[name]!r}, but the run in {folder} has "
                    f"{before.get(name)!r}; repeat its settings or name another output_dir"
                )
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        write_json(saved, settings)

    def has(self, method: Method, budget: int, seed: int) -> bool:
        """Tell whether this cell is measured."""
        return self._file(method, budget, seed).exists()

    def add(self, cell: Cell) -> None:
        """Save a cell; it appears whole or not at all."""
        write_json(self._file(cell.method, cell.budget, cell.seed), dataclasses.asdict(cell))

    def get(self, method: Method, budget: int, seed: int) -> Cell:
        """Load a cell."""
        return Cell.from_json(json.loads(self._file(method, budget, seed).read_text()))

    def once(self, name: str, measure: Callable[[], object]) -> object:
        """Return what `measure` returned when first asked for under this name (JSON types)."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            write_json(file, measure())
        return json.loads(file.read_text())

    def images(self, name: str, sample: Callable[[], Tensor]) -> Tensor:
        """Return the images that `sample` returned when first asked for under this name."""
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            partial = file.with_suffix(".partial")
            save_file({"images": sample().contiguous()}, partial)
            os.replace(partial, file)
        return load_file(file)["images"]

    def _file(self, method: Method, budget: int, seed: int) -> Path:
        solver = method.solver.replace("+", "p")
        name = f"{method.kind}-{solver}-r{method.ratio:g}-lsd{budget}-seed{seed}.json"
        return self.folder / "cells" / name
