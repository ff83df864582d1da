"""A guided pipeline is measured once for each guidance scale; here the parts become one result.

Rows, speed-ups, lossless tests and baseline curves of all scales stand in the same lists, each with
its `guidance_scale`. What is said of a scale as a whole (N, pictures, what was not measured) stands
under "guidance", one entry a scale. `morse.evaluation.report.data.guidance_parts` takes such a
result apart again. Without guidance there is one part, whose `guidance_scale` is None.
"""

from collections.abc import Sequence
from pathlib import Path

Facts = dict[str, object]


def part_folders(output_dir: Path, scales: Sequence[float | None]) -> list[Path]:
    """Return where each scale's measurements are kept; `output_dir` itself without guidance."""
    return [output_dir if scale is None else output_dir / f"guidance-{scale:g}" for scale in scales]


def join_parts(
    scales: Sequence[float | None], facts: Sequence[Facts], figures: Sequence[Facts]
) -> Facts:
    """Put the parts of a result together.

    Args:
        scales: One a part; (None,) without guidance.
        facts: What `measure_cells` returned.
        figures: What `summarize` returned.
    """
    # A part that time ran out for may know fewer axes.
    joined: Facts = {
        "axes": {axis: about for part in figures for axis, about in part["axes"].items()}
    }
    for key in ("rows", "speedups", "lossless"):
        joined[key] = [
            {**entry, "guidance_scale": scale}
            for scale, part in zip(scales, figures, strict=True)
            for entry in part[key]
        ]
    joined["baseline_curves"] = {
        axis: [
            {**entry, "guidance_scale": scale}
            for scale, part in zip(scales, figures, strict=True)
            for entry in part["baseline_curves"].get(axis, ())
        ]
        for axis in joined["axes"]
    }
    if tuple(scales) == (None,):
        return {**facts[0], **joined}
    guidance = [
        {"guidance_scale": scale, **part} for scale, part in zip(scales, facts, strict=True)
    ]
    return {"speed_ratio": facts[0]["speed_ratio"], "guidance": guidance, **joined}
