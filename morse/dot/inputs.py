"""What goes into Dot's first layer."""

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
