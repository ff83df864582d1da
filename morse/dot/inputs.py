"""What goes into Dot's first layer, and how a plain Dot becomes one that sees more."""

import torch
from torch import Tensor

from morse.sampling import JumpPoint


def input_channels(sample: int, output: int, independent: bool, history: int) -> int:
    """Count the channels of `dot_inputs` for samples and estimates of so many."""
    return sample if independent else 2 * sample + (1 + history) * output


def dot_inputs(sample: Tensor, jump: JumpPoint, history: int) -> list[Tensor]:
    """List x_ti, x_ts and z_ts, and with history what the line through two estimates adds.

    That is zero where there is no line, so that Dot's first layer then does what it does without.
    """
    inputs = [sample, jump.sample, jump.model_output]
    if history:
        trend = jump.trend
        inputs.append(torch.zeros_like(jump.model_output) if trend is None else trend)
    return inputs


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
