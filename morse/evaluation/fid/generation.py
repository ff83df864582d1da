"""Images written by a pipeline, one PNG a seed, by any number of processes with the same result."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import DDIMPipeline, DDPMPipeline

from morse.evaluation.conditions import Conditions
from morse.evaluation.fid.folders import (
    FALLBACKS,
    check_images,
    fallbacks_file,
    image_file,
    missing_images,
    record_settings,
)
from morse.evaluation.fid.image_sets import ImageSet, image_files
from morse.evaluation.report.pictures import to_picture
from morse.files import replacing, write_json
from morse.plan import MorsePlan
from morse.saved_plans import scheduler_options

if TYPE_CHECKING:
    from accelerate import PartialState
    from diffusers import DiffusionPipeline

    from morse.summary import MorseRun


@dataclass(frozen=True)
class Recipe:
    """What makes one folder of images.

    Attributes:
        label: For people: "Morse, 5 LSD".
        folder: For files: "lsd_5".
        kind: "morse", "baseline" (the bare pipeline) or "reference" (the bare pipeline with the
            many steps that fidelity is measured against).
        steps: `num_inference_steps` of the bare pipeline, or Morse's plan.
        budget: LSD asked for, or the number of steps.
        num_dash: Evaluations of Dash that these are.
        scheduler: Options of the scheduler that its plan goes with.
    """

    label: str
    folder: str
    kind: str
    steps: int | MorsePlan
    budget: float
    num_dash: int
    scheduler: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """Which images to make, whatever the recipe.

    Attributes:
        num_images: Image i of `num_images` starts from seed `seed` + i.
        seed: Of image 0.
        batch_size: Consecutive images that make one batch, on every number of processes. Another
            changes no image's noise, and pixels no more than rounding does.
        conditions: What each image is of.
        settings: What else the images depend on; recorded in each folder. On a CPU "num_threads"
            has the number of threads, in a list: a folder may be gone on with by another.
    """

    num_images: int
    seed: int
    batch_size: int
    conditions: Conditions
    settings: dict[str, object]

    def batches(self) -> list[range]:
        """Return the image numbers of each batch."""
        starts = range(0, self.num_images, self.batch_size)
        return [range(first, min(first + self.batch_size, self.num_images)) for first in starts]


def generate(
    pipe: "DiffusionPipeline",
    recipe: Recipe,
    request: Request,
    output_dir: Path,
    state: "PartialState",
    on_images: Callable[[int, int], object] | None = None,
) -> tuple[Path, list[dict[str, object]]]:
    """Write the images that `output_dir/recipe.folder` lacks; waits for all processes.

    The batches are fixed by `request` alone and dealt out to the processes, and a batch of which
    any image is missing is sampled as a whole, so that no pixel depends on the number of processes,
    on where an earlier run was stopped or on how many images it was to make. Rounding depends on
    the number of a CPU's threads, which `accelerate launch` sets to 1, and on the size of batches:
    with others the noise is the same, and pixels agree to about 1/255. All processes must see the
    same `output_dir`.

    Args:
        pipe: With Morse attached if the recipe has a plan.
        recipe: How to sample.
        request: Which images.
        output_dir: Where the recipe's folder is or is made.
        state: Of accelerate: this process among all.
        on_images: Called with the numbers of images done and to do by this process.

    Returns:
        The folder, and of each of its batches, whoever made them, that did not go as planned its
        "num_images", "num_dash", "num_dot" and "fallbacks" (why, and how often).

    Raises:
        ValueError: If the folder holds images of other settings, or an image is not finite.
    """
    folder = output_dir / recipe.folder
    content = check_folder(recipe, request, output_dir)
    state.wait_for_everyone()  # all have read before the first one writes
    if state.is_main_process:
        record_settings(folder, content, request.batches())
    state.wait_for_everyone()  # what is to be made anew is gone
    missing = [batch for batch in request.batches() if missing_images(folder, batch)]
    state.wait_for_everyone()  # all have listed the same before the first one adds images
    mine = missing[state.process_index :: state.num_processes]
    done, total = 0, sum(len(batch) for batch in mine)
    if on_images is not None:
        on_images(done, total)
    for batch in mine:
        images = _sample(pipe, recipe, request, batch)
        if isinstance(recipe.steps, MorsePlan) and pipe.last_run.fallbacks:
            _record_fallbacks(folder, batch, pipe.last_run)
        for index in missing_images(folder, batch):
            with replacing(image_file(folder, index)) as temporary:
                to_picture(images[index - batch.start]).save(temporary, "PNG")
        done += len(batch)
        if on_images is not None:
            on_images(done, total)
    state.wait_for_everyone()
    return folder, [json.loads(file.read_text()) for file in sorted(folder.glob(FALLBACKS))]


def generated_set(folder: Path, num_images: int) -> ImageSet:
    """Return the first `num_images` images of a folder that `generate` filled, in seed order."""
    return image_files(folder, [image_file(folder, index) for index in range(num_images)])


def _settings(recipe: Recipe, request: Request) -> dict[str, object]:
    """Return all that a folder's pixels depend on, as JSON gives it back."""
    planned = isinstance(recipe.steps, MorsePlan)
    content = {
        "steps": len(recipe.steps) if planned else recipe.steps,
        "plan": str(recipe.steps) if planned else None,
        "plan_scheduler": recipe.scheduler,
        "num_images": request.num_images,
        "seed": request.seed,
        "batch_size": request.batch_size,
        "prompts": request.conditions.prompts,
        "class_labels": request.conditions.class_labels,
        "guidance_scale": request.conditions.guidance_scale,
        **request.settings,
    }
    return json.loads(json.dumps(content))


