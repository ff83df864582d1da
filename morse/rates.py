"""How much signal and noise a pipeline's scheduler puts into what the denoiser gets.

Dash's latest estimate is turned into a base for Dot (`morse.spaces.rebase`) with these rates. They
are those of the denoiser's *input*: the Euler family keeps x_0 + sigma * epsilon but scales it, by
`scale_model_input`, back onto the variance-preserving path that the denoiser was trained on.
"""

import inspect
from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from morse.spaces import BaseSpace, Rates, check_base_space, signal_and_noise

Family = Literal["table", "scaled", "sigmas", "flow"]

# EDM's, consistency models' and IPNDM's schedulers take other paths: only "raw" is right for them.
_FAMILIES: dict[Family, tuple[str, ...]] = {
    "table": ("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "LCM", "TCD", "PNDM", "Leapfrog"),
    "scaled": (
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "HeunDiscrete",
        "KDPM2Discrete",
        "KDPM2AncestralDiscrete",
        "LMSDiscrete",
        "DPMSolverSDE",
    ),
    "sigmas": (
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "DEISMultistep",
        "UniPCMultistep",
        "SASolver",
    ),
    "flow": (
        "FlowMatchEulerDiscrete",
        "FlowMatchHeunDiscrete",
        "FlowMatchLCM",
        "FlowMatchLeapfrog",
    ),
}
_ALWAYS_STOCHASTIC = (
    "DDPM",
    "DDPMParallel",
    "LCM",
    "TCD",
    "EulerAncestralDiscrete",
    "KDPM2AncestralDiscrete",
    "DPMSolverSDE",
    "SASolver",
    "FlowMatchLCM",
    "CMStochasticIterative",
    "CogVideoXDPM",
    "CosineDPMSolverMultistep",
    "DDPMWuerstchen",
    "SCM",
    "UnCLIP",
)


def _short_name(scheduler: object) -> str:
    return type(scheduler).__name__.removesuffix("Scheduler")


def find_family(scheduler: object) -> Family | None:
    """Tell how a scheduler's rates are found; None where they are not known."""
    name = _short_name(scheduler)
    return next((family for family, names in _FAMILIES.items() if name in names), None)


def own_parameters(configured: object) -> Mapping[str, inspect.Parameter]:
    """Give the parameters that the class of something with a config takes, by name.

    The config itself may have more: `from_config` keeps those of the class that it came from.
    """
    return inspect.signature(type(configured)).parameters


def unusual_options(configured: object, names: Collection[str]) -> dict[str, object]:
    """Give those of some options of a config that are not as the class has them by default.

    Args:
        configured: A scheduler, or a network that has a config.
        names: Of the options; those that the class does not take are passed over.
    """
    return {
        name: configured.config[name]
        for name, parameter in own_parameters(configured).items()
        if name in names and configured.config[name] != parameter.default
    }


def _own_config(scheduler: object) -> dict[str, object]:
    """Give those options of a scheduler's config that its own class takes."""
    names = own_parameters(scheduler)
    return {name: value for name, value in scheduler.config.items() if name in names}


def is_flow(scheduler: object) -> bool:
    """Tell whether a scheduler is for models trained by flow matching."""
    flow_class = type(scheduler).__name__.startswith("FlowMatch")
    return flow_class or is_flow_config(_own_config(scheduler))


def is_flow_config(config: Mapping[str, object]) -> bool:
    """Tell whether a config is of such a scheduler."""
    flow_matching = "shift" in config and "beta_schedule" not in config  # FlowMatch...Scheduler's
    flow_prediction = config.get("prediction_type") == "flow_prediction"
    return flow_matching or flow_prediction or bool(config.get("use_flow_sigmas"))


def scales_noise(scheduler: object) -> bool:
    """Tell whether runs begin from scaled noise; flow matching's schedulers have no word for it."""
    return getattr(scheduler, "init_noise_sigma", 1) != 1


def always_adds_noise(scheduler: object) -> bool:
    """Tell whether a scheduler's class adds fresh noise at each step, whatever its settings."""
    return _short_name(scheduler) in _ALWAYS_STOCHASTIC


def adds_noise(scheduler: object, eta: float | None = None) -> bool:
    """Tell whether a scheduler adds fresh noise at each step, by its class and settings.

    `eta` is a pipeline call's, which goes to the steps that take it (DDIM's).
    """
    config = _own_config(scheduler)
    return (
        always_adds_noise(scheduler)
        or str(config.get("algorithm_type")).startswith("sde-")
        or bool(config.get("stochastic_sampling"))
        or bool(config.get("eta"))
        or (bool(eta) and "eta" in inspect.signature(scheduler.step).parameters)
    )


def choose_base_space(
    scheduler: object, wanted: BaseSpace | None, eta: float | None = None
) -> BaseSpace:
    """Decide in which space Dash's latest estimate is kept.

    Args:
        scheduler: The pipeline's scheduler.
        wanted: The Dot's `base_space`; None lets the scheduler decide: "x0" where fresh noise is
            added at each step, since Dash's epsilon is of noise that is gone by then, else "raw".
        eta: As for `adds_noise`.

    Raises:
        ValueError: If `wanted` is unknown, or the scheduler's rates are not known.
    """
    check_base_space(wanted)
    known = find_family(scheduler) is not None
    if wanted in ("x0", "v") and not known:
        raise ValueError(
            f"base_space={wanted!r} needs the signal and noise rates, which are not known for "
            f"{type(scheduler).__name__}; use another scheduler or a Dot with base_space='raw'."
        )
    return wanted or ("x0" if known and adds_noise(scheduler, eta) else "raw")


def prediction_type(scheduler: object) -> str:
    """Give what the scheduler takes the denoiser's output for."""
    if find_family(scheduler) == "flow":
        return "flow_prediction"
    return scheduler.config.prediction_type


def noise_rates(scheduler: object, index: int, timestep: Tensor, sample: Tensor) -> Rates:
    """Give alpha and sigma of the denoiser's input, x = alpha * x_0 + sigma * epsilon.

    Args:
        scheduler: One whose family is known.
        index: Where it stands, as from `morse.clock.scheduler_index`.
        timestep: What the denoiser was given, () or (B,).
        sample: What it was given, (B, ...).

    Returns:
        alpha and sigma, which broadcast to `sample`.
    """
    family = find_family(scheduler)
    if family == "table":
        return signal_and_noise(scheduler.alphas_cumprod, timestep, sample.float())
    if family == "scaled":
        # The pipeline has scaled its input just now; the same factor is alpha.
        alpha = scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep)
        return alpha, (1 - alpha**2).sqrt()
    sigma = scheduler.sigmas[index]
    if family == "flow" or scheduler.config.get("use_flow_sigmas"):
        return 1 - sigma, sigma
    alpha = 1 / (sigma**2 + 1).sqrt()
    return alpha, sigma * alpha
