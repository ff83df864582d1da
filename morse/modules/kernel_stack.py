"""Modules whose parameter is a stack of convolution kernels, one dimension more than a kernel."""

from collections.abc import Callable

from torch import Tensor, nn


class KernelStack(nn.Module):
    """A module whose stacks of 2-d kernels, five-dimensional, take `memory_format=channels_last`.

    The format is then that of each kernel in the stack.
    """

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def apply(tensor: Tensor) -> Tensor:
            if tensor.dim() != 5:
                return function(tensor)
            return function(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2])

        return super()._apply(apply, recurse)
