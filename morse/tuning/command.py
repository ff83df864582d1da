"""`morse tune-dot`: train a Dot on the error of the samples that its plans end in.

A Dot learns single steps first (`train_dot`), where an error counts as much as any other. Here
whole runs are made, Dash frozen but differentiated, so that it learns what matters at a run's end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list

from morse.denoisers import find_denoiser
from morse.evaluation.bench.loading import with_scheduler
from morse.evaluation.bench.solvers import make_solver
from morse.evaluation.conditions import Conditions, encode_once, make_conditions
from morse.evaluation.environment import command_line, environment
from morse.files import write_json
from morse.plan import MorsePlan
from morse.saved_plans import SavedPlan
from morse.steps import shorten_plan
from morse.training.output import claim_output, record_run
from morse.training.run import TrainingRun
from morse.tuning.blend import blend, weights_before
from morse.tuning.config import TuneDotConfig
from morse.tuning.loading import load_to_tune
from morse.tuning.loss import FeatureLoss, load_feature_loss, run_loss
from morse.tuning.progress import Progress
from morse.tuning.sampler import PlannedRun, SampledRun, enable_with_gradients
from morse.tuning.targets import describe_encoders, prepare_targets
from morse.tuning.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline, SchedulerMixin

    from morse.dot import MorseDot

__all__ = ["TuneDotConfig", "tune_dot"]


def tune_dot(config: TuneDotConfig) -> Path:
    """Tune a Dot and save it for `MorseDot.from_pretrained`, with its plans.

    Returns:
        Its folder, `config.output_dir`.
    """
    accelerator = claim_output(config)
    bare, dot = load_to_tune(config, accelerator.device)
    schedulers = {solver: make_solver(solver, bare.scheduler.config) for solver in config.solver}
    pipe = enable_with_gradients(with_scheduler(bare, schedulers[config.solver[0]]), dot)
    before = weights_before(dot, config.blend_from) if config.blend < 1 else None
    decode = bool(config.feature_networks) and getattr(pipe, "vae", None) is not None
    asked = (config.prompts, config.class_names, config.prompt_embeds)
    scales: tuple[float | None, ...] = config.guidance_scale or (None,)
    conditions = make_conditions(pipe, *asked, scales[0])
    encoders = describe_encoders(pipe, conditions)
    conditions = encode_once([pipe], conditions)
    progress = Progress(config.output_dir)
    earlier_ratio = progress.choices.get("speed_ratio")
    # Of the largest scale: without guidance Dash takes half the time.
    guided = replace(conditions, guidance_scale=max(config.guidance_scale, default=None))
    pipe.speed_ratio = _choose_speed_ratio(pipe, config, guided, accelerator, earlier_ratio)
    target_runs = _target_runs(pipe, config.target_lsd, scales)
    runs = runs_to_tune(pipe, schedulers, config.lsd, scales, accelerator.print)
    sampled, many = (
        SampledRun(pipe, each, conditions, config.seed, decode) for each in (runs, target_runs)
    )
    if config.gradient_checkpointing:
        _checkpoint_gradients(sampled)
    features = _feature_loss(many, config, accelerator)
    record_run(config, accelerator)
    targets = prepare_targets(many, config, accelerator, encoders)
    choices = _choices(config, pipe.speed_ratio, [*runs, *target_runs])
    loss = run_loss([run.target for run in runs], features)
    training = TrainingRun(config, accelerator, sampled, targets, loss, choices=choices)

    validation = Validation(training, targets, progress)
    if accelerator.is_main_process:
        validation.begin()
    accelerator.wait_for_everyone()
    last = training.train(validation.after_step)
    if accelerator.is_main_process:
        saved = validation.validate(last)
        training.copy_weights_to(sampled)
        if before is not None:
            blend(dot, before, config.blend)
            saved = validation.judge(f"blended, {config.blend:g} of the change")
        validation.warn_if_worse(saved)
        found = {"decibels_by_step": progress.decibels, "decibels_as_saved": saved}
        _save(dot, pipe.speed_ratio, config, found)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return config.output_dir


@torch.no_grad()
def _choose_speed_ratio(
    pipe: "DiffusionPipeline",
    config: TuneDotConfig,
    conditions: Conditions,
    accelerator: "Accelerator",
    earlier: float | None,
) -> float:
    """Give N, by which budgets become plans: as set, as Dot's config says, or as measured.

    It is measured as Dot will be used, with its LoRA merged, and by one process for all; a run that
    is resumed keeps its `earlier` one, for another N may give other plans.
    """
    chosen = [config.speed_ratio or pipe.speed_ratio or earlier]
    if chosen[0] is None and accelerator.is_main_process:
        pipe.dot.merge_lora()
        few = conditions.arguments(range(config.train_batch_size))
        chosen = [pipe.measure_speed_ratio(**few).speed_ratio]
        pipe.dot.unmerge_lora()
        accelerator.print(f"N is {chosen[0]:.1f} here; --speed_ratio sets another")
    return broadcast_object_list(chosen)[0]


def _choices(
    config: TuneDotConfig, speed_ratio: float, runs: Sequence[PlannedRun]
) -> dict[str, object]:
    """Give what decides on the runs that are made, for those that resume this one."""
    return {
        "solver": list(config.solver),
        "lsd": list(config.lsd),
        "speed_ratio": speed_ratio,
        "plans": {run.name: run.plan.plan for run in runs},
    }


def runs_to_tune(
    pipe: "DiffusionPipeline",
    schedulers: Mapping[str, "SchedulerMixin"],
    budgets: Sequence[float],
    scales: Sequence[float | None] = (None,),
    tell: Callable[[str], None] = print,
) -> list[PlannedRun]:
    """Give what `lsd=` runs with each solver for each budget, without those that have no Dot.

    Args:
        pipe: A pipeline with Morse; it has the last of the schedulers afterwards.
        schedulers: By the name of their solver.
        budgets: In LSD.
        scales: Guidance scales, each for all of these; their targets are in this order.
        tell: Is told which are left out.

    Raises:
        ValueError: If none has.
    """
    runs, all_dash = [], []
    for (solver, scheduler), lsd in product(schedulers.items(), budgets):
        pipe.scheduler = scheduler
        run = PlannedRun(scheduler, pipe.plan_for(lsd), f"{solver}, {lsd:g} LSD")
        if "o" in run.plan.plan:
            runs += _at_scales(run, scales)
        else:
            all_dash.append(run.name)
    if not runs:
        raise ValueError(
            f"lsd is {tuple(budgets)}, but at N = {pipe.speed_ratio:g} the plans of "
            f"{', '.join(schedulers)} for these are without Dot, and there is nothing to tune: "
            "give another --solver or other --lsd, or the N of where Dot is to run by "
            "--speed_ratio; where no plan has Dot, it is of no help there, so leave it as it is."
        )
    if all_dash:
        tell(f"not tuned for, as without Dot at N = {pipe.speed_ratio:g}: {'; '.join(all_dash)}")
    return runs


def _at_scales(run: PlannedRun, scales: Sequence[float | None]) -> list[PlannedRun]:
    """Give a run at each guidance scale, with the index of the scale's targets."""
    return [
        run._replace(
            name=f"{run.name}, guidance {scale:g}" if len(scales) > 1 else run.name,
            guidance_scale=scale,
            target=target,
        )
        for target, scale in enumerate(scales)
    ]


