"""Schedulers by short names, made from a pipeline's own scheduler's config."""

import inspect
from collections.abc import Mapping

import diffusers
from diffusers import DDPMPipeline, DiffusionPipeline, SchedulerMixin

from morse.flow_leapfrog import FlowMatchLeapfrogScheduler
from morse.leapfrog import LeapfrogScheduler
from morse.rates import is_flow, is_flow_config

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
_OF_FLOWS = {
    "DDIMScheduler": "FlowMatchEulerDiscreteScheduler",
    "EulerDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler": "FlowMatchHeunDiscreteScheduler",
    "LCMScheduler": "FlowMatchLCMScheduler",
    "LeapfrogScheduler": "FlowMatchLeapfrogScheduler",
}
_OWN = {each.__name__: each for each in (LeapfrogScheduler, FlowMatchLeapfrogScheduler)}
_OF_CLASS = {"timestep_spacing"}  # options whose default is the class's own


def make_scheduler(name: str, config: dict[str, object]) -> object:
    """Make a scheduler from its short name or diffusers class name and a scheduler's config.

    Raises:
        ValueError: If the name is unknown, or not for flow matching though the config is; the
            message lists those that are.
    """
    class_name, options = SCHEDULERS.get(name.lower(), (name, {}))
    flow = is_flow_config(config)
    if flow and name.lower() in SCHEDULERS:
        class_name = _OF_FLOWS.get(class_name, class_name)
    known = _OWN.get(class_name) or getattr(diffusers, class_name, None)
    if not class_name.endswith("Scheduler") or known is None:
        raise ValueError(
            f"scheduler={name!r} is unknown; use one of {sorted(SCHEDULERS)} or the name of a "
            "diffusers scheduler class."
        )
    # Of settings left at a class's defaults diffusers would take the new class's defaults instead:
    # Heun would get Stable Diffusion's noise schedule in place of DDPM's. Only where timesteps lie
    # is for the new class to say, unless the pipeline's author did.
    unset = {"_use_default_values", *_OF_CLASS.intersection(config.get("_use_default_values", ()))}
    config = {key: value for key, value in config.items() if key not in unset}
    if not flow:
        return known.from_config(config, **options)
    if config.get("invert_sigmas") and known is FlowMatchLeapfrogScheduler:
        raise ValueError(
            f"scheduler={name!r} is not for a model whose noise levels rise (invert_sigmas)."
        )
    scheduler = _make_for_flow(known, config, options)
    if not is_flow(scheduler):
        names = sorted(each for each, (kind, _) in SCHEDULERS.items() if _is_for_flows(kind))
        raise ValueError(
            f"scheduler={name!r} is not for a model trained by flow matching; use one of {names}."
        )
    return scheduler


def _make_for_flow(
    known: type, config: dict[str, object], options: dict[str, object]
) -> SchedulerMixin:
    """Make a scheduler, saying in its class's own words that it is for a flow, and the shift."""
    shift = config.get("shift", config.get("flow_shift", 1.0))
    settings = {**config, "shift": shift, **options}
    if "use_flow_sigmas" in inspect.signature(known).parameters:
        settings |= {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "flow_shift": shift,
        }
    return remake(known, settings)


def remake(kind: type, config: Mapping[str, object]) -> SchedulerMixin:
    """Make a scheduler of what its class takes of a config.

    The rest is kept beside, without the warning of `from_config`: pipelines compute flow matching's
    dynamic shift from it.
    """
    config = {name: value for name, value in config.items() if name[0] != "_"}
    taken = inspect.signature(kind).parameters
    scheduler = kind(**{name: value for name, value in config.items() if name in taken})
    others = {name: value for name, value in config.items() if name not in taken}
    scheduler.register_to_config(
        **{name: value for name, value in others.items() if name not in _OF_CLASS}
    )
    return scheduler


def _is_for_flows(class_name: str) -> bool:
    return class_name in _OF_FLOWS or (
        "use_flow_sigmas" in inspect.signature(getattr(diffusers, class_name)).parameters
    )


def check_scheduler(pipe: DiffusionPipeline, scheduler: object) -> None:
    """Refuse what draws wrong: a scheduler of another noise path, or of another loop.

    Diffusers' `DDPMPipeline` neither scales its input nor takes steps without a generator.
    """
    if is_flow(pipe.scheduler) and hasattr(scheduler, "alphas_cumprod") and not is_flow(scheduler):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} is not for {type(pipe).__name__}, whose model "
            f"was trained by flow matching ({type(pipe.scheduler).__name__}); use a FlowMatch... "
            "scheduler, or one made with use_flow_sigmas=True."
        )
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    scaled = getattr(scheduler, "init_noise_sigma", 1) != 1  # flow matching's have no such number
    if isinstance(pipe, DDPMPipeline) and (scaled or not takes_generator):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} does not work in diffusers' "
            f"{type(pipe).__name__}, which neither scales its input nor calls a step without a "
            "generator; use leapfrog, ddim, ddpm, dpmsolver++, dpmsolver++1, sde-dpmsolver++ or "
            "lcm."
        )
