"""How good a Dot is on held-out images: what remains of the error of reusing Dash's estimate."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from morse.plan import MorsePlan
from morse.sampling import dot_estimate, morse_sample
from morse.spaces import ddim_step, signal_and_noise, to_noise_pred
from morse.training.checkpoint import write_json
from morse.training.data import ImageDataset, to_model_range
from morse.training.frozen import FrozenDash
from morse.training.windows import Pairs, TimestepSampling, fresh_window, pick_pairs

# Bounds of t_s - t_i, as shares of the schedule, between which errors are reported apart.
GAP_BOUNDS = (0.0, 0.02, 0.05, 0.1, 0.2, 1.0)
_BATCH_SIZE = 128
_VALIDATION_STEPS = 3


def validation_pairs(
    dash: FrozenDash, dataset: ImageDataset, num_images: int, sampling: TimestepSampling
) -> list[Pairs]:
    """Make fixed pairs from held-out images, in batches; always the same for the same Dash."""
    count = min(num_images, len(dataset))
    device = dash.alphas_cumprod.device
    generator = torch.Generator(device).manual_seed(0)
    steps = 1 if sampling == "uniform" else _VALIDATION_STEPS
    batches = []
    for start in range(0, count, _BATCH_SIZE):
        indices = list(range(start, min(start + _BATCH_SIZE, count)))
        clean = to_model_range(dataset.__getitems__(indices)).to(device)
        window = fresh_window(
            dash, clean, generator, steps + 1, sampling, dash.alphas_cumprod, dash.prediction_type
        )
        batches.append(pick_pairs(window, 2 * steps, generator, first=False))
    return batches


@torch.no_grad()
def residual_ratios(
    dot: nn.Module, batches: list[Pairs], num_train_timesteps: int
) -> dict[str, float]:
    """Mean square of Dot's error over that of reusing Dash's estimate; 0 is perfect, 1 no gain.

    Returns:
        "residual_ratio" over all pairs, and one "residual_ratio/LOW-HIGH" for each bin of
        t_s - t_i that has pairs, in timesteps.
    """
    errors, reuse, gaps = [], [], []
    for pairs in batches:
        estimate = dot_estimate(dot, pairs.sample, pairs.timestep, pairs.jump)
        errors.append((estimate.float() - pairs.target).square().flatten(1).mean(1))
        reuse.append((pairs.jump.model_output - pairs.target).square().flatten(1).mean(1))
        gaps.append((pairs.jump.timestep - pairs.timestep) / num_train_timesteps)
    error, base, gap = (torch.cat(parts) for parts in (errors, reuse, gaps))
    ratios = {"residual_ratio": float(error.sum() / base.sum())}
    for low, high in pairwise(GAP_BOUNDS):
        inside = (gap > low) & (gap <= high)
        if inside.any():
            name = f"{round(low * num_train_timesteps)}-{round(high * num_train_timesteps)}"
            ratios[f"residual_ratio/{name}"] = float(error[inside].sum() / base[inside].sum())
    return ratios


@torch.no_grad()
def sample_rows(
    dash: FrozenDash, dot: nn.Module, shape: tuple[int, ...], num_dash: int = 6, num_dot: int = 12
) -> Tensor:
    """Sample the same noise with DDIM three ways, (3, *shape) in [0, 1].

    The rows: Dash alone at all steps, Dash and Dot, Dash alone at as few steps as Dash had there.
    """
    device, schedule = dash.alphas_cumprod.device, dash.alphas_cumprod
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)

    def step(model_output: Tensor, sample: Tensor, timestep: int, prev_timestep: int) -> Tensor:
        start, end = (
            signal_and_noise(schedule, torch.tensor(time, device=device), sample)
            for time in (timestep, prev_timestep)
        )
        noise_pred = to_noise_pred(model_output, sample, *start, dash.prediction_type)
        return ddim_step(noise_pred, sample, start, end)

    rows = []
    total = num_dash + num_dot
    for plan in (
        MorsePlan.uniform(total, 0),
        MorsePlan.uniform(num_dash, num_dot),
        MorsePlan.uniform(num_dash, 0),
    ):
        count, last = len(plan), len(schedule)
        timesteps = [round(last - index * last / count) - 1 for index in range(count)]
        rows.append(morse_sample(dash, dot, step, noise, timesteps, plan))
    return (torch.stack(rows).float() / 2 + 0.5).clamp(0, 1)


def make_validator(
    dash: FrozenDash,
    dataset: ImageDataset,
    num_images: int,
    sampling: TimestepSampling,
    output_dir: Path,
) -> Callable[[nn.Module, int], dict[str, float]]:
    """Give a function (dot, step) -> ratios that also writes them and a picture to `output_dir`."""
    batches = validation_pairs(dash, dataset, num_images, sampling)
    folder = output_dir / "validation"

    def validate(dot: nn.Module, step: int) -> dict[str, float]:
        ratios = residual_ratios(dot, batches, len(dash.alphas_cumprod))
        folder.mkdir(exist_ok=True)
        write_json(folder / f"step-{step:07d}.json", ratios)
        shape = (8, *batches[0].sample.shape[1:])
        _save_picture(sample_rows(dash, dot, shape), folder / f"step-{step:07d}.png")
        return ratios

    return validate


def _save_picture(rows: Tensor, path: Path) -> None:
    """Save (rows, columns, C, H, W) in [0, 1] as one PNG."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import make_image_grid

    arrays = rows.flatten(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    images = DiffusionPipeline.numpy_to_pil(arrays)
    make_image_grid(images, rows=rows.shape[0], cols=rows.shape[1]).save(path)
