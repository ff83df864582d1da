"""Morse on samples that are graphs: poses of 17 joints, denoised on a grid.

python -m pipelines.skeleton_diffusion --output_dir DIR

A skeleton is laid out on a grid of 6 x 6 cells by Ske2Grid's transforms (or GridConv's), so that an
ordinary UNet2DModel can be Dash and share its weights with a MorseDot. Trains both, samples at
equal cost with and without Dot, and writes results.json, results.md and poses.png. `--quick` takes
seconds and its figures say nothing.
"""

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from morse import MorseDot, MorsePipeline, MorsePlan
from morse.cli import run_command
from morse.evaluation.environment import command_line, environment
from morse.files import write_bytes, write_json
from morse.settings import REQUIRED, option, replace_defaults, require, require_least
from morse.training.schedule import read_schedule
from pipelines.skeleton_data import VALID, bone_errors, draw_poses, energy_distance
from pipelines.skeleton_report import COLUMNS, draw_report, to_markdown
from pipelines.skeleton_training import (
    SkeletonDash,
    SkeletonPipeline,
    make_pipeline,
    train_dash,
    train_dot,
)

REFERENCE_STEPS = 100
TRAIN_SEED, HELD_OUT_SEED = 1000, 1001


@dataclass(frozen=True, kw_only=True)
class SkeletonConfig:
    """Train a Dash and a Dot for skeletons, and compare samples at equal cost."""

    output_dir: Path = option(REQUIRED, "folder for results.json, results.md, poses.png")
    grid: Literal["ske2grid", "gridconv"] = option(
        "ske2grid", "whose transforms lay joints out on the grid"
    )
    channels: int = option(32, "Dash's channels, a multiple of 8")
    train_poses: int = option(20_000, "poses to train on")
    dash_steps: int = option(1500, "updates of Dash")
    dot_steps: int = option(1000, "updates of Dot")
    windows: int = option(4096, "pieces of sampling runs Dot learns from")
    batch_size: int = option(128, "poses, or pairs, an update")
    lsd: tuple[int, ...] = option((4, 6, 8, 12, 16), "budgets in LSD")
    speed_ratio: float | None = option(None, "N to plan with; what is measured here if left out")
    plan_ratio: float = option(1.75, "evaluations per LSD to aim at")
    num_poses: int = option(256, "samples of a method for each seed")
    seeds: int = option(3, "sets of noise, of seeds 0, 1, ...")
    note: str = option("", "what the report shall say of this run")
    quick: bool = option(False, "tiny models, a few updates")

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.quick:
            tiny = {
                "channels": 16, "train_poses": 256, "dash_steps": 30, "dot_steps": 30,
                "windows": 64, "batch_size": 32, "lsd": (4, 6), "num_poses": 16, "seeds": 1,
                "speed_ratio": 3.0,
            }  # fmt: skip
            replace_defaults(self, tiny)
        least = dict.fromkeys(("train_poses", "dash_steps", "dot_steps", "windows", "seeds"), 1)
        least |= {"batch_size": 2, "num_poses": 2}  # half a batch of Dot's are pairs after a Dash
        require_least(self, least | {"channels": 8, "lsd": 2, "plan_ratio": 1})
        compared, ratio = self.seeds * self.num_poses, self.speed_ratio
        allowed = f"seeds * num_poses = {compared} or more, to compare as many with held-out ones"
        require(self.train_poses >= compared, "train_poses", self.train_poses, allowed)
        require(self.channels % 8 == 0, "channels", self.channels, "a multiple of 8")
        require(bool(self.lsd), "lsd", self.lsd, "one budget or more")
        require(ratio is None or ratio > 1, "speed_ratio", ratio, "above 1")


@dataclass(frozen=True)
class Trained:
    """A pipeline with its Dot, one that reuses Dash's estimates instead, and how training went."""

    morse: DiffusionPipeline
    reuse: DiffusionPipeline
    dash_loss: float
    dot_error: float


def no_residual(sample: Tensor, timestep: Tensor, jump: object) -> Tensor:
    """Stand in for Dot: reuse Dash's latest estimate as it is."""
    return torch.zeros_like(sample)


