"""N, how many times faster Dot is than Dash, at several batch sizes, LoRA merged and not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from morse.pipeline import MorsePipeline


def measure_speed(pipe: "MorsePipeline", batch_size: int) -> dict[str, object]:
    """Measure N as the pipeline is, Dash and Dot interleaved in one process.

    Returns:
        speed_ratio (median), and the quartiles of seconds an evaluation takes: dash_seconds and
        dot_seconds, each [q25, median, q75].
    """
    measured = pipe.measure_speed_ratio(batch_size=batch_size, repeats=15)
    return {
        "batch_size": batch_size,
        "speed_ratio": measured.speed_ratio,
        "dash_seconds": list(measured.dash_seconds),
        "dot_seconds": list(measured.dot_seconds),
        "how": "Dash and Dot in turn, warm, 15 times each; N is the ratio of the medians",
    }


def measure_speed_table(
    pipe: "MorsePipeline", batch_sizes: Sequence[int]
) -> list[dict[str, object]]:
    """Measure N at each batch size with Dot's LoRA merged and unmerged.

    `pipe.speed_ratio` and the merging are left as they were found.
    """
    before, was_merged = pipe.speed_ratio, pipe.dot.is_merged
    table = []
    try:
        for merged in (True, False):
            set_merged(pipe, merged)
            for batch_size in batch_sizes:
                table.append({"merged": merged, **measure_speed(pipe, batch_size)})
    finally:
        set_merged(pipe, was_merged)
        pipe.speed_ratio = before
    return table


def set_merged(pipe: "MorsePipeline", merged: bool) -> None:
    """Merge the LoRA of the pipeline's Dot, or take it apart again; twice is safe."""
    if pipe.dot.is_merged != merged:
        pipe.dot.merge_lora() if merged else pipe.dot.unmerge_lora()
