"""What a tuning found out on its way, with which an interrupted one goes on."""

import json
from collections.abc import Mapping
from pathlib import Path

from morse.files import write_json

_FILE = "progress.json"


class Progress:
    """N and the validations of a tuning, kept in its folder.

    Attributes:
        choices: What was tuned, as JSON has it: N is its "speed_ratio"; empty in a new run.
        decibels: What validations gave: step -> name of the plan -> decibels.
    """

    def __init__(self, output_dir: Path) -> None:
        """Read what an interrupted run left in the folder, if anything."""
        self.path = output_dir / _FILE
        found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.choices: Mapping[str, object] = found.get("choices", {})
        by_step = found.get("decibels_by_step", {})
        self.decibels: dict[int, dict[str, float]] = {int(k): v for k, v in by_step.items()}

    def begin(self, choices: Mapping[str, object], step: int) -> None:
        """Go on from a step; what was found later, or of other plans, holds no more."""
        same = choices == self.choices
        self.decibels = {k: v for k, v in self.decibels.items() if same and k <= step}
        self.choices = choices
        self._write()

    def add(self, step: int, decibels: dict[str, float]) -> None:
        """Keep what a validation gave."""
        self.decibels[step] = decibels
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"choices": self.choices, "decibels_by_step": self.decibels})
