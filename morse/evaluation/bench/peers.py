"""Peers: other training-free accelerators, at the same budgets as Morse.

| peer | what it leaves out | applies to |
|---|---|---|
| deepcache | the deep layers of a UNet in most steps | UNets |
| tomesd | tokens like others, in self-attention | UNets with transformer blocks |
| fbcache | all blocks but the first, where that changed little (First Block Cache) | transformers |
| pab | attention in every second step (Pyramid Attention Broadcast) | transformers |
| fastercache | the branch without a prompt, and attention, in most steps | transformers |
| taylorseer | attention in most steps, extrapolated from earlier ones | transformers |
| cache-dit | the middle blocks, where the first ones changed little | transformers |

An LSD is what one evaluation of the bare pipeline costs, in seconds; a peer's evaluations are
measured in it, in turn with the bare ones.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morse.denoisers import find_denoiser
from morse.evaluation.bench import caches
from morse.evaluation.bench.deepcache import (
    deepcache,
    deepcache_cost,
    deepcache_obstacle,
    deepcache_steps,
    measure_deepcache,
)
from morse.evaluation.bench.engagement import LEAST_GAIN, timed, why_not_engaged
from morse.evaluation.bench.methods import Method
from morse.evaluation.bench.runs import Samples, sample_images
from morse.evaluation.conditions import Conditions
from morse.steps import find_steps

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MEASURED_STEPS = 12  # at most, in which every peer but DeepCache is tried out
TIMED_RUNS = 2  # of each peer and of the bare pipeline
# A peer that saves less may have skipped nothing, and timing's noise look like a gain.
DOUBTFUL_LSD = 0.8


@dataclass(frozen=True)
class Peer:
    """A training-free accelerator.

    Attributes:
        apply: (pipeline, number of its setting) -> a context in which the pipeline is sped up.
        obstacle: (pipeline) -> why it can't be measured, or None.
        adaptive: Whether what a step costs depends on the images or on the number of steps, so
            that every run must be timed.
    """

    apply: Callable[["DiffusionPipeline", float], AbstractContextManager]
    obstacle: Callable[["DiffusionPipeline"], str | None]
    adaptive: bool = True


# The names and their settings are in `bench.tasks`.
PEERS = {
    "deepcache": Peer(
        lambda pipe, number: deepcache(pipe, int(number)), deepcache_obstacle, adaptive=False
    ),
    "tomesd": Peer(caches.tomesd, caches.tomesd_obstacle, adaptive=False),
    "fbcache": Peer(caches.first_block_cache, caches.block_obstacle),
    "pab": Peer(caches.pyramid_attention, caches.attention_obstacle),
    "fastercache": Peer(caches.faster_cache, caches.faster_cache_obstacle),
    "taylorseer": Peer(caches.taylorseer, caches.attention_obstacle),
    "cache-dit": Peer(caches.cache_dit, caches.cache_dit_obstacle),
}


def number_of(method: Method) -> float:
    """Read the number out of a peer's setting, such as "interval 3"."""
    return float(method.setting.rpartition(" ")[2])


def apply_peer(pipe: "DiffusionPipeline", method: Method) -> AbstractContextManager:
    """Return the context in which `pipe` samples by a peer; afterwards it is what it was."""
    return PEERS[method.kind].apply(pipe, number_of(method))


def measure_peer(
    pipe: "DiffusionPipeline", method: Method, batch_size: int, conditions: Conditions
) -> dict[str, object]:
    """Measure what a peer's steps cost, and whether it engages.

    Returns:
        As from `measure_deepcache` or `measure_steps`; or "error", where the peer raised one.
    """
    try:
        if method.kind == "deepcache":
            interval = int(number_of(method))
            return measure_deepcache(pipe, interval, batch_size, conditions=conditions)
        return measure_steps(pipe, method, batch_size, conditions=conditions)
    except Exception as error:  # whatever a foreign program may raise is told, not a crash
        first = (str(error).strip().splitlines() or [""])[0]
        return {"error": f"it raised {type(error).__name__}: {first[:200]}"}


