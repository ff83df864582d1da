"""One run of the ablation: a Dot of one row and seed, trained, saved, and measured as saved."""

import shutil
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from torch import nn

from morse.dot import MorseDot
from morse.evaluation.ablation.config import AblationConfig
from morse.evaluation.ablation.workers import one_thread
from morse.training.cache import prepare_cache
from morse.training.common import make_accelerator
from morse.training.frozen import FrozenPipeline, load_frozen_pipeline
from morse.training.loop import train_dot
from morse.training.pairs import Pairs
from morse.training.sequences import sequence_ratios
from morse.training.source import open_source
from morse.training.validation import (
    VALIDATION_STEPS,
    residual_ratios,
    validation_pairs,
    validation_sequences,
)


def open_pipeline(config: AblationConfig) -> FrozenPipeline:
    """Load the pipeline onto the device that runs train on.

    Raises:
        ValueError: If it takes text or classes, which the ablation does not handle.
    """
    settings = config.training(0, config.output_dir, {})
    pipeline = load_frozen_pipeline(settings, make_accelerator(settings).device)
    if pipeline.encoder.kind != "none":
        raise ValueError(
            f"pipeline is {config.pipeline!r}, which takes {pipeline.encoder.kind}; the ablation "
            "is for unconditional pipelines"
        )
    return pipeline


def check_data(config: AblationConfig) -> None:
    """Open the pipeline and both parts of the images, so that bad settings fail at once."""
    with one_thread():
        pipeline = open_pipeline(config)
        for split in ("train", "test"):
            open_source(pipeline, config.training(0, config.output_dir, {}), split)


def prepare_windows(config: AblationConfig, seed: int) -> None:
    """Evaluate Dash for the windows that all rows of a seed are trained on, unless that is done."""
    settings, pipeline = config.training(seed, config.output_dir, {}), open_pipeline(config)
    source = open_source(pipeline, settings, "train")
    prepare_cache(source, settings, make_accelerator(settings))


@dataclass(frozen=True)
class HeldOut:
    """What every Dot of an ablation is measured on.

    Attributes:
        pipeline: With Dash.
        pairs: Fixed pairs of held-out images.
        sequences: Fixed sequences of the steps that follow a Dash evaluation, of the same images.
    """

    pipeline: FrozenPipeline
    pairs: list[Pairs]
    sequences: list[Pairs]

    def ratios(self, dot: nn.Module) -> dict[str, float]:
        """Return what `residual_ratios` and `sequence_ratios` say of a Dot."""
        dot_ratios = residual_ratios(dot, self.pairs, len(self.pipeline.dash.schedule))
        return dot_ratios | sequence_ratios(dot, self.sequences, VALIDATION_STEPS)


@lru_cache(maxsize=1)
def held_out(config: AblationConfig) -> HeldOut:
    """Make what Dots are measured on; once a process."""
    settings = replace(
        config.training(0, config.output_dir, {}), validation_images=config.validation_images
    )
    pipeline = open_pipeline(config)
    source = open_source(pipeline, settings, "test")
    return HeldOut(
        pipeline, validation_pairs(source, settings), validation_sequences(source, settings)
    )


def dot_folder(config: AblationConfig, name: str, seed: int) -> Path:
    """Return where the Dot of one row and seed is saved."""
    return config.output_dir / "dots" / f"{name}-seed{seed}"


def train_and_measure(
    config: AblationConfig, name: str, seed: int, overrides: dict[str, object]
) -> dict[str, object]:
    """Train the Dot of one row and seed, and measure it as it was saved.

    Args:
        config: The settings.
        name: Of the row.
        seed: Of weights, windows and their order.
        overrides: Of `TrainDotConfig`.

    Returns:
        residual_ratio, sequence_ratio and their likes ("ratios"), parameters, those other than
        zero, bytes on disk, and wall and CPU seconds of the whole run, with loading and pictures.
    """
    folder = dot_folder(config, name, seed)
    shutil.rmtree(folder, ignore_errors=True)  # a killed run's
    started, cpu = time.perf_counter(), time.process_time()
    log = config.output_dir / "logs" / f"{name}-seed{seed}.txt"
    with log.open("w", encoding="utf-8") as lines, redirect_stdout(lines):
        train_dot(config.training(seed, folder, overrides))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    measured_on = held_out(config)
    dot = load_dot(folder, measured_on.pipeline.dash.model)
    counts = count_parameters(dot)
    size = disk_size(folder)
    for checkpoint in [*folder.rglob("checkpoint-*")]:  # of a first stage too
        shutil.rmtree(checkpoint, ignore_errors=True)
    return {
        "row": name,
        "seed": seed,
        "overrides": overrides,
        "ratios": measured_on.ratios(dot),
        **counts,
        "bytes": size,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def load_dot(folder: Path, dash: nn.Module) -> MorseDot:
    """Load a saved Dot for `dash`, in evaluation mode."""
    dot = MorseDot.from_pretrained(str(folder)).to(dash.device)
    return dot.bind(dash).eval()


def count_parameters(dot: nn.Module) -> dict[str, int]:
    """Count Dot's own parameters, and those of them that are not zero."""
    own = list(dot.parameters())
    return {
        "parameters": sum(parameter.numel() for parameter in own),
        "nonzero": sum(int(parameter.count_nonzero()) for parameter in own),
    }


def disk_size(folder: Path) -> int:
    """Return the bytes of a saved Dot: its weights and its config."""
    return sum(
        file.stat().st_size for file in (*folder.glob("*.safetensors"), folder / "config.json")
    )
