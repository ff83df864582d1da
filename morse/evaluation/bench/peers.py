"""Peers: other training-free accelerators, at the same budgets as Morse.

Only DeepCache (Ma et al. 2024, arXiv 2312.00858) applies to the `UNet2DModel`s that the benchmark
samples with. tomesd and diffusers' own caches work on transformer blocks, which it has none of;
`obstacle` says so for whoever asks for them.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from morse.evaluation.bench.runs import sample_images

if TYPE_CHECKING:
    from morse.evaluation.bench.solver_pipeline import SolverPipeline

PEERS = ("deepcache", "tomesd", "diffusers-cache")
INTERVALS = (3, 2, 5)  # the first is what DeepCache's authors recommend
LEAST_GAIN = 0.05  # share of time that a peer must save to count as engaged


def obstacle(peer: str, unet: nn.Module, scheduler: object) -> str | None:
    """Tell why a peer can't be measured; None if it can.

    Args:
        peer: One of `PEERS`.
        unet: The denoiser.
        scheduler: The scheduler to sample with.
    """
    model = type(unet).__name__
    if peer == "tomesd":
        return f"not applicable: it merges tokens of transformer blocks, which {model} lacks"
    if peer == "diffusers-cache":
        return f"not applicable: diffusers' caches skip transformer blocks, which {model} lacks"
    if find_spec("DeepCache") is None:
        return "the package DeepCache is not installed: pip install --no-deps DeepCache==0.1.1"
    if not hasattr(unet, "down_blocks"):
        return f"not applicable: DeepCache needs a UNet, and {model} has no down_blocks"
    if _repeats_timesteps(scheduler):
        return (
            "not applicable: DeepCache counts steps by their timesteps, and "
            f"{type(scheduler).__name__} uses some twice"
        )
    return None


def _repeats_timesteps(scheduler: object) -> bool:
    copy = type(scheduler).from_config(scheduler.config)
    copy.set_timesteps(6)
    return len(copy.timesteps.unique()) < len(copy.timesteps)


@contextmanager
def deepcache(pipe: "SolverPipeline", interval: int, branch: int = 0) -> Iterator[None]:
    """Sample with DeepCache's helper; afterwards the pipeline is what it was, bit for bit.

    The helper replaces the forward methods of the denoiser and of its blocks and puts them back as
    attributes of the objects, where they would hide what is set on the classes later; these are
    removed too.

    Args:
        pipe: A pipeline with a `unet`.
        interval: Every so many steps all layers run, and between them those of one branch alone.
        branch: DeepCache's `cache_branch_id`; 0 is the shallowest and fastest.
    """
    from DeepCache import DeepCacheSDHelper

    before = {module: vars(module).get("forward") for module in pipe.unet.modules()}
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def measure_deepcache(
    pipe: "SolverPipeline", interval: int, batch_size: int, repeats: int = 3
) -> dict[str, object]:
    """Measure what a cached step costs, in turn with the bare pipeline, and whether it engages.

    Args:
        pipe: A bare pipeline.
        interval: As for `deepcache`.
        batch_size: The batch size to sample with.
        repeats: Timed runs of each, two intervals long; one more of each warms up.

    Returns:
        `cached_lsd`: median seconds of a cached evaluation over those of a bare one. `engaged`:
        whether the images differ from the bare pipeline's and the time is at least `LEAST_GAIN`
        shorter. `note`: which of the two failed, else "". `time_ratio`: an interval's seconds over
        the bare pipeline's.
    """
    bare, full, cached = [], [], []
    seeds, steps = range(batch_size), 2 * interval
    for run in range(repeats + 1):
        with timed(pipe.unet) as bare_seconds:
            plain = sample_images(pipe, steps, seeds, batch_size).images
        with deepcache(pipe, interval), timed(pipe.unet) as seconds:
            images = sample_images(pipe, steps, seeds, batch_size).images
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


def why_not_engaged(is_identical: bool, time_ratio: float) -> str:
    """Tell why a peer counts as not engaged; "" if it does engage.

    Args:
        is_identical: Whether its images are the bare pipeline's, bit for bit.
        time_ratio: Its time over the bare pipeline's for as many steps.
    """
    if is_identical:
        return "not engaged: its images are the bare pipeline's, bit for bit"
    if time_ratio > 1 - LEAST_GAIN:
        return (
            f"not engaged: it took {time_ratio:.0%} of the bare pipeline's time, and less than "
            f"{1 - LEAST_GAIN:.0%} was asked for"
        )
    return ""


@contextmanager
def timed(model: nn.Module) -> Iterator[list[float]]:
    """Collect the seconds that each call of `model` takes, on whatever device it is."""
    seconds: list[float] = []

    def now() -> float:
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)
        return perf_counter()

    def start(*_: object) -> None:
        seconds.append(-now())

    def stop(*_: object) -> None:
        seconds[-1] += now()

    handles = [model.register_forward_pre_hook(start), model.register_forward_hook(stop)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


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
