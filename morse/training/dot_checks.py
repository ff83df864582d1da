"""Checks of train_dot's settings: ranges, and what does not go together."""

import warnings
from typing import TYPE_CHECKING

from morse.dot.conv_settings import conv_settings
from morse.dot.guidance import check_dot_guidance
from morse.dot.ports import describe_layers
from morse.history import check_history
from morse.settings import changed, require, require_least, require_places, require_positive
from morse.training.common import check_frozen_dtype
from morse.training.convolutions import annealing_steps, parse_conv_options
from morse.training.distillation_terms import check_distill
from morse.training.pruning import check_prune_settings
from morse.training.windows import most_points

if TYPE_CHECKING:
    from morse.training.config import TrainDotConfig
    from morse.training.frozen import FrozenPipeline

_LEAST = {
    "window_steps": 1,
    "pairs_per_window": 1,
    "layers_per_block": 1,
    "validation_images": 1,
    "validation_steps": 0,
    "cache_pairs": 1,
    "progressive_steps": 0,
    "conv_annealing_steps": 0,
}


def check_dot_settings(config: "TrainDotConfig") -> None:
    """Raise `ValueError`, naming setting, value and way out, unless all of them can be used."""
    require_least(config, _LEAST)
    require_places(config, kept=["cache_dir"])
    check_frozen_dtype(config.dtype, config.mixed_precision)
    _check_lora(config)
    check_prune_settings(config)
    _check_progressive(config)
    _check_gate(config)
    _check_conditions(config)
    _check_relay(config)
    _check_distillation(config)
    check_history(config.history, config.extrapolation_cap, config.independent)
    check_dot_guidance(config.guidance, config.independent)
    if config.history and (config.on_policy or config.window_steps < 2):
        raise ValueError(
            f"history is {config.history}, which needs windows of 2 steps or more made by Dash, "
            f"but window_steps is {config.window_steps} and on_policy is {config.on_policy}; with "
            "5 steps the segments of most plans fit in"
        )
    _check_convolutions(config)
    if config.cuda_graphs and (config.compile or config.on_policy):
        raise ValueError("cuda_graphs is True and so is compile or on_policy; choose one")
    if config.cuda_graphs and config.gradient_accumulation_steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps is {config.gradient_accumulation_steps}, but the replay "
            "of cuda_graphs overwrites gradients not applied yet; leave one of them out"
        )
    if config.on_policy and (config.cache_pairs or config.window_steps == 1):
        raise ValueError(
            f"on_policy needs fresh windows of several steps, but cache_pairs is "
            f"{config.cache_pairs} and window_steps is {config.window_steps}"
        )
    _check_caches(config)


def _check_lora(config: "TrainDotConfig") -> None:
    require_positive(config, ("lora_alpha",))
    if config.lora_alpha is not None and not config.lora_rank:
        raise ValueError(
            f"lora_alpha is {config.lora_alpha:g} and lora_rank is 0, with which there is no LoRA "
            "to scale; leave --lora_alpha out, or give a --lora_rank"
        )


