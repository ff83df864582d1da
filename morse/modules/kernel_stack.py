"""What layers share whose parameter is a stack of convolution kernels, or a bank of their cells."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

Size = int | tuple[int, ...]


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


def kaiming_(weight: Tensor) -> None:
    """Draw a kernel, a matrix or cells as the authors of these layers do."""
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def convolve(x: Tensor, kernels: Tensor, place: tuple[Size, Size, Size], groups: int) -> Tensor:
    """Convolve each sample with its own kernel, as more groups, or all with one.

    Args:
        x: (B, I, positions...) on one to three axes.
        kernels: (B or 1, O, I/groups, taps...).
        place: Stride, padding and dilation.
        groups: Of one kernel.
    """
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[x.dim() - 3]
    if len(kernels) == 1:
        return function(x, kernels[0], None, *place, groups)
    folded = x.reshape(1, -1, *x.shape[2:])
    y = function(folded, kernels.flatten(0, 1), None, *place, groups * len(x))
    return y.view(len(x), kernels.shape[1], *y.shape[2:])


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias (O,) to (B, O, positions...), in whose dtype: under autocast that is the lower."""
    return y if bias is None else y + bias.to(y.dtype).view(-1, *(1,) * (y.dim() - 2))


def check_cond(cond: Tensor | None, batch_size: int, cond_dim: int | None) -> None:
    """Raise ValueError unless `cond` is (B or 1, cond_dim), or absent where cond_dim is None."""
    if cond_dim is None:
        if cond is not None:
            raise ValueError("cond was given to a layer that reads features; set cond_dim")
    elif cond is None:
        raise ValueError(f"cond is missing: this layer reads ({batch_size} or 1, {cond_dim})")
    elif tuple(cond.shape) not in ((1, cond_dim), (batch_size, cond_dim)):
        raise ValueError(f"cond must be ({batch_size} or 1, {cond_dim}), got {tuple(cond.shape)}")
