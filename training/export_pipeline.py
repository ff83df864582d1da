"""Save a pipeline and its Dot as one folder in half precision, as the embedded ones are."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from morse.cli import run_command
from morse.settings import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Save a pipeline and its Dot as one folder that MorsePipeline.from_pretrained opens."""

    pretrained_model_name_or_path: str = option(REQUIRED, "the pipeline")
    dot: str = option(REQUIRED, "the Dot's folder or hub id")
    output_dir: Path = option(REQUIRED, "where to save both")
    speed_ratio: float | None = option(
        None, "N that plans for lsd= are made with; measured if absent"
    )
    scheduler: str = option(
        "dpmsolver++", "what calls use unless told otherwise; see morse.schedulers.SCHEDULERS"
    )
    plan_ratio: str = option(
        '{"default": 2.0}',
        "evaluations per LSD by the scheduler's class name or default, as JSON: a number, or "
        "pairs [budget from which on, ratio]",
    )

    @property
    def plan_ratios(self) -> dict[str, object]:
        """What `plan_ratio` holds."""
        try:
            ratios = json.loads(self.plan_ratio)
        except ValueError as error:
            raise ValueError(f"plan_ratio is {self.plan_ratio!r}, no JSON ({error})") from error
        if not isinstance(ratios, dict):
            raise ValueError(f'plan_ratio is {self.plan_ratio!r}; write {{"default": 2.0}}, say')
        return ratios


def export(config: ExportConfig) -> None:
    """Load both, note the plans that suit them, and save them in float16."""
    from morse import MorsePipeline
    from morse.training.output import prepare_output_dir

    ratios = config.plan_ratios
    prepare_output_dir(config.output_dir, resume=None)
    pipe = MorsePipeline.from_pretrained(
        config.pretrained_model_name_or_path,
        dot=config.dot,
        scheduler=config.scheduler,
        dtype=torch.float16,
    )
    pipe.dot.register_to_config(speed_ratio=config.speed_ratio, plan_ratio=ratios)
    pipe.save_pretrained(config.output_dir)
    for path in config.output_dir.rglob("*.json"):  # where they were loaded from says nothing here
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)
        if "dtype" in settings:
            # A text encoder loads in what this says, diffusers' models in float32 by default.
            settings["dtype"] = "float32"
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(ExportConfig, export)
