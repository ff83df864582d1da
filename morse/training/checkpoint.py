"""Checkpoints that are either complete or absent, in safetensors and JSON only."""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from morse.files import (
    atomic_save_file,
    put_in_place,
    read_tensors,
    temporary_for,
    write_json,
)

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

    from morse.training.pruning import DotPruner

MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
EMA_FILE, STATE_FILE = "ema.safetensors", "state.json"
# How the update is computed belongs to the device at hand, not to the checkpoint.
DEVICE_OPTIONS = {"fused", "foreach", "capturable", "differentiable"}


def _find_checkpoints(output_dir: Path) -> dict[int, Path]:
    """Find complete checkpoints by step, in that order; unfinished ones bear another name."""
    found = {}
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """Find the checkpoint to resume.

    Args:
        output_dir: The run's folder.
        resume_from_checkpoint: "latest" (None is returned when there is none yet), the path of a
            checkpoint, its name inside `output_dir`, or None for a fresh start.

    Raises:
        FileNotFoundError: The named checkpoint doesn't exist.
    """
    if resume_from_checkpoint is None:
        return None
    checkpoints = list(_find_checkpoints(output_dir).values())
    if resume_from_checkpoint == "latest":
        return checkpoints[-1] if checkpoints else None
    for path in (Path(resume_from_checkpoint), output_dir / resume_from_checkpoint):
        if (path / STATE_FILE).is_file():
            return path
    raise FileNotFoundError(
        f"resume_from_checkpoint is {resume_from_checkpoint!r}, which is no checkpoint; use "
        f"latest or one of {[path.name for path in checkpoints]} in {output_dir}"
    )


def save_checkpoint(
    output_dir: Path,
    step: int,
    model_state: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    ema: "EMAModel | None",
    scaler: "torch.amp.GradScaler | None",
    extra: dict[str, object],
    total_limit: int | None,
) -> Path:
    """Write `output_dir/checkpoint-{step}` and then remove the oldest beyond `total_limit`.

    Those of later steps are removed too: they are from before the run went back to an earlier one.
    A folder is filled under a temporary name and renamed last, and renamed before it is removed, so
    that a run killed at any moment leaves only complete checkpoints.

    Args:
        output_dir: The run's folder.
        step: The number of updates done.
        model_state: The trained network's state dict.
        optimizer: The optimizer, also one prepared by accelerate.
        ema: The moving average of the weights, if there is one.
        scaler: The gradient scaler of fp16 training, if there is one.
        extra: Anything else that JSON can hold.
        total_limit: How many checkpoints to keep; None keeps all.
    """
    final = output_dir / f"checkpoint-{step}"
    _remove_unfinished(output_dir)
    temporary = temporary_for(final)
    temporary.mkdir(parents=True)
    tensors, scalars = _flatten(optimizer.state_dict()["state"])
    state = {
        "step": step,
        "optimizer_scalars": scalars,
        "param_groups": optimizer.state_dict()["param_groups"],
        "scaler": scaler.state_dict() if scaler is not None else None,
        "ema": None,
        "extra": extra,
    }
    atomic_save_file(model_state, temporary / MODEL_FILE)
    atomic_save_file(tensors, temporary / OPTIMIZER_FILE)
    if ema is not None:
        state["ema"] = {k: v for k, v in ema.state_dict().items() if k != "shadow_params"}
        shadow = {str(index): tensor for index, tensor in enumerate(ema.shadow_params)}
        atomic_save_file(shadow, temporary / EMA_FILE)
    write_json(temporary / STATE_FILE, state)
    if final.exists():  # saved before this run went back to an earlier one
        _set_aside(final)
    put_in_place(temporary, final)
    for number, path in _find_checkpoints(output_dir).items():
        if number > step:
            _set_aside(path)
    remove_old_checkpoints(output_dir, step, total_limit)
    return final


def remove_old_checkpoints(output_dir: Path, step: int, total_limit: int | None) -> None:
    """Remove all but the newest `total_limit` checkpoints up to `step`, and unfinished ones.

    A run that was killed before it came to that, and has nothing more to save, does it at its end.
    """
    _remove_unfinished(output_dir)
    found = _find_checkpoints(output_dir)
    numbers = [number for number in found if number <= step]
    for number in numbers[: -total_limit if total_limit else 0]:
        _set_aside(found[number])
    _remove_unfinished(output_dir)


def _remove_unfinished(output_dir: Path) -> None:
    for path in output_dir.glob(".checkpoint-*.tmp-*"):
        shutil.rmtree(path)


def _set_aside(path: Path) -> None:
    path.rename(path.with_name(f".{path.name}.tmp-old"))


def _flatten(
    state: dict[int, dict[str, object]],
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Split an optimizer's state into tensors and other values, named `state.{index}.{name}`."""
    flat = {f"state.{i}.{name}": value for i, item in state.items() for name, value in item.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def load_checkpoint(
    path: Path,
    model: "nn.Module | DotPruner",
    optimizer: torch.optim.Optimizer,
    ema: "EMAModel | None" = None,
    scaler: "torch.amp.GradScaler | None" = None,
) -> tuple[int, dict[str, object]]:
    """Restore what `save_checkpoint` wrote, bit by bit, and return `step` and `extra`.

    Raises:
        ValueError: A file is missing or damaged, or belongs to another network.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / STATE_FILE} cannot be read: {error}") from error
    for name, part in (("ema", ema), ("scaler", scaler)):
        if (part is None) != (state[name] is None):
            raise ValueError(
                f"{path} was saved {'without' if state[name] is None else 'with'} {name} state; "
                "resume with the use_ema and mixed_precision of the first run"
            )
    try:
        model.load_state_dict(_read(path / MODEL_FILE))
    except RuntimeError as error:
        raise ValueError(f"{path / MODEL_FILE} is from another network: {error}") from error
    _load_optimizer(optimizer, _read(path / OPTIMIZER_FILE), state, path)
    if ema is not None:
        shadow = _read(path / EMA_FILE)
        for index, parameter in enumerate(ema.shadow_params):
            parameter.copy_(shadow[str(index)])
        ema.load_state_dict(state["ema"])
    if scaler is not None:
        scaler.load_state_dict(state["scaler"])
    return state["step"], state["extra"]


def _read(path: Path) -> dict[str, Tensor]:
    return read_tensors(path, "delete its folder and resume from another checkpoint")


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], saved: dict, path: Path
) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, object]] = {}
    for key, value in (tensors | saved["optimizer_scalars"]).items():
        _, index, name = key.split(".", 2)
        parameter = parameters[int(index)]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            # Fused updates want the parameter's memory format, which safetensors doesn't keep.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    if [g["params"] for g in groups] != [g["params"] for g in saved["param_groups"]]:
        raise ValueError(f"{path} was saved by an optimizer over other parameters")
    for group, old in zip(groups, saved["param_groups"], strict=True):
        group |= {
            key: tuple(value) if isinstance(value, list) and key != "params" else value
            for key, value in old.items()
            if key not in DEVICE_OPTIONS
        }
    optimizer.load_state_dict({"state": state, "param_groups": groups})
