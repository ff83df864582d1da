"""ScaleKD's teacher parameter perception: a student's features in the teacher's own layers.

Source: Fan, Li, Liu, Yao, "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers",
NeurIPS 2024, arXiv 2411.06786, and the authors' code.
"""

import inspect
from collections.abc import Callable
from typing import Self

from torch import Tensor, nn

from morse.distillation.functional import require

# Diffusers' names for what an encoder hands to its decoder, in UNets and in HunyuanDiT.
SKIP_ARGUMENTS = {"res_hidden_states_tuple", "skip"}


class TeacherParameterPerception(nn.Module):
    """Applies a teacher's remaining layers, frozen, to projected features of a student (TPP).

    Source: ScaleKD, Fan et al. 2024, arXiv 2411.06786. A module is frozen in place, put in eval
    mode and kept there: a trainer's `train()` does not wake its dropout. Gradients pass through it
    to the tokens. Another callable is used as it is.

    Args:
        stage: Turns tokens (B, L, C) into tokens (B, L', C').

    Raises:
        TypeError: If `stage` is not callable.
        ValueError: If it takes the skip connections of a UNet's encoder: the teacher's would give
            the answer away, and the student has none of their kind.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from morse.distillation import TeacherParameterPerception
        >>> tpp = TeacherParameterPerception(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
        >>> tokens = torch.ones(1, 3, 4, requires_grad=True)
        >>> tpp.train()(tokens).sum().backward()
        >>> tpp.stage.training, tokens.grad is not None, tpp.stage[0].weight.grad
        (False, True, None)
    """

    def __init__(self, stage: Callable[..., Tensor]) -> None:
        """Freeze the stage."""
        super().__init__()
        if not callable(stage):
            raise TypeError(f"stage must be callable, got {type(stage).__name__}.")
        called = stage.forward if isinstance(stage, nn.Module) else stage
        skips = ", ".join(SKIP_ARGUMENTS & _argument_names(called))
        require(
            not skips, f"stage takes {skips}; choose layers of the teacher without skip inputs."
        )
        self.stage = stage
        if isinstance(stage, nn.Module):
            stage.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module, but leave the stage in eval mode."""
        super().train(mode)
        if isinstance(self.stage, nn.Module):
            self.stage.eval()
        return self

    def forward(self, tokens: Tensor, **kwargs: object) -> Tensor:
        """Apply the stage to tokens (B, L, C), with what else it takes, such as embeddings."""
        # A teacher that holds the stage, or parts of it, wakes them with its own train().
        if isinstance(self.stage, nn.Module) and any(m.training for m in self.stage.modules()):
            self.stage.eval()
        return self.stage(tokens, **kwargs)


def _argument_names(called: Callable[..., Tensor]) -> set[str]:
    try:
        return set(inspect.signature(called).parameters)
    except (TypeError, ValueError):  # of a callable written in C
        return set()