def _target_runs(
    pipe: "DiffusionPipeline", lsd: float, scales: Sequence[float | None]
) -> list[PlannedRun]:
    """Give the saved plan for a budget if it is all Dash, else as many evaluations of Dash.

    One that was fitted to a smaller budget is run as it is, with fewer evaluations than wanted.
    """
    plan, evaluations = pipe.plan_for(lsd), round(lsd)
    if set(plan.plan) != {"D"} or len(plan.plan) < evaluations:
        all_dash = MorsePlan.uniform(evaluations, 0)
        plan = SavedPlan(lsd, str(shorten_plan(pipe, {}, all_dash)[0]))
    return _at_scales(PlannedRun(pipe.scheduler, plan, "target"), scales)


def _checkpoint_gradients(sampled: SampledRun) -> None:
    """Have Dash's activations, and those of what decodes its samples, computed twice."""
    find_denoiser(sampled.pipe).enable_gradient_checkpointing()
    if getattr(sampled.pipe, "vae", None) is not None and sampled.output_type != "latent":
        sampled.pipe.vae.enable_gradient_checkpointing()


@torch.no_grad()
def _feature_loss(
    sampled: SampledRun, config: TuneDotConfig, accelerator: "Accelerator"
) -> FeatureLoss | None:
    """Load what errors in features are measured with, if anything; tried before the long work."""
    if not config.feature_networks:
        return None
    example = sampled(torch.arange(2), 0)
    return load_feature_loss(config.feature_networks, accelerator.device, example)


def _save(
    dot: "MorseDot", speed_ratio: float, config: TuneDotConfig, found: dict[str, object]
) -> None:
    """Save the Dot; what was measured of its plans before holds no more."""
    unknown = {"psnr": None, "uniform_psnr": None, "num_images": None}
    plans = {
        name: [entry | unknown if "o" in entry["plan"] else entry for entry in entries]
        for name, entries in (dot.config.plans or {}).items()
    }
    # By another N `lsd=` would run other plans than those that were tuned for.
    dot.register_to_config(plans=plans, speed_ratio=speed_ratio)
    dot.save_pretrained(config.output_dir)
    facts = {
        "command": command_line(),
        "environment": environment(dot.device),
        **found,
    }
    write_json(config.output_dir / "tuning.json", facts)
