"""What a search for plans writes, and what it finds of earlier ones."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from morse.evaluation.bench.methods import REFERENCE_SOLVER, REFERENCE_STEPS
from morse.evaluation.environment import command_line, environment
from morse.evaluation.planning.config import PlanConfig
from morse.evaluation.planning.search import Candidate, Found
from morse.files import write_json
from morse.folder_settings import place_of
from morse.saved_plans import SavedPlan, with_options
from morse.settings import as_json

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from morse.pipeline import MorsePipeline


def check_output(config: PlanConfig) -> None:
    """Refuse to overwrite or mix what an earlier search wrote for another Dot or pipeline.

    Raises:
        FileExistsError: If `output_dir` holds a Dot with plans that this search would not go on
            from, or searches for another pipeline.
    """
    folder = config.output_dir
    goes_on = config.dot is not None and Path(config.dot).resolve() == folder.resolve()
    if (folder / "config.json").exists() and not goes_on:
        raise FileExistsError(
            f"output_dir is {folder}, which holds a Dot with its plans; go on from them with "
            f"--dot {folder}, or name another folder"
        )
    before = _read(config).get("settings", {}).get("pipeline", config.pipeline)
    # With a Dot either may be another name of one pipeline: it knows its Dash.
    if not goes_on and place_of(before) != place_of(config.pipeline):
        raise FileExistsError(
            f"output_dir is {folder}, which holds searches for pipeline {before!r}, but pipeline "
            f"is {config.pipeline!r}; name another folder, or delete {folder}"
        )


def earlier_searches(config: PlanConfig) -> list[dict[str, object]]:
    """Read what earlier searches into this folder told."""
    return _read(config).get("searches", [])


def _read(config: PlanConfig) -> dict[str, object]:
    file = config.output_dir / "plan_search.json"
    return json.loads(file.read_text()) if file.exists() else {}


def describe(
    solver: str, saved: SavedPlan, beside: Sequence[SavedPlan], found: Found
) -> dict[str, object]:
    """Give what the report says of one search, the plans that were tried best first."""

    def judged(values: dict[Candidate, float]) -> list[dict[str, object]]:
        best_first = sorted(values, key=values.__getitem__, reverse=True)
        return [
            {"plan": each.plan, "scheduler": dict(each.options), "psnr": round(values[each], 3)}
            for each in best_first
        ]

    return {
        "solver": solver,
        **saved.to_config(),
        "beside": [each.to_config() for each in beside],
        "uniform": {"plan": found.uniform.plan, "scheduler": dict(found.uniform.options)},
        "tried": judged(found.tried),
        "fits": judged(found.fitted),
    }


def save_scheduler(folder: Path, scheduler: "SchedulerMixin", found: Found) -> None:
    """Save the best steps of Dash alone that were fitted, or what the fit began with.

    They need no Morse but its scheduler. One that an earlier run has left is removed where no steps
    of Dash alone were fitted.
    """
    all_dash = [each for each in found.fitted if set(each.plan) == {"D"}]
    if all_dash:
        options = dict(max(all_dash, key=found.fitted.__getitem__).options)
        with_options(scheduler, options).save_pretrained(folder)
    elif folder.is_dir():
        shutil.rmtree(folder)


def write_found(
    config: PlanConfig,
    main: "MorsePipeline",
    plans: dict[str, list[dict[str, object]]],
    report: list[dict[str, object]],
    speed_ratio: float,
) -> None:
    """Write Dot, if there is one, with its plans and N, and the report.

    Args:
        config: The settings.
        main: The pipeline whose Dot is written.
        plans: As Dot's config has them.
        report: From `describe`, one for each search.
        speed_ratio: N that plans were searched with.
    """
    if main.dot is not None:
        # With its N, or a call with `lsd=` would first measure another, and might pass plans over.
        known = main.dot.config.speed_ratio or speed_ratio
        main.dot.register_to_config(plans=plans, speed_ratio=known)
        main.dot.save_pretrained(config.output_dir)
    facts = {
        "command": command_line(),
        "environment": environment(main.device, config.mixed_precision, config.dtype),
        "speed_ratio": speed_ratio,
        "reference": f"{REFERENCE_SOLVER}, {REFERENCE_STEPS} steps",
        "settings": as_json(config) | {"pipeline": place_of(config.pipeline)},
        "searches": report,
    }
    write_json(config.output_dir / "plan_search.json", facts)