def train(config: SkeletonConfig, poses: Tensor) -> Trained:
    """Train Dash, then Dot, and attach it to a pipeline that samples with DPM-Solver++ 2M."""
    pipe = make_pipeline(config)
    dash_loss = train_dash(pipe, poses, config)
    print(f"Dash is trained, loss {dash_loss:.4f}", flush=True)
    schedule, prediction_type = read_schedule(pipe.scheduler, 1)
    dash = SkeletonDash(
        model=pipe.unet, schedule=schedule, prediction_type=prediction_type, layout=pipe.layout
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dot = MorseDot.from_dash(pipe.unet, num_down_blocks=1, lora_rank=8)
    dot_error = train_dot(dot, dash, poses, config)
    print(f"Dot is trained, {dot_error:.3f} of reuse's error", flush=True)
    morse = MorsePipeline.from_pipe(pipe, dot, scheduler="dpmsolver++")
    twin = SkeletonPipeline(pipe.unet, morse.scheduler, pipe.layout)
    return Trained(morse, MorsePipeline.from_pipe(twin, no_residual), dash_loss, dot_error)


def measure(
    sampled: list[Tensor], held_out: Tensor, references: list[Tensor]
) -> dict[str, dict[str, object]]:
    """Return mean, standard deviation and each seed's value of every figure."""
    values: dict[str, list[float]] = {
        "valid": [100 * (bone_errors(p) <= VALID).double().mean().item() for p in sampled],
        "bone_error": [100 * bone_errors(poses).double().mean().item() for poses in sampled],
        "energy_distance": [energy_distance(poses, held_out) for poses in sampled],
    }
    if references:
        pairs = zip(sampled, references, strict=True)
        values["rmse"] = [(poses - there).square().mean().sqrt().item() for poses, there in pairs]
    return {
        key: {
            "mean": statistics.fmean(each),
            "std": statistics.stdev(each) if each[1:] else None,
            "seeds": each,
        }
        for key, each in values.items()
    }


def compare(
    config: SkeletonConfig, trained: Trained, held_out: Tensor, speed_ratio: float
) -> tuple[dict[str, object], dict[tuple[str, int], Tensor]]:
    """Sample all methods at all budgets; returns the figures, and poses of the first seed."""

    def sample(pipe: DiffusionPipeline, **steps: object) -> list[Tensor]:
        generators = (torch.Generator().manual_seed(seed) for seed in range(config.seeds))
        return [pipe(config.num_poses, generator=each, **steps) for each in generators]

    references = sample(trained.morse, num_inference_steps=REFERENCE_STEPS)
    rows, shown = [], {("solver", REFERENCE_STEPS): references[0][:COLUMNS]}
    for lsd in config.lsd:
        plan = MorsePlan.from_budget(lsd, speed_ratio, config.plan_ratio)
        for method, pipe in (
            ("solver", trained.morse), ("morse", trained.morse), ("reuse", trained.reuse)
        ):  # fmt: skip
            bare, started = method == "solver", time.perf_counter()
            sampled = sample(pipe, **({"num_inference_steps": lsd} if bare else {"plan": plan}))
            row = {
                "method": method, "lsd": lsd, "plan": "" if bare else str(plan),
                "cost": lsd if bare else plan.cost(speed_ratio),
                "seconds": time.perf_counter() - started,
            }  # fmt: skip
            rows.append(row | measure(sampled, held_out, references))
            shown[method, lsd] = sampled[0][:COLUMNS]
    return {"rows": rows, "reference": measure(references, held_out, [])}, shown


def run(config: SkeletonConfig) -> None:
    """Train, compare and write the report."""
    started = time.monotonic()
    poses = draw_poses(config.train_poses, TRAIN_SEED)
    held_out = draw_poses(4 * config.num_poses, HELD_OUT_SEED)
    trained = train(config, poses)
    measured = trained.morse.measure_speed_ratio(batch_size=config.num_poses)
    print(f"N = {measured.speed_ratio:.2f}", flush=True)
    speed_ratio = config.speed_ratio or measured.speed_ratio
    compared, shown = compare(config, trained, held_out, speed_ratio)
    parts = list(poses.split(config.num_poses)[: config.seeds])
    settings = {key: value for key, value in asdict(config).items() if key != "output_dir"}
    result = {
        "command": command_line(),
        "environment": environment(torch.device("cpu")),
        "config": settings, "measured": asdict(measured), "speed_ratio": speed_ratio,
        "dash_loss": trained.dash_loss, "dot_error": trained.dot_error,
        **compared, "floor": measure(parts, held_out, []),
        "seconds": time.monotonic() - started,
    }  # fmt: skip
    write_json(config.output_dir / "results.json", result)
    write_bytes(config.output_dir / "results.md", to_markdown(result).encode())
    title = f"Skeletons from the same noise; red: bones more than {VALID:.0%} too long or short"
    budgets = config.lsd[:1] + config.lsd[2:3]
    rows = {key: value for key, value in shown.items() if key[1] in (*budgets, REFERENCE_STEPS)}
    write_bytes(config.output_dir / "poses.png", draw_report(result, rows, title))


if __name__ == "__main__":
    run_command(SkeletonConfig, run)
