"""What `morse eval fid` generates: the pipeline, its recipes and what their images depend on."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from morse.evaluation.bench.loading import drop_safety_checker
from morse.evaluation.bench.solvers import make_solver
from morse.evaluation.conditions import check_starts_from_noise, make_conditions
from morse.evaluation.digests import networks_sha256, state_sha256
from morse.evaluation.fid.folders import made_with, threads_notes
from morse.evaluation.fid.generation import Recipe, Request, check_folder, generate
from morse.evaluation.fid.measuring import check_size
from morse.evaluation.progress import progress_bar
from morse.evaluation.prompts import read_prompts
from morse.plan import MorsePlan
from morse.rates import adds_noise, own_parameters
from morse.steps import count_evaluations

if TYPE_CHECKING:
    from accelerate import PartialState
    from diffusers import DiffusionPipeline, SchedulerMixin

    from morse.dot import MorseDot
    from morse.evaluation.fid.config import FidConfig
    from morse.evaluation.fid.extractors import Extractor

_AUTOENCODERS = ("vae", "vqvae", "movq")  # their names in pipelines


def generate_all(
    config: "FidConfig",
    state: "PartialState",
    device: torch.device,
    extractor: "Extractor | None" = None,
) -> list[dict[str, object]]:
    """Generate the images of every budget, and first of the reference if asked for.

    Args:
        config: The settings.
        state: Of accelerate: this process among all.
        device: Where to sample.
        extractor: What the images are for, if they are for one; it is tried before.

    Returns:
        The facts of each recipe: its row of the result, without scores. "made_with" has what is
        recorded with its images, but for the prompts.

    Raises:
        ValueError: If the pipeline has no Dot or no N for --lsd, or does not suit the scheduler,
            prompts or classes, or takes images; or if its images do not suit the extractor.
    """
    pipe = _load_pipeline(config, device)
    check_starts_from_noise(pipe, config.pipeline)
    check_size(config, extractor, _image_size(pipe))
    asked = read_prompts(config.prompts), config.class_names
    conditions = make_conditions(pipe, *asked, guidance_scale=config.guidance_scale)
    drop_safety_checker(pipe)
    request = Request(
        num_images=config.num_images,
        seed=config.seed,
        batch_size=config.batch_size,
        conditions=conditions,
        settings=_settings(config, pipe, device),
    )
    rows, recipes = [], list(_recipes(config, pipe))
    for recipe in recipes:  # before any is sampled
        check_folder(recipe, request, config.output_dir)
    for recipe in recipes:
        with progress_bar(recipe.label, state.is_main_process) as on_images:
            folder, changed = generate(pipe, recipe, request, config.output_dir, state, on_images)
        fallbacks = dict(sum((Counter(batch["fallbacks"]) for batch in changed), Counter()))
        row = _row(recipe, folder, pipe) | {"fallbacks": fallbacks}
        row |= _cost(recipe, changed, config.num_images, pipe.speed_ratio)
        notes = [*_notes(config, pipe, recipe, fallbacks), *threads_notes(folder)]
        rows.append({**row, "made_with": made_with(folder), "notes": notes})
    return rows


def _load_pipeline(config: "FidConfig", device: torch.device) -> "DiffusionPipeline":
    """Load the pipeline, with its Dot if there is one, and the N that plans are made with."""
    from morse.pipeline import MorsePipeline

    pipe = MorsePipeline.from_pretrained(
        config.pipeline, dot=config.dot, dtype=getattr(torch, config.dtype)
    ).to(device)
    if config.scheduler is not None or config.timestep_spacing is not None:
        MorsePipeline.from_pipe(pipe, scheduler=_make_scheduler(config, pipe.scheduler))
    pipe.set_progress_bar_config(disable=True)
    if config.speed_ratio is not None:
        pipe.speed_ratio = config.speed_ratio
    if config.lsd and pipe.dot is None:
        raise ValueError(
            f"pipeline {config.pipeline!r} has no Dot, which --lsd needs; give one with --dot, or "
            "--num_inference_steps for the bare pipeline"
        )
    if config.lsd and pipe.speed_ratio is None:
        raise ValueError(
            "Dot's config does not say how many times faster it is than Dash, and one measured "
            "anew would change the plans from run to run; give it by --speed_ratio, measured once "
            f"by MorsePipeline.from_pretrained({config.pipeline!r}, dot={config.dot!r})"
            ".measure_speed_ratio(batch_size=16), with a prompt for text, on the device that you "
            "use; or run `morse plan`, which saves it with the Dot"
        )
    return pipe


def _image_size(pipe: "DiffusionPipeline") -> tuple[int, int] | None:
    """Return the height and width of images that a pipeline makes unasked; None if not known."""
    from morse.denoisers import find_denoiser

    size = find_denoiser(pipe).config.get("sample_size")
    vae = next(filter(None, (getattr(pipe, name, None) for name in _AUTOENCODERS)), None)
    levels = 1 if vae is None else len(vae.config.get("block_out_channels", ()))
    if size is None or not levels:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height * 2 ** (levels - 1), width * 2 ** (levels - 1)


def _make_scheduler(config: "FidConfig", own: "SchedulerMixin") -> "SchedulerMixin":
    """Make the scheduler asked for, on the grid that `morse bench` and `morse plan` lay with it.

    So the bare solver's steps lie as those of saved plans, which bring their spacing.

    Raises:
        ValueError: If it is unknown, or does not take the spacing asked for.
    """
    from morse.schedulers import remake

    name, spacing, made = config.scheduler, config.timestep_spacing, own
    if name is not None:
        # Of the classes PNDM's alone needs a grid of its own, which its short name stands for.
        made = make_solver("pndm" if name in ("PNDM", "PNDMScheduler") else name, own.config)
    if spacing is None:
        return made
    if "timestep_spacing" not in own_parameters(made):
        raise ValueError(
            f"timestep_spacing is {spacing!r}, but {type(made).__name__} has none; leave it out"
        )
    return remake(type(made), {**made.config, "timestep_spacing": spacing})


def _spacing(recipe: Recipe, pipe: "DiffusionPipeline") -> str | None:
    """Tell how a recipe's steps are spaced; None of a scheduler that has no such option."""
    if "timestep_spacing" not in own_parameters(pipe.scheduler):
        return None
    return recipe.scheduler.get("timestep_spacing", pipe.scheduler.config.timestep_spacing)


