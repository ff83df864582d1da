"""N, how many times faster Dot is than Dash, at several batch sizes, LoRA merged and not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from morse.denoisers import find_denoiser
from morse.evaluation.conditions import UNCONDITIONAL, Conditions

if TYPE_CHECKING:
    from morse.pipeline import MorsePipeline

Mode = Literal["eager", "compiled", "cuda_graph"]


def measure_speed(
    pipe: "MorsePipeline",
    batch_size: int,
    mode: Mode = "eager",
    conditions: Conditions = UNCONDITIONAL,
) -> dict[str, object]:
    """Measure N as the pipeline is, Dash and Dot interleaved in one process.

    Args:
        pipe: A pipeline with a Dot.
        batch_size: Images at a time.
        mode: What the pipeline's models are; only told.
        conditions: What the images are of. Where guidance evaluates two branches in one batch, an
            evaluation is both.

    Returns:
        speed_ratio (median), and the quartiles of seconds an evaluation takes: dash_seconds and
        dot_seconds, each [q25, median, q75].
    """
    arguments = conditions.arguments(range(batch_size))
    if mode != "eager":  # compiles or captures in its first evaluations, outside the timed ones
        pipe.measure_speed_ratio(**arguments, repeats=2)
    measured = pipe.measure_speed_ratio(**arguments, repeats=15)
    return {
        "batch_size": batch_size,
        "mode": mode,
        "speed_ratio": measured.speed_ratio,
        "dash_seconds": list(measured.dash_seconds),
        "dot_seconds": list(measured.dot_seconds),
        "how": "Dash and Dot in turn, warm, 15 times each; N is the ratio of the medians",
    }


def measure_speed_table(
    pipe: "MorsePipeline",
    batch_sizes: Sequence[int],
    mode: Mode = "eager",
    merged: Sequence[bool] = (True, False),
    conditions: Conditions = UNCONDITIONAL,
) -> list[dict[str, object]]:
    """Measure N at each batch size with Dot's LoRA merged and unmerged.

    `pipe.speed_ratio` and the merging are left as they were found. Batches that memory does not
    suffice for are left out.

    Args:
        pipe: A pipeline with a `MorseDot`.
        batch_sizes: Images at a time.
        mode: As for `measure_speed`.
        merged: Whether to merge, one round each.
        conditions: As for `measure_speed`.
    """
    before, was_merged = pipe.speed_ratio, pipe.dot.is_merged
    table = []
    try:
        for merge in merged:
            set_merged(pipe, merge)
            for batch_size in batch_sizes:
                try:
                    entry = measure_speed(pipe, batch_size, mode, conditions)
                except torch.OutOfMemoryError:
                    print(f"N at batch {batch_size} is not measured: out of memory")
                    continue
                table.append({"merged": merge, **entry})
    finally:
        set_merged(pipe, was_merged)
        pipe.speed_ratio = before
    return table


def set_merged(pipe: "MorsePipeline", merged: bool) -> None:
    """Merge the LoRA of the pipeline's Dot, or take it apart again; twice is safe."""
    if pipe.dot.is_merged != merged:
        pipe.dot.merge_lora() if merged else pipe.dot.unmerge_lora()


def compile_models(pipe: "MorsePipeline") -> None:
    """Compile the pipeline's Dash and Dot, once for each shape, for as long as they live."""
    find_denoiser(pipe).compile(dynamic=False)
    pipe.dot.compile(dynamic=False)
