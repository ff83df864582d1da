"""Finished measurements on disk, so that a stopped benchmark goes on where it was."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from morse.evaluation.bench.methods import Method
from morse.evaluation.scoring import ImageScores
from morse.files import atomic_save_file, remove_leftovers, write_json
from morse.folder_settings import open_run


@dataclass(frozen=True, eq=False)
class Cell:
    """One method at one budget from one seed, measured.

    Attributes:
        method: The method.
        budget: LSD asked for.
        seed: The first image's seed.
        plan: Which evaluations were Dash's, "DooDoo"; "" for the bare pipeline.
        num_dash: Dash evaluations an image, on average.
        num_dot: Dot evaluations an image, on average.
        lsd: LSD spent.
        seconds: Wall time for all images.
        batch_seconds: Quartiles of the full batches' wall times; None for fewer than two batches.
        scheduler_options: Options that the plan's steps were laid with, fitted ones in full.
        fallbacks: Why Dash ran in Dot's place, and how often.
        scores: What the images are like, one by one.
        engaged: Whether the method did anything that the bare pipeline does not.
        note: What a reader of its figures should know; "" for nothing.
        peak_memory_mib: Most memory that the device held while sampling; None if not measured.
    """

    method: Method
    budget: int
    seed: int
    plan: str
    num_dash: float
    num_dot: float
    lsd: float
    seconds: float
    fallbacks: dict[str, int]
    scores: ImageScores
    engaged: bool = True
    note: str = ""
    peak_memory_mib: float | None = None
    batch_seconds: tuple[float, float, float] | None = None
    scheduler_options: dict[str, object] = field(default_factory=dict)

    def facts(self) -> dict[str, object]:
        """Return everything but the scores, ready for JSON."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del facts["scores"]
        return {**facts, "method": dataclasses.asdict(self.method)}


class CellStore:
    """A folder with two files a cell, and what else a run must not measure twice.

    A cell's tensors are written before its JSON, and only the JSON makes it count as measured.
    """

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
        open_run(folder, settings, resume)
        remove_leftovers(folder)

    def has(self, method: Method, budget: int, seed: int) -> bool:
        """Tell whether this cell is measured."""
        return self._file(method, budget, seed).exists()

    def is_engaged(self, method: Method, budget: int, seed: int) -> bool:
        """Tell whether the method of a measured cell did anything; reads no tensors."""
        return json.loads(self._file(method, budget, seed).read_text())["engaged"]

    def add(self, cell: Cell) -> None:
        """Save a cell; it appears whole or not at all."""
        file = self._file(cell.method, cell.budget, cell.seed)
        atomic_save_file(vars(cell.scores), _tensors_of(file))
        write_json(file, cell.facts())

    def get(self, method: Method, budget: int, seed: int) -> Cell:
        """Load a cell.

        Raises:
            FileNotFoundError: If it is not measured.
            ValueError: If its tensors are missing or damaged.
        """
        file = self._file(method, budget, seed)
        facts = json.loads(file.read_text())
        try:
            scores = ImageScores(**load_file(_tensors_of(file)))
        except (FileNotFoundError, SafetensorError, TypeError) as error:
            raise ValueError(
                f"{_tensors_of(file)} is missing or damaged ({error}); delete {file.name} beside "
                "it and measure the cell again by --resume"
            ) from error
        return Cell(**{**facts, "method": Method(**facts["method"]), "scores": scores})

    def once(self, name: str, measure: Callable[[], object]) -> object:
        """Return what `measure` returned when first asked for under this name (JSON types)."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            write_json(file, measure())
        return json.loads(file.read_text())

    def knows(self, name: str) -> bool:
        """Tell whether `once` was asked for under this name."""
        return (self.folder / f"{name}.json").exists()

    def has_features(self, name: str) -> bool:
        """Tell whether `features` was asked for under this name."""
        return (self.folder / f"{name}-features.safetensors").exists()

    def images(self, name: str, sample: Callable[[], Tensor]) -> Tensor:
        """Return the images that `sample` returned when first asked for under this name."""
        return self._tensor(name, "images", sample)

    def features(self, name: str, extract: Callable[[], Tensor]) -> Tensor:
        """Return the features that `extract` returned when first asked for under this name."""
        return self._tensor(name, "features", extract)

    def _tensor(self, name: str, kind: str, make: Callable[[], Tensor]) -> Tensor:
        file = self.folder / f"{name}-{kind}.safetensors"
        if not file.exists():
            atomic_save_file({kind: make()}, file)
        return load_file(file)[kind]

    def _file(self, method: Method, budget: int, seed: int) -> Path:
        settings = (quote(str(value), safe="") for value in dataclasses.astuple(method))
        name = "-".join(part for part in settings if part)
        return self.folder / "cells" / f"{name}-lsd{budget}-seed{seed}.json"


def _tensors_of(file: Path) -> Path:
    return file.with_suffix(".safetensors")


def reference_name(seed: int) -> str:
    """Return the name that the reference of a repetition has in the store."""
    return f"reference-seed{seed}"
