"""Progressive training: a Dot with a down block fewer first, which then grows by one.

Ske2Grid's progressive learning (Cai et al., ICML 2023, arXiv 2308.07571) trains on one grid, adds a
stage, freezes the earlier ones and trains by the whole schedule again. Here a stage is a pair of
Dot's extra blocks, and each new one lies within those that are there. Other than in Ske2Grid's
nested grids, Dash's layers then see another resolution, so that a Dot that was just grown does not
begin with what it knew before.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from morse.dot import MorseDot
from morse.training.config import TrainDotConfig

FIRST_STAGE = "first_stage"
# What names hold of the parts that change nothing at first: the projection of guided estimates is
# zero, learned up-samplers copy.
_ADDABLE = ("guidance_embedding.", ".upsample.")


def first_stage(config: TrainDotConfig) -> TrainDotConfig:
    """Give the settings of the training before, in a folder of its own."""
    widths = config.block_out_channels
    return replace(
        config,
        output_dir=config.output_dir / FIRST_STAGE,
        num_down_blocks=config.num_down_blocks - 1,
        block_out_channels=None if widths is None else widths[:-1],
        max_train_steps=config.progressive_steps,
        progressive_steps=0,
        fit_gate=False,
        resume_from_checkpoint="latest",
    )


def second_stage(config: TrainDotConfig, seconds: float | None) -> TrainDotConfig:
    """Give the settings of the training after the first stage, with the seconds that are left.

    Convolutions were annealed in that one; see `morse.training.convolutions.annealing_steps`.
    """
    return replace(
        config,
        init_from=config.output_dir / FIRST_STAGE,
        conv_annealing_steps=None,
        max_train_seconds=seconds,
    )


def start_from(dot: MorseDot, start: MorseDot) -> None:
    """Give `dot` the weights of another; one with a down block fewer is grown, see `grow`.

    A Dot with history, with learned up-samplers or of guided estimates may start from one without:
    what is new then changes nothing at first.

    Raises:
        ValueError: If the two differ in more than that.
    """
    if start.config.num_down_blocks == dot.config.num_down_blocks - 1:
        grow(dot, start)
        return
    added = dot.config.history * dot.config.output_channels
    weights = widen_inputs(start.state_dict(), dot.conv_in.in_channels, added)
    own = dot.state_dict()
    weights = _with_added_parts(own, weights)
    unlike = [name for name in own | weights if not _fits(own.get(name), weights.get(name))]
    if unlike:
        raise ValueError(
            f"init_from is a Dot of another network, in {min(unlike)!r} among others: give the "
            "pipeline and the resolution that it was trained for."
        )
    dot.load_state_dict(weights)


def widen_inputs(weights: dict[str, Tensor], channels: int, added: int) -> dict[str, Tensor]:
    """Let the first layer of a Dot without history take `added` channels more, with zero weights.

    Args:
        weights: Its state dict; other ones, of wider Dots too, are given back as they are.
        channels: Input channels wanted, the added ones last.
        added: How many of them are for history.
    """
    weight = weights["conv_in.weight"]
    if not added or weight.shape[1] != channels - added:
        return weights
    more = weight.new_zeros(len(weight), added, *weight.shape[2:])
    return {**weights, "conv_in.weight": torch.cat([weight, more], dim=1)}


def _with_added_parts(own: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Complete the weights that are given with those of a new Dot's parts that they all lack."""
    if any(name.startswith(_ADDABLE[0]) for name in given.keys() - own.keys()):
        raise ValueError(
            "init_from is a Dot of guided estimates, but guidance is 'branches'; give "
            "--guidance guided."
        )
    for part in _ADDABLE:
        added = {name: value for name, value in own.items() if part in name}
        given = given if added.keys() & given.keys() else added | given
    return given


def grow(dot: MorseDot, start: MorseDot) -> None:
    """Put the blocks of `start` around the innermost pair of `dot`, and freeze them.

    Frozen is what `start` brings, but for the LoRA, which learns on. Trained from the beginning are
    the new pair and, unless `block_out_channels` ends with Dash's own width, the two convolutions
    of the old blocks next to it, which had as many channels as Dash's layers there.

    Raises:
        ValueError: If the two differ in more than that.
    """
    own = dot.state_dict()
    given = {
        _moved(name): value
        for name, value in start.state_dict().items()
        if not name.startswith("mixture.")  # of the data, which is set apart
    }
    kept = {name: value for name, value in given.items() if _fits(own.get(name), value)}
    old_blocks = start.config.num_down_blocks
    inwards = (f"down_blocks.{old_blocks - 1}.downsampler.", "up_blocks.1.reduce.")
    others = [name for name in given.keys() - kept.keys() if not name.startswith(inwards)]
    if others:
        raise ValueError(
            f"init_from, or a first stage, is a Dot with num_down_blocks={old_blocks} that cannot "
            f"be grown: its {min(others)!r} has no counterpart of that shape. All settings but "
            "num_down_blocks and the last of block_out_channels must be those that it was trained "
            f"with.{_demand(dot.config)}"
        )
    dot.load_state_dict(own | kept)
    for name, parameter in dot.named_parameters():
        if name in kept and not name.startswith("lora."):
            parameter.requires_grad_(False)


def _demand(config: Mapping[str, object]) -> str:
    """Say what layers of the old blocks demand that depend on all blocks or on the picture."""
    if config["conv"] == "kernel_warehouse":
        return (
            " Banks of kernel_warehouse stay as they are only with --conv_options sharing=shapes "
            "and block_out_channels that end with Dash's own width, "
            f"{config['feature_channels']}, and have it nowhere else; or choose another --conv."
        )
    if config["conv"] == "gridconv" or config["resample"] == "ske2grid":
        multiple = config["patch_size"] * 2 ** config["num_down_blocks"]
        return (
            " Grids of gridconv and ske2grid stay as they are only for samples whose height and "
            f"width are multiples of {multiple}."
        )
    return ""


def _moved(name: str) -> str:
    """Name a layer as it is called with one more pair; up blocks count from the innermost."""
    return re.sub(r"^up_blocks\.(\d+)", lambda found: f"up_blocks.{int(found[1]) + 1}", name)


def _fits(own: Tensor | None, given: Tensor | None) -> bool:
    return own is not None and given is not None and own.shape == given.shape
