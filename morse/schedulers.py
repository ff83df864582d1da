"""Schedulers by short names, made from a pipeline's own scheduler's config."""

import inspect
import warnings
from collections.abc import Mapping

import diffusers
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, SchedulerMixin
from torch import Tensor

from morse.flow_leapfrog import FlowMatchLeapfrogScheduler
from morse.leapfrog import LeapfrogScheduler
from morse.rates import is_flow, is_flow_config, scales_noise

_LEAPFROG = {"timestep_power": 1.0, "clean_above": 4.0, "fitted_steps": None}
# Short names for `scheduler=`, with the settings that make a class the method of that name, also
# those at its defaults: the config may come from a scheduler of the same class with others.
SCHEDULERS: dict[str, tuple[str, dict[str, object]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpmsolver++": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    # First order is DDIM, without DDIMScheduler's guess of where a trailing step lands.
    "dpmsolver++1": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 1},
    ),
    "sde-dpmsolver++": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    ),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_order": 2}),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "leapfrog": ("LeapfrogScheduler", _LEAPFROG),
    "leapfrog-dense": ("LeapfrogScheduler", {**_LEAPFROG, "timestep_power": 1.5}),
    "pfdiff": ("LeapfrogScheduler", {**_LEAPFROG, "clean_above": 1e9}),
}
# What a short name means for a model trained by flow matching, where that is another class; DDIM's
# step is Euler's there (Gao et al. 2024).
_OF_FLOWS: dict[str, tuple[str, dict[str, object]]] = {
    "DDIMScheduler": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": False}),
    "EulerDiscreteScheduler": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": False}),
    "HeunDiscreteScheduler": ("FlowMatchHeunDiscreteScheduler", {}),
    "LCMScheduler": ("FlowMatchLCMScheduler", {}),
    "LeapfrogScheduler": ("FlowMatchLeapfrogScheduler", {}),
}
# What pipelines compute a dynamic shift from, whatever the scheduler's class.
_SHIFTING = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
# Of diffusers 0.42's for flows those whose last step has no length.
_UNFINISHED = ("DEISMultistepScheduler", "SASolverScheduler")
_OWN = {each.__name__: each for each in (LeapfrogScheduler, FlowMatchLeapfrogScheduler)}
_OF_CLASS = {"timestep_spacing"}  # options whose default is the class's own


def make_scheduler(name: str, config: dict[str, object]) -> object:
    """Make a scheduler from its short name or diffusers class name and a scheduler's config.

    Where the config is of a model trained by flow matching, so is the scheduler: "ddim" is Euler
    there, "leapfrog" `FlowMatchLeapfrogScheduler`.

    Raises:
        ValueError: If the name is unknown, or not for that model; the message lists those that are.
    """
    flow = is_flow_config(config)
    known, options = _find_class(name, flow)
    if known is None:
        raise ValueError(
            f"scheduler={name!r} is unknown; use one of {sorted(SCHEDULERS)} or the name of a "
            "diffusers scheduler class."
        )
    if obstacle := flow_obstacle(name, config):
        names = sorted(each for each in SCHEDULERS if flow_obstacle(each, config) is None)
        raise ValueError(f"scheduler={name!r} {obstacle}; use one of {names}.")
    if flow:
        return _make_for_flow(known, config, options)
    # Of settings left at a class's defaults diffusers would take the new class's defaults instead:
    # Heun would get Stable Diffusion's noise schedule in place of DDPM's. Only where timesteps lie
    # is for the new class to say, unless the pipeline's author did.
    unset = {"_use_default_values", *_OF_CLASS.intersection(config.get("_use_default_values", ()))}
    config = {key: value for key, value in config.items() if key not in unset}
    if config.get("thresholding") and "thresholding" not in inspect.signature(known).parameters:
        warnings.warn(
            f"scheduler={name!r} has no thresholding, which the pipeline's scheduler has and its "
            "model may need under strong guidance; use ddim, ddpm, dpmsolver++, unipc or deis.",
            stacklevel=3,
        )
    # DDIM's and DDPM's default, for pixels, would cut off latents.
    if "clip_sample" not in config and "clip_sample" in inspect.signature(known).parameters:
        options = {"clip_sample": False, **options}
    return known.from_config(config, **options)


def _find_class(name: str, flow: bool) -> tuple[type | None, dict[str, object]]:
    """Find the class that a name means, and the settings that make it that method."""
    class_name, options = SCHEDULERS.get(name.lower(), (name, {}))
    if flow and name.lower() in SCHEDULERS:
        class_name, more = _OF_FLOWS.get(class_name, (class_name, {}))
        options = options | more
    known = _OWN.get(class_name) or getattr(diffusers, class_name, None)
    return (known if class_name.endswith("Scheduler") else None), options


def flow_obstacle(name: str, config: Mapping[str, object]) -> str | None:
    """Tell why a scheduler is not for a model that was trained by flow matching.

    Args:
        name: One that `make_scheduler` knows.
        config: Of a scheduler of the model's.

    Returns:
        The reason; None if there is none, as for every other model.
    """
    if not is_flow_config(config):
        return None
    known, _ = _find_class(name, flow=True)
    taken = inspect.signature(known).parameters
    if not (known.__name__.startswith("FlowMatch") or "use_flow_sigmas" in taken):
        return "is not for models trained by flow matching"
    if known.__name__ in _UNFINISHED:
        return "stops before a flow's end in diffusers, where noise is left"
    words = [word for word in ("invert_sigmas", "shift_terminal") if config.get(word)]
    ignored = [word for word in words if word not in taken]
    if config.get("use_dynamic_shifting"):
        if "mu" not in inspect.signature(known.set_timesteps).parameters:
            ignored.append("use_dynamic_shifting")
        is_linear = config.get("time_shift_type", "exponential") != "exponential"
        if is_linear and "use_flow_sigmas" in taken and not hasattr(known, "time_shift"):
            ignored.append("time_shift_type")
    return f"is not for noise levels with {', '.join(ignored)}" if ignored else None


