"""The same noise sampled by each method, as strips of pixels for the report."""

import base64
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from morse.evaluation.bench.methods import REFERENCE_SOLVER, REFERENCE_STEPS, Method
from morse.evaluation.bench.solvers import SOLVERS
from morse.evaluation.bench.store import CellStore, reference_name
from morse.evaluation.report.pictures import png_bytes, to_bytes, to_picture

if TYPE_CHECKING:
    from morse.evaluation.bench.config import BenchmarkConfig

COLUMNS = 12


def strip_png(images: Tensor) -> str:
    """Put the first `COLUMNS` images side by side in a PNG of 8 bits, and that into base64.

    Args:
        images: (N, C, H, W) in [0, 1], with C = 1 or 3.
    """
    row = np.concatenate(list(to_bytes(images[:COLUMNS])), axis=1)  # (H, columns * W, C)
    return base64.b64encode(png_bytes(to_picture(row))).decode("ascii")


def grid_budgets(budgets: tuple[int, ...]) -> tuple[int, ...]:
    """Choose the budgets whose images are shown: the smallest, the middle and the largest."""
    ordered = sorted(set(budgets))
    if not ordered:
        return ()
    return tuple(dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1])))


def strip_name(method: Method, budget: int, seed: int) -> str:
    """Return the name that a strip of images has in the store."""
    name = f"strip-{method.label}-lsd{budget}-seed{seed}"
    return name.replace("+", "p").replace(" ", "-")


def image_grid(config: "BenchmarkConfig", store: CellStore) -> dict[str, object] | None:
    """Collect strips of images, the reference's first; None where nothing was sampled.

    What did not engage is left out, as everywhere.
    """
    seed, budgets = config.seeds[0], grid_budgets(config.lsd)
    wanted = [task for task in config.tasks() if task[1] in budgets and store.has(*task, seed)]
    chosen = [
        task
        for task in wanted
        if all(store.is_engaged(*task, each) for each in config.seeds if store.has(*task, each))
    ]
    if not chosen:
        return None
    # The store holds all of them, since it holds these cells.
    reference = strip_png(store.images(reference_name(seed), list))
    label = f"{SOLVERS[REFERENCE_SOLVER]}, {REFERENCE_STEPS} LSD"
    rows = [{"label": label, "png_base64": reference}]
    for method, budget in sorted(chosen, key=lambda task: task[1]):
        png = store.once(strip_name(method, budget, seed), str)
        rows.append({"label": f"{method.label}, {budget} LSD", "png_base64": png})
    count = min(COLUMNS, config.num_images)
    return {"seeds": list(range(seed, seed + count)), "rows": rows}
