"""Between a Dot before its tuning and after: most of the gain, less of what was forgotten."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morse.training.pruned import prunable_weights

if TYPE_CHECKING:
    from morse.dot import MorseDot


def weights_before(dot: "MorseDot", blend_from: str | None) -> dict[str, Tensor]:
    """Give the weights that the change of a tuning is counted from.

    Args:
        dot: As it is before the tuning.
        blend_from: Folder or hub id of a like Dot whose weights count; those of `dot` if None.

    Raises:
        OSError: If there is no such Dot.
        ValueError: If the two have other weights, or weights of other shapes.
    """
    own = {name: value.clone() for name, value in _own_weights(dot).items()}
    if blend_from is None:
        return own
    from morse.dot import MorseDot
    from morse.dot.loading import loading_from

    with loading_from("blend_from", blend_from):
        other = MorseDot.from_pretrained(blend_from).to(dot.device)
    weights = _own_weights(other)
    shapes, wanted = ({n: v.shape for n, v in each.items()} for each in (weights, own))
    if shapes != wanted:
        unlike = sorted(n for n in shapes | wanted if shapes.get(n) != wanted.get(n))
        raise ValueError(
            f"blend_from is {blend_from!r}, whose network differs from the Dot that is tuned, in "
            f"{', '.join(unlike[:3])}; give the Dot that the tuning began with."
        )
    return weights


def _own_weights(dot: "MorseDot") -> dict[str, Tensor]:
    """Give what is trained; the mixture is of the data, and between two there is none."""
    return {k: v for k, v in dot.state_dict().items() if not k.startswith("mixture.")}


@torch.no_grad()
def blend(dot: "MorseDot", before: dict[str, Tensor], share: float) -> None:
    """Take back part of a change: each weight ends `share` of the way from `before` to its own.

    WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903), which keeps in between most of what a
    fine-tuning gains and most of what the network could do before.

    Args:
        dot: Changed in place; a pruned one's zeros stay.
        before: From `weights_before`.
        share: In [0, 1]; 1 changes nothing.
    """
    now = dot.state_dict()
    sparse = {name for name, _ in prunable_weights(dot)} if dot.config.sparse else ()

    def between(name: str, value: Tensor) -> Tensor:
        if name not in before or not value.is_floating_point():
            return value
        mixed = torch.lerp(before[name], value, share)
        return mixed.masked_fill(value == 0, 0) if name in sparse else mixed

    dot.load_state_dict({name: between(name, value) for name, value in now.items()})
