"""Pruned Dots in a training that prunes nothing: what is zero stays zero."""

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from morse.dot.inputs import widen_inputs
from morse.training.pruning import KEPT

if TYPE_CHECKING:
    from morse.dot import MorseDot


def keep_zeros(dot: "MorseDot", start: "MorseDot") -> None:
    """Hold a pruned Dot's zeros while it trains on without a pruner.

    No gradient reaches them, so that AdamW and moving averages leave them as they are. What `dot`
    has beyond `start` learns, also from zero.

    Args:
        dot: The Dot in training, which has begun as `start`.
        start: The pruned Dot, which may be the same; for one that is not `sparse` nothing is done.
    """
    if not start.config.sparse:
        return
    zeros = {name: value == 0 for name, value in start.state_dict().items()}
    width = dot.conv_in.in_channels
    zeros = widen_inputs(zeros, width, width - start.conv_in.in_channels)
    for name, layer in dot.named_modules():
        pruned = zeros.get(f"{name}.weight")
        if pruned is None or name in KEPT or not isinstance(layer, nn.Linear | _ConvNd):
            continue
        weight = layer.weight
        if weight.requires_grad and weight.shape == pruned.shape:
            # A grown Dot's new block bears the name of an old one, but is not zero.
            pruned = pruned.to(weight.device) & (weight == 0)
            weight.register_hook(partial(Tensor.masked_fill, mask=pruned, value=0))