def measure_steps(
    pipe: "DiffusionPipeline",
    method: Method,
    batch_size: int,
    conditions: Conditions,
) -> dict[str, object]:
    """Measure what an evaluation of a peer costs, averaged over a run, in turn with bare ones.

    Args:
        pipe: A bare pipeline.
        method: The peer and its setting.
        batch_size: The batch size to sample with.
        conditions: What the images are of.

    Returns:
        `step_lsd`: seconds of a peer's run over those of a bare one, the median. `bare_seconds`:
        what a bare step takes. `engaged` and `note`: as from `measure_deepcache`.
    """
    bare, ratios = [], []
    denoiser, seeds = find_denoiser(pipe), range(batch_size)
    steps = find_steps(pipe, {}, MEASURED_STEPS)[1]  # Heun's evaluations are odd
    for run in range(TIMED_RUNS + 1):  # the first one warms up
        with timed(denoiser) as bare_seconds:
            plain = sample_images(pipe, steps, seeds, batch_size, conditions=conditions)
        with apply_peer(pipe, method), timed(denoiser) as seconds:
            sped = sample_images(pipe, steps, seeds, batch_size, conditions=conditions)
        if run:
            bare.append(sum(bare_seconds) / steps)
            ratios.append(sum(seconds) / sum(bare_seconds))
    note = why_not_engaged(torch.equal(plain.images, sped.images), median(ratios))
    return {
        "setting": method.setting,
        "batch_size": batch_size,
        "step_lsd": median(ratios),
        "bare_seconds": median(bare),
        "engaged": not note,
        "note": note,
    }


def peer_steps(method: Method, budget: float, measured: dict[str, object]) -> int:
    """Return how many steps of a peer `budget` LSD pay for, as it was measured; at least 1."""
    if method.kind == "deepcache":
        return deepcache_steps(budget, int(number_of(method)), measured["cached_lsd"])
    return max(1, math.floor(budget / measured["step_lsd"] + 1e-9))


def peer_facts(
    method: Method,
    measured: dict[str, object],
    samples: Samples,
    seconds: list[float],
    sample_bare: Callable[[], Tensor],
) -> tuple[dict[str, object], str]:
    """Tell what a peer's images cost.

    Args:
        method: The peer and its setting.
        measured: What `measure_peer` returned.
        samples: Its images.
        seconds: Of each call of the denoiser while they were sampled.
        sample_bare: Returns the bare pipeline's first batch of as many steps, (B, C, H, W); called
            where an adaptive peer saved so little that its images must tell whether it engaged.

    Returns:
        Attributes of `Samples` to change (num_dash, lsd, engaged), and a note.
    """
    steps, note = samples.num_dash, str(measured["note"])
    if method.kind == "deepcache":
        cached = measured["cached_lsd"]
        full, cost = deepcache_cost(steps, int(number_of(method)), cached)
        told = f"{steps} steps, {full} of them full; a cached one costs {cached:.2f} LSD"
        return {"num_dash": full, "lsd": cost, "engaged": measured["engaged"]}, _join(told, note)
    step_lsd, engaged = measured["step_lsd"], measured["engaged"]
    if PEERS[method.kind].adaptive:
        batches = len(samples.images) / samples.batch_size  # the last may be smaller
        step_lsd = sum(seconds) / (measured["bare_seconds"] * steps * batches)
        # Not by its trial, in whose steps it may have skipped nothing where in these it does.
        note = _why_idle(samples.images, step_lsd, sample_bare)
        engaged = not note
    told = f"{steps} steps of {step_lsd:.2f} LSD"
    return {"lsd": steps * step_lsd, "engaged": engaged}, _join(told, note)


def _why_idle(images: Tensor, step_lsd: float, sample_bare: Callable[[], Tensor]) -> str:
    """Tell why an adaptive peer did not engage in a run; "" if it did. See `peer_facts`."""
    if step_lsd <= DOUBTFUL_LSD:
        return ""
    if step_lsd > 1 - LEAST_GAIN:  # so it did not, whatever its images are
        return why_not_engaged(False, step_lsd)
    bare = sample_bare()
    return why_not_engaged(torch.equal(bare, images[: len(bare)]), step_lsd)


def _join(*parts: str) -> str:
    return "; ".join(filter(None, parts))
