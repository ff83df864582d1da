"""Pruned Dots where nothing is pruned: what is zero stays zero."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from morse.training.progressive import widen_inputs
from morse.training.pruning import KEPT

if TYPE_CHECKING:
    from morse.dot import MorseDot


def prunable_weights(dot: "MorseDot") -> Iterator[tuple[str, nn.Parameter]]:
    """Give the weights that pruning may set to zero, by name."""
    for name, layer in dot.named_modules():
        if name not in KEPT and isinstance(layer, nn.Linear | _ConvNd):
            yield f"{name}.weight", layer.weight


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
    for name, weight in prunable_weights(dot):
        pruned = zeros.get(name)
        if pruned is not None and weight.requires_grad and weight.shape == pruned.shape:
            # A grown Dot's new block bears the name of an old one, but is not zero.
            pruned = pruned.to(weight.device) & (weight == 0)
            weight.register_hook(partial(Tensor.masked_fill, mask=pruned, value=0))