def _recipes(config: "FidConfig", pipe: "DiffusionPipeline") -> Iterator[Recipe]:
    if config.reference_steps is not None:
        steps = config.reference_steps
        label = f"reference, {steps} steps"
        made = count_evaluations(pipe, {}, steps)
        yield Recipe(label, f"reference_{steps}_steps", "reference", steps, steps, made)
    for steps in sorted(set(config.num_inference_steps)):
        made = count_evaluations(pipe, {}, steps)
        yield Recipe(f"bare, {steps} steps", f"steps_{steps}", "baseline", steps, steps, made)
    for lsd in sorted(set(config.lsd)):
        spent = pipe.plan_for(lsd)
        plan, options = MorsePlan.from_string(spent.plan), dict(spent.scheduler)
        names = f"Morse, {lsd:g} LSD", f"lsd_{lsd:g}"
        yield Recipe(*names, "morse", plan, lsd, plan.num_dash, options)


def _settings(
    config: "FidConfig", pipe: "DiffusionPipeline", device: torch.device
) -> dict[str, object]:
    """Return what pixels depend on beside the recipe: weights, scheduler, precision, device.

    Of a CPU also the number of threads, on which only rounding depends.
    """
    from morse.denoisers import find_denoiser

    denoiser = find_denoiser(pipe)
    # Another class' spacing, left in the config, is of no effect.
    unspaced = "timestep_spacing" not in own_parameters(pipe.scheduler)
    threads = {"num_threads": [torch.get_num_threads()]} if device.type == "cpu" else {}
    return {
        "pipeline": config.pipeline,
        "denoiser_sha256": state_sha256(denoiser),
        "dot_sha256": None if pipe.dot is None else state_sha256(pipe.dot),
        "dot_config": _beside_weights(pipe.dot),
        "components_sha256": networks_sha256(pipe, but=(denoiser, pipe.dot)),  # text encoders, ...
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": {
            key: value
            for key, value in pipe.scheduler.config.items()
            if not (key.startswith("_") or (key == "timestep_spacing" and unspaced))
        },
        "dtype": config.dtype,
        "device": device.type,
        **threads,
    }


def _beside_weights(dot: "MorseDot | None") -> dict[str, object]:
    """Return what Dot's config decides that its weights do not tell."""
    names = ("base_space", "extrapolation_cap", "gate", "lora_alpha")
    return {} if dot is None else {name: dot.config[name] for name in names}


def _notes(
    config: "FidConfig", pipe: "DiffusionPipeline", recipe: Recipe, fallbacks: dict[str, int]
) -> list[str]:
    """Say what may surprise in a recipe's figures."""
    name = type(pipe.scheduler).__name__
    notes = [f"Dash ran in Dot's place: {fallbacks}"] if fallbacks else []
    if adds_noise(pipe.scheduler) and config.reference_steps is not None:
        notes.append(
            f"{name} draws fresh noise at each step, so images of other numbers of steps are other "
            "images and fidelity to the reference says little; give --scheduler dpmsolver++, say"
        )
    spacing = _spacing(recipe, pipe)
    if spacing is not None and spacing != pipe.scheduler.config.timestep_spacing:
        notes.append(
            f"{recipe.label}: its saved plan's timestep_spacing is {spacing}, that of the bare "
            f"pipeline's steps {pipe.scheduler.config.timestep_spacing}; --timestep_spacing "
            f"{spacing} lays both alike"
        )
    return notes


def _row(recipe: Recipe, folder: Path, pipe: "DiffusionPipeline") -> dict[str, object]:
    planned = isinstance(recipe.steps, MorsePlan)
    return {
        "label": recipe.label,
        "kind": recipe.kind,
        "budget": recipe.budget,
        "plan": str(recipe.steps) if planned else "",
        "speed_ratio": pipe.speed_ratio if planned else None,
        "timestep_spacing": _spacing(recipe, pipe),
        "source": str(folder),
    }


def _cost(
    recipe: Recipe,
    changed: Sequence[dict[str, object]],
    num_images: int,
    speed_ratio: float | None,
) -> dict[str, float]:
    """Return the evaluations of an image and their LSD, the mean where batches differ.

    Args:
        recipe: The recipe.
        changed: The batches that did not go as planned, from `generate`.
        num_images: Of all batches.
        speed_ratio: N.
    """
    cost = {"num_dash": recipe.num_dash, "num_dot": getattr(recipe.steps, "num_dot", 0)}
    rest = num_images - sum(batch["num_images"] for batch in changed)
    if changed:
        for name, number in cost.items():
            others = sum(batch[name] * batch["num_images"] for batch in changed)
            cost[name] = (number * rest + others) / num_images
    return {**cost, "lsd": cost["num_dash"] + cost["num_dot"] / (speed_ratio or 1)}