def check_folder(recipe: Recipe, request: Request, output_dir: Path) -> dict[str, object]:
    """Check that a recipe's folder is free, or holds such images or fewer; returns its settings.

    Raises:
        ValueError: If it holds images of other settings.
    """
    content = _settings(recipe, request)
    check_images(output_dir / recipe.folder, content)
    return content


def _sample(
    pipe: "DiffusionPipeline", recipe: Recipe, request: Request, batch: range
) -> np.ndarray:
    """Sample one batch; returns bytes (B, H, W, C)."""
    planned = isinstance(recipe.steps, MorsePlan)
    settings = {"plan": recipe.steps} if planned else {"num_inference_steps": recipe.steps}
    settings |= request.conditions.arguments(batch)
    generators = [torch.Generator().manual_seed(request.seed + index) for index in batch]
    with scheduler_options(pipe, recipe.scheduler):
        images = pipe(generator=generators, output_type=_output_type(pipe), **settings).images
    if isinstance(images, torch.Tensor):
        images = images.permute(0, 2, 3, 1).float().cpu()
    images = np.asarray(images)
    broken = [
        request.seed + i
        for i, image in zip(batch, images, strict=True)
        if not np.isfinite(image).all()
    ]
    if broken:
        raise ValueError(
            f"{recipe.label}: the images of seeds {broken[:10]} hold NaN or infinity"
            f" ({len(broken)} of a batch of {len(batch)}); a pipeline in half precision may "
            "overflow: try --dtype float32 or bfloat16"
        )
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


def _output_type(pipe: "DiffusionPipeline") -> str:
    """Choose arrays, but where pixels of bfloat16 would have to become some: NumPy has no such."""
    plain = isinstance(pipe, (DDPMPipeline, DDIMPipeline)) and pipe.dtype is torch.bfloat16
    return "pt" if plain else "np"


def _record_fallbacks(folder: Path, batch: range, run: "MorseRun") -> None:
    """Keep with the images what they cost, where that was not what was planned."""
    content = {"num_images": len(batch), "num_dash": run.num_dash, "num_dot": run.num_dot}
    content["fallbacks"] = dict(run.fallbacks)
    write_json(fallbacks_file(folder, batch.start), content)
