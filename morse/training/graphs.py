"""CUDA graphs for training: kernels of a small network are replayed, not launched one by one."""

import torch
from torch import Tensor, nn

from morse.dot import MorseDot
from morse.sampling import JumpPoint
from morse.training.guidance import nest
from morse.training.pairs import Pairs


class _OnPairs(nn.Module):
    """A Dot whose arguments are all tensors, as graphs need them."""

    def __init__(self, dot: MorseDot, condition_names: tuple[str, ...]) -> None:
        super().__init__()
        self.dot = dot
        self.condition_names = condition_names

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        jump_sample: Tensor,
        jump_timestep: Tensor,
        jump_output: Tensor,
        *more: Tensor,
    ) -> Tensor:
        # Not `self.dot(...)`, which accelerate wraps in an autocast that caches weights.
        left = list(more)
        trend = left.pop(0) if self.dot.history else None
        scale = left.pop(0) if self.dot.guidance == "guided" else None
        jump = JumpPoint(jump_sample, jump_timestep, jump_output, trend=trend, guidance_scale=scale)
        inputs = nest(dict(zip(self.condition_names, left, strict=True)))
        return MorseDot.forward(self.dot, sample, timestep, jump, **inputs)


def _tensors(pairs: Pairs) -> tuple[Tensor, ...]:
    jump = pairs.jump
    conditions = pairs.conditions.flat_inputs().values()
    return (
        *(pairs.sample, pairs.timestep, jump.sample, jump.timestep, jump.model_output),
        *(each for each in (jump.trend, jump.guidance_scale) if each is not None),
        *conditions,
    )


class GraphedDot:
    """Dot's forward and backward passes as CUDA graphs, captured at the first call.

    Later calls must bring pairs of the same shape; gradients arrive at Dot's parameters as ever.

    Args:
        dot: The network, on a CUDA device.

    Raises:
        ValueError: If it is on another device, or wrapped for several processes.
    """

    def __init__(self, dot: MorseDot) -> None:
        """Remember the network."""
        if not isinstance(dot, MorseDot):
            raise ValueError(
                f"cuda_graphs takes a Dot as it is, but this one is in a {type(dot).__name__}; "
                "train in one process"
            )
        if dot.device.type != "cuda":
            raise ValueError(f"cuda_graphs needs a CUDA device, and training runs on {dot.device}")
        self.dot = dot
        self._graphed: nn.Module | None = None

    def residual(self, pairs: Pairs) -> Tensor:
        """Predict the residuals of `pairs`, a row for each branch."""
        if self._graphed is None:
            dtype = torch.get_autocast_dtype("cuda")
            enabled = torch.is_autocast_enabled("cuda")
            with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
                example = tuple(tensor.clone() for tensor in _tensors(pairs))
                on_pairs = _OnPairs(self.dot, tuple(pairs.conditions.flat_inputs()))
                self._graphed = torch.cuda.make_graphed_callables(on_pairs, example)
        return self._graphed(*_tensors(pairs))