def check_size(config: "TrainDotConfig", pipeline: "FrozenPipeline") -> None:
    """Raise `ValueError` unless Dot's blocks can halve the pipeline's samples."""
    side = pipeline.sample_size[0]
    multiple = describe_layers(pipeline.dash.model, config.num_down_blocks)["size_multiple"]
    if side % multiple == 0:
        return
    pixels = multiple * (pipeline.resolution // side)
    nearest = max(1, round(pipeline.resolution / pixels)) * pixels
    fewer = ", or fewer --num_down_blocks" if config.num_down_blocks > 1 else ""
    raise ValueError(
        f"resolution is {pipeline.resolution}, but a Dot with num_down_blocks "
        f"{config.num_down_blocks} needs images whose height and width are multiples of {pixels} "
        f"here: give --resolution {nearest}{fewer}."
    )


def check_window_steps(config: "TrainDotConfig", pipeline: "FrozenPipeline") -> None:
    """Raise `ValueError` unless windows fit into the noise schedule, or the grids of plans."""
    most = most_points(config.timestep_sampling, len(pipeline.dash.schedule)) - 1
    allowed = f"{most} or less with timestep_sampling {config.timestep_sampling!r} here"
    require(config.window_steps <= most, "window_steps", config.window_steps, allowed)


def _check_caches(config: "TrainDotConfig") -> None:
    if config.cache_latents and config.cache_pairs:
        raise ValueError(
            "cache_latents is True and cache_pairs is given, which holds latents already; "
            "choose one"
        )
    if config.cache_dir is not None and not (config.cache_latents or config.cache_pairs):
        raise ValueError(
            f"cache_dir is {config.cache_dir}, but nothing is kept there; give --cache_pairs or "
            "--cache_latents too, or leave --cache_dir out"
        )


def _check_relay(config: "TrainDotConfig") -> None:
    if config.norm != "dnr":
        return
    if config.window_steps == 1:
        raise ValueError(
            "norm is 'dnr' and window_steps is 1, but a relay from one Dot step to the next is "
            "learnt from windows of several: give --window_steps 2 or more, such as 3."
        )
    if config.pairs_per_window > 1:
        raise ValueError(
            f"norm is 'dnr' and pairs_per_window is {config.pairs_per_window}, but it learns "
            "from all steps of a window, in order: leave --pairs_per_window out."
        )
    for name in ("cuda_graphs", "distill", "history"):
        if getattr(config, name):
            raise ValueError(
                f"norm is 'dnr' and {name} is {getattr(config, name)}, but {name} works on "
                f"single pairs, not on sequences of them: leave --{name} out."
            )


def _check_progressive(config: "TrainDotConfig") -> None:
    steps = config.progressive_steps
    if steps and (config.num_down_blocks == 1 or config.prune is not None):
        raise ValueError(
            f"progressive_steps is {steps}, which needs num_down_blocks of 2 or 3 and no prune,"
            f" but they are {config.num_down_blocks} and {config.prune}"
        )


def _check_gate(config: "TrainDotConfig") -> None:
    if config.fit_gate and (config.independent or config.norm == "dnr"):
        raise ValueError(
            f"fit_gate is True, which needs residuals of single pairs, but independent is "
            f"{config.independent} and norm is {config.norm!r}; leave --fit_gate out"
        )


def _check_conditions(config: "TrainDotConfig") -> None:
    scale = config.guidance_scale
    require(
        scale is None or (len(scale) == 2 and 1 <= scale[0] <= scale[1]),
        "guidance_scale",
        scale,
        "two numbers LOW HIGH with 1 <= LOW <= HIGH",
    )
    if config.caption_column is not None and config.class_names is not None:
        raise ValueError(
            f"caption_column is {config.caption_column!r} and class_names is "
            f"{config.class_names}; give one of the two"
        )


def _check_distillation(config: "TrainDotConfig") -> None:
    if not config.distill:
        if changed(config, ("distill_weight",)):
            raise ValueError(
                f"distill_weight is {config.distill_weight}, but distill is not given; give "
                "--distill too, or leave --distill_weight out"
            )
        return
    check_distill(config.distill, config.distill_weight)
    if config.prune is not None:
        raise ValueError(
            f"distill is {config.distill} and prune is {config.prune}; distill first, then prune "
            "the result with init_from"
        )
    if config.compile or config.cuda_graphs:
        raise ValueError(
            f"distill is {config.distill}, whose features are read with hooks, and so can "
            "neither be compiled nor captured; leave compile and cuda_graphs out"
        )
    if config.conv != "conv":
        raise ValueError(
            f"distill is {config.distill} and conv is {config.conv!r}, which was not tried; "
            "choose one"
        )


def _check_convolutions(config: "TrainDotConfig") -> None:
    steps = config.conv_annealing_steps
    settings = conv_settings(config.conv, parse_conv_options(config.conv_options))
    if settings is None and steps is not None:
        raise ValueError(
            f"conv_annealing_steps is {steps}, but conv is 'conv', a plain convolution without "
            "a temperature; choose another conv or leave it out"
        )
    # A first stage is annealed; it has no progressive_steps itself, and is told the same once.
    updates = config.progressive_steps or config.max_train_steps
    if steps is not None and steps > updates:
        warnings.warn(
            f"conv_annealing_steps is {steps}, but training (with progressive_steps its first "
            f"stage) ends after {updates} updates, before the temperature that the saved Dot runs "
            "at: set a lower conv_annealing_steps, or train for longer",
            stacklevel=2,
        )
    if config.prune is not None and config.conv in ("odconv", "kernel_warehouse"):
        raise ValueError(
            f"prune is {config.prune} and conv is {config.conv!r}, whose kernels cannot be pruned; "
            "choose --conv conv or gridconv, or leave --prune out"
        )
    if (
        config.cuda_graphs
        and config.conv in ("odconv", "kernel_warehouse")
        and annealing_steps(config)
    ):
        raise ValueError(
            f"cuda_graphs is True and conv is {config.conv!r}, whose temperature a graph would "
            "keep as it was at the first update; choose one, or set conv_annealing_steps to 0"
        )