def _make_for_flow(
    known: type, config: dict[str, object], options: dict[str, object]
) -> SchedulerMixin:
    """Make a scheduler, saying in its class's own words that it is for a flow, and the shift."""
    taken = inspect.signature(known).parameters
    words = ["shift", "flow_shift"]
    if config.get("use_flow_sigmas") and not str(config.get("_class_name")).startswith("FlowMatch"):
        words.reverse()  # `from_config` keeps the other word from the scheduler before
    shift = next((config[word] for word in words if word in config), 1.0)
    settings = {name: config[name] for name in config if name in taken or name in _SHIFTING}
    if "use_flow_sigmas" in taken:
        settings |= {"prediction_type": "flow_prediction", "flow_shift": shift}
        if not config.get("use_flow_sigmas"):  # else their author's; they go by betas here
            spacings = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
            settings |= {name: False for name in spacings if name in taken}
        settings["use_flow_sigmas"] = True
    else:
        settings["shift"] = shift
    return remake(known, settings | options)


def remake(kind: type, config: Mapping[str, object]) -> SchedulerMixin:
    """Make a scheduler of what its class takes of a config.

    The rest is kept beside, for pipelines that read it, without the warning of `from_config`.
    """
    config = {name: value for name, value in config.items() if name[0] != "_"}
    taken = inspect.signature(kind).parameters
    scheduler = kind(**{name: value for name, value in config.items() if name in taken})
    scheduler.register_to_config(**{k: v for k, v in config.items() if k not in taken})
    return scheduler


def check_scheduler(pipe: DiffusionPipeline, scheduler: object) -> None:
    """Refuse what draws wrong: a scheduler for flows where there are alphas, or of another loop.

    Diffusers' `DDPMPipeline` neither scales its input nor takes steps without a generator, its
    `DDIMPipeline` hands to each step what DDIM's alone take. Other noise levels than those of the
    pipeline's own scheduler are warned of: they mostly are a mistake, but AnimateDiff's motion
    modules, for example, were trained on others.
    """
    flows = is_flow(pipe.scheduler), is_flow(scheduler)
    other = pipe.scheduler if flows[1] else scheduler  # EDM's path, say, is neither
    if flows[0] != flows[1] and hasattr(other, "alphas_cumprod"):
        trained, others = "with a noise schedule of alphas", "a scheduler that has one"
        if flows[0]:
            trained = "by flow matching"
            others = "a FlowMatch... scheduler, or one made with use_flow_sigmas=True"
        raise ValueError(
            f"scheduler {type(scheduler).__name__} is not for {type(pipe).__name__}, whose model "
            f"was trained {trained} ({type(pipe.scheduler).__name__}); use {others}."
        )
    if not any(flows) and _have_other_noise(pipe.scheduler, scheduler):
        warnings.warn(
            f"scheduler {type(scheduler).__name__} has other noise levels than the pipeline's "
            f"{type(pipe.scheduler).__name__}, with which its model is likely to have been "
            "trained; if that is not meant, give a name, such as scheduler='heun', which makes one "
            "of these levels (`from_config` drops what was left at its default).",
            stacklevel=3,
        )
    taken = inspect.signature(scheduler.step).parameters
    if isinstance(pipe, DDIMPipeline) and "use_clipped_model_output" not in taken:
        raise ValueError(
            f"scheduler {type(scheduler).__name__} does not work in diffusers' "
            f"{type(pipe).__name__}, which calls the steps of ddim alone; use ddim, or make a "
            "DDPMPipeline(pipe.unet, pipe.scheduler) of it first."
        )
    if isinstance(pipe, DDPMPipeline) and (scales_noise(scheduler) or "generator" not in taken):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} does not work in diffusers' "
            f"{type(pipe).__name__}, which neither scales its input nor calls a step without a "
            "generator; use leapfrog, ddim, ddpm, dpmsolver++, dpmsolver++1, sde-dpmsolver++ or "
            "lcm."
        )


def _have_other_noise(*schedulers: object) -> bool:
    """Tell whether of two schedulers, neither for flows, each noises timesteps in its own way.

    Whether signal is left at the last timestep (`rescale_betas_zero_snr`) is for users to say.
    """
    tables = [getattr(each, "alphas_cumprod", None) for each in schedulers]
    unknown = [type(each) for each, table in zip(schedulers, tables, strict=True) if table is None]
    if unknown:
        # Diffusers' without a table go by sigmas of their own, as EDM's; a user's may do anything.
        return len(unknown) == 1 and unknown[0].__module__.startswith("diffusers.")
    one, other = map(_without_signal_at_the_end, tables)
    return one.shape != other.shape or bool((one - other).abs().max() > 1e-3)


def _without_signal_at_the_end(alphas_cumprod: Tensor) -> Tensor:
    """Give alphas, (T,), as `rescale_betas_zero_snr` makes them (Lin et al. 2024, Algorithm 1)."""
    alphas = torch.as_tensor(alphas_cumprod).cpu().double().sqrt()
    return (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
