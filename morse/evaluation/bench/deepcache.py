"""DeepCache (Ma et al. 2024, arXiv 2312.00858), which reuses a UNet's deep features."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING

import torch

from morse.evaluation.bench.engagement import timed, why_not_engaged
from morse.evaluation.bench.runs import sample_images
from morse.evaluation.bench.untouched import untouched
from morse.evaluation.conditions import UNCONDITIONAL, Conditions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def deepcache_obstacle(pipe: "DiffusionPipeline") -> str | None:
    """Tell why DeepCache can't be measured with a pipeline; None if it can."""
    if find_spec("DeepCache") is None:
        return "the package DeepCache is not installed: pip install --no-deps DeepCache==0.1.1"
    unet = getattr(pipe, "unet", None)
    if not hasattr(unet, "down_blocks"):
        return "not applicable: DeepCache needs a UNet, and there are no down_blocks"
    if _repeats_timesteps(pipe.scheduler):
        return (
            "not applicable: DeepCache counts steps by their timesteps, and "
            f"{type(pipe.scheduler).__name__} uses some twice"
        )
    return None


def _repeats_timesteps(scheduler: object) -> bool:
    copy = type(scheduler).from_config(scheduler.config)
    copy.set_timesteps(6)
    return len(copy.timesteps.unique()) < len(copy.timesteps)


@contextmanager
def deepcache(pipe: "DiffusionPipeline", interval: int) -> Iterator[None]:
    """Sample with DeepCache's helper; afterwards the pipeline is what it was, bit for bit.

    The helper replaces the forward methods of the denoiser and of its blocks and puts them back as
    attributes of the objects, where they would hide what is set on the classes later; these are
    removed too.

    Args:
        pipe: A pipeline with a `unet`.
        interval: Every so many steps all layers run, and between them those of the shallowest
            and fastest branch alone.
    """
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    with untouched(pipe.unet):
        helper.enable()
        try:
            yield
        finally:
            helper.disable()


def measure_deepcache(
    pipe: "DiffusionPipeline",
    interval: int,
    batch_size: int,
    repeats: int = 3,
    conditions: Conditions = UNCONDITIONAL,
) -> dict[str, object]:
    """Measure what a cached step costs, in turn with the bare pipeline, and whether it engages.

    Args:
        pipe: A bare pipeline.
        interval: As for `deepcache`.
        batch_size: The batch size to sample with.
        repeats: Timed runs of each, two intervals long; one more of each warms up.
        conditions: What the images are of.

    Returns:
        `cached_lsd`: median seconds of a cached evaluation over those of a bare one. `engaged`:
        whether the images differ from the bare pipeline's and the time is shorter by
        `engagement.LEAST_GAIN`. `note`: which of the two failed, else "". `time_ratio`: an
        interval's seconds over the bare pipeline's.
    """
    bare, full, cached = [], [], []
    seeds, steps = range(batch_size), 2 * interval
    for run in range(repeats + 1):
        with timed(pipe.unet) as bare_seconds:
            plain = sample_images(pipe, steps, seeds, batch_size, conditions=conditions).images
        with deepcache(pipe, interval), timed(pipe.unet) as seconds:
            images = sample_images(pipe, steps, seeds, batch_size, conditions=conditions).images
        if run:
            bare += bare_seconds
            full += seconds[::interval]
            cached += [value for step, value in enumerate(seconds) if step % interval]
    interval_seconds = median(full) + (interval - 1) * median(cached)
    time_ratio = interval_seconds / (interval * median(bare))
    note = why_not_engaged(torch.equal(plain, images), time_ratio)
    return {
        "interval": interval,
        "batch_size": batch_size,
        "cached_lsd": median(cached) / median(bare),
        "time_ratio": time_ratio,
        "engaged": not note,
        "note": note,
    }


def deepcache_cost(steps: int, interval: int, cached_lsd: float) -> tuple[int, float]:
    """Return how many of `steps` evaluate all layers, and what all of them cost in LSD.

    A step that evaluates all layers is one of Dash and costs 1; a cached step costs `cached_lsd`.
    """
    full = math.ceil(steps / interval)
    return full, full + (steps - full) * cached_lsd


def deepcache_steps(budget: float, interval: int, cached_lsd: float) -> int:
    """Return the largest number of steps that `budget` LSD pay for."""
    steps = 1
    while deepcache_cost(steps + 1, interval, cached_lsd)[1] <= budget + 1e-9:
        steps += 1
    return steps
