"""Classifier-free guidance (Ho and Salimans 2022) in training: conditions and branches.

A denoiser under guidance is evaluated for two branches, the negative one first. Outputs keep a
branch dimension, (B, G, C, H, W), where G is 1 without guidance; for the denoiser every branch is a
row of its own, (B * G, C, H, W).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


def guide(outputs: Tensor, guidance_scale: Tensor | None) -> Tensor:
    """Combine the branches of (B, G, ...) into the guided estimate, (B, ...).

    Args:
        outputs: negative and positive branch where `guidance_scale` is given, else one branch; also
            one that is guided already, as Dots of guided estimates give it.
        guidance_scale: (B,), or None; 1 is the positive branch.
    """
    if guidance_scale is None or outputs.shape[1] == 1:
        return outputs[:, 0]
    negative, positive = outputs.unbind(1)
    scale = guidance_scale.reshape(-1, *(1,) * (positive.ndim - 1))
    return negative + scale * (positive - negative)


def each_branch(values: Tensor, branches: int) -> Tensor:
    """Repeat the rows of (B, ...) for every branch, (B * branches, ...)."""
    return values if branches == 1 else values.repeat_interleave(branches, dim=0)


@dataclass(frozen=True)
class Conditions:
    """What a denoiser takes besides sample and timestep, for a batch of B.

    Attributes:
        positive: Arguments of its forward method, (B, ...) each; a name such as
            "added_cond_kwargs.text_embeds" goes into the dictionary argument before the dot.
        negative: The same of the negative branch, (1, ...) each; not used without guidance.
        guidance_scale: (B,), or None without guidance.
    """

    positive: dict[str, Tensor] = field(default_factory=dict)
    negative: dict[str, Tensor] = field(default_factory=dict)
    guidance_scale: Tensor | None = None

    @property
    def branches(self) -> int:
        """G, the denoiser's rows for each sample."""
        return 1 if self.guidance_scale is None else 2

    @property
    def of_one_branch(self) -> "Conditions":
        """Give those of the positive branch alone."""
        return Conditions(self.positive)

    def take(self, rows: Tensor) -> "Conditions":
        """Choose rows, (N,), also repeatedly."""
        return Conditions(
            {name: value[rows] for name, value in self.positive.items()},
            self.negative,
            None if self.guidance_scale is None else self.guidance_scale[rows],
        )

    def flat_inputs(self) -> dict[str, Tensor]:
        """Give the arguments with a row for each branch, (B * G, ...), dotted names as they are."""
        # Kept in half precision, of which autocast on a CPU refuses to stack.
        positive, negative = _full_precision(self.positive), _full_precision(self.negative)
        if self.guidance_scale is None:
            return positive
        return {
            name: torch.stack([negative[name].expand_as(value), value], 1).flatten(0, 1)
            for name, value in positive.items()
        }

    def inputs(self) -> dict[str, object]:
        """Give the keyword arguments of the denoiser's forward method for its B * G rows."""
        return nest(self.flat_inputs())


def _full_precision(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def nest(flat: dict[str, Tensor]) -> dict[str, object]:
    """Turn dotted names into dictionaries."""
    nested: dict[str, object] = {}
    for name, value in flat.items():
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[name] = value
    return nested


UNCONDITIONAL = Conditions()


def draw_guidance_scale(
    batch_size: int, bounds: tuple[float, float], generator: torch.Generator
) -> Tensor | None:
    """Draw scales uniformly between two bounds, (batch_size,); None where the upper one is 1."""
    low, high = bounds
    if high == 1:
        return None
    uniform = torch.rand(batch_size, generator=generator, device=generator.device)
    return low + (high - low) * uniform
