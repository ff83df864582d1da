"""How good a Dot is on held-out images: what remains of the error of reusing Dash's estimate."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from morse.files import write_json
from morse.plan import MorsePlan
from morse.sampling import JumpPoint, morse_sample
from morse.spaces import from_clean, to_clean
from morse.training.config import TrainDotConfig
from morse.training.data import in_batches
from morse.training.frozen import FrozenDash
from morse.training.guidance import UNCONDITIONAL, Conditions
from morse.training.output import save_grid
from morse.training.pairs import Pairs, Point, dot_outputs, join_points, with_memory
from morse.training.sequences import sequence_pairs, sequence_ratios
from morse.training.source import ConditionedImages, draw_windows
from morse.training.windows import Window, pick_pairs

# Bounds of t_s - t_i, as shares of the schedule, between which errors are reported apart.
GAP_BOUNDS = (0.0, 0.02, 0.05, 0.1, 0.2, 1.0)
_BATCH_SIZE, _LARGE_BATCH_SIZE = 128, 16
VALIDATION_STEPS = 3
_HISTORY_STEPS = 3  # more, for the earlier Dash step
_PICTURES = 8


def held_out_windows(
    source: ConditionedImages,
    config: TrainDotConfig,
    num_points: int,
    generator: torch.Generator,
    first: int = 0,
) -> Iterator[Window]:
    """Make windows of held-out images from the `first` on, in batches."""
    stop = min(first + config.validation_images, len(source))
    size = source.pipeline.batch_size(_BATCH_SIZE, _LARGE_BATCH_SIZE)
    for batch in in_batches(source, range(first, stop), size):
        yield draw_windows(source, config, batch, generator, num_points=num_points)


def validation_pairs(source: ConditionedImages, config: TrainDotConfig) -> list[Pairs]:
    """Make fixed pairs from held-out images, in batches; always the same for the same Dash.

    They are kept for the whole training, and so on the CPU: those of a large pipeline would take
    the GPU's memory from it.
    """
    steps = 1 if config.timestep_sampling == "uniform" else VALIDATION_STEPS
    # One more is what history takes at least; on a plan's grid the segment before is as long.
    more = 1 if config.timestep_sampling == "uniform" else _HISTORY_STEPS
    length = steps + 1 + (more if config.history else 0)
    dash, generator = source.pipeline.dash, torch.Generator(source.pipeline.device).manual_seed(0)
    return [
        pick_pairs(dash, window, 2 * steps, generator, False, widest=steps).to("cpu")
        for window in held_out_windows(source, config, length, generator)
    ]


def validation_sequences(source: ConditionedImages, config: TrainDotConfig) -> list[Pairs]:
    """Make fixed sequences of `VALIDATION_STEPS` pairs likewise (`sequence_pairs`)."""
    generator = torch.Generator(source.pipeline.device).manual_seed(0)
    windows = held_out_windows(source, config, VALIDATION_STEPS + 1, generator)
    return [sequence_pairs(source.pipeline.dash, window).to("cpu") for window in windows]


@torch.no_grad()
def residual_ratios(
    dot: nn.Module, batches: list[Pairs], num_train_timesteps: int
) -> dict[str, float]:
    """Mean square of Dot's error over that of reusing Dash's estimate; 0 is perfect, 1 no gain.

    Under guidance both are errors of the guided estimate. A Dot that relays makes each pair's first
    step after Dash here; `sequence_ratios` has those that follow.

    Returns:
        "residual_ratio" over all pairs, and one "residual_ratio/LOW-HIGH" for each bin of
        t_s - t_i that has pairs, in timesteps; with history also "extrapolation_ratio", the same of
        the base alone. The error of reuse is that without history, so that Dots compare.
    """
    found: list[tuple[Tensor, ...]] = []
    for stored in batches:
        pairs = stored.to(stored.dash.schedule.device)
        branches = pairs.conditions.branches
        alone = (rows.unflatten(0, (-1, branches)) for rows in (pairs.reused, pairs.base))
        errors = (
            (pairs.guided(outputs) - pairs.target).square().flatten(1).mean(1)
            for outputs in (dot_outputs(dot, with_memory(pairs, {})), *alone)
        )
        found.append((*errors, pairs.gap / num_train_timesteps))
    error, base, line, gap = (torch.cat(parts) for parts in zip(*found, strict=True))
    ratios = {"residual_ratio": float(error.sum() / base.sum())}
    if batches[0].jump.trend is not None:
        ratios["extrapolation_ratio"] = float(line.sum() / base.sum())
    for low, high in pairwise(GAP_BOUNDS):
        inside = (gap > low) & (gap <= high)
        if inside.any():
            name = f"{round(low * num_train_timesteps)}-{round(high * num_train_timesteps)}"
            ratios[f"residual_ratio/{name}"] = float(error[inside].sum() / base[inside].sum())
    return ratios


@torch.no_grad()
def sample_rows(
    dash: FrozenDash,
    dot: nn.Module,
    shape: tuple[int, ...],
    conditions: Conditions = UNCONDITIONAL,
    num_dash: int = 6,
    num_dot: int = 12,
    batch_size: int | None = None,
) -> Tensor:
    """Sample the same noise with DDIM three ways, (3, *shape), as the denoiser's samples.

    The rows: Dash alone at all steps, Dash and Dot, Dash alone at as few steps as Dash had there.
    `batch_size` samples are made at a time, or all of them.
    """
    device = dash.schedule.device
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    parts = torch.arange(shape[0], device=device).split(batch_size or shape[0])
    plans = (
        MorsePlan.uniform(num_dash + num_dot, 0),
        MorsePlan.uniform(num_dash, num_dot),
        MorsePlan.uniform(num_dash, 0),
    )
    rows = [
        torch.cat([_sample(dash, dot, noise[part], conditions.take(part), plan) for part in parts])
        for plan in plans
    ]
    return torch.stack(rows).float()


def _sample(
    dash: FrozenDash, dot: nn.Module, noise: Tensor, conditions: Conditions, plan: MorsePlan
) -> Tensor:
    """Sample noise (B, ...) with DDIM by a plan."""
    device, schedule = dash.schedule.device, dash.schedule

    def everywhere(position: Tensor) -> Tensor:
        return position.expand(len(noise))

    def all_branches(sample: Tensor, position: Tensor) -> Tensor:
        return dash(sample, everywhere(position), conditions)

    def at(jump: JumpPoint) -> Point:
        return Point(jump.sample, everywhere(jump.timestep), jump.model_output)

    def corrected(sample: Tensor, position: Tensor, jump: JumpPoint) -> Tensor:
        here, start = Point(sample, everywhere(position)), at(jump)
        before = at(jump.earlier or jump) if dash.history else None
        pairs = join_points(dash, start, here, conditions, before)
        return dot_outputs(dot, with_memory(pairs, jump.memory))

    corrected.independent = True  # the base is in it

    def step(outputs: Tensor, sample: Tensor, position: int, next_position: int) -> Tensor:
        start, end = (
            schedule.rates(torch.tensor(index, device=device), sample)
            for index in (position, next_position)
        )
        estimate = dash.guided(outputs, conditions.guidance_scale, sample)
        clean = to_clean(estimate, sample, start, dash.prediction_type)
        return end[0] * clean + end[1] * from_clean(clean, sample, start, "epsilon")

    count, last = len(plan), len(schedule)
    positions = [round(last - index * last / count) - 1 for index in range(count)]
    return morse_sample(all_branches, corrected, step, noise, positions, plan)


def validation_file(config: TrainDotConfig, step: int) -> Path:
    """Give where the ratios after so many updates are written."""
    return config.output_dir / "validation" / f"step-{step:07d}.json"


def validation_picture(config: TrainDotConfig, step: int) -> Path:
    """Give where the pictures after so many updates are drawn, which a validation does last."""
    return validation_file(config, step).with_suffix(".png")


def make_validator(
    source: ConditionedImages, config: TrainDotConfig
) -> Callable[[nn.Module, int], dict[str, float]]:
    """Give a function (dot, step) -> ratios that also writes them and a picture to `output_dir`.

    The pictures are made at the mean guidance scale, for the first held-out captions or classes.
    """
    pipeline, batches = source.pipeline, validation_pairs(source, config)
    sequences = validation_sequences(source, config) if config.norm == "dnr" else []
    rows = [index % len(source) for index in range(_PICTURES)]
    low, high = pipeline.guidance_scale
    scale = torch.full((_PICTURES,), (low + high) / 2, device=pipeline.device)
    conditions = source.conditions(source.__getitems__(rows), None if high == 1 else scale)
    shape = (_PICTURES, *batches[0].sample.shape[1:])
    at_once = pipeline.batch_size(_PICTURES, _LARGE_BATCH_SIZE)

    def validate(dot: nn.Module, step: int) -> dict[str, float]:
        ratios = residual_ratios(dot, batches, len(pipeline.dash.schedule))
        if sequences:
            ratios |= sequence_ratios(dot, sequences, VALIDATION_STEPS)
        write_json(validation_file(config, step), ratios)
        samples = sample_rows(pipeline.dash, dot, shape, conditions, batch_size=at_once)
        images = pipeline.to_images(samples.flatten(0, 1)).unflatten(0, samples.shape[:2])
        _save_picture(images, validation_picture(config, step))
        return ratios

    return validate


def _save_picture(rows: Tensor, path: Path) -> None:
    """Save (rows, columns, C, H, W) in [0, 1] as one PNG."""
    from diffusers import DiffusionPipeline

    arrays = rows.flatten(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    save_grid(DiffusionPipeline.numpy_to_pil(arrays), len(rows), path)
