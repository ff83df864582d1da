"""D-GridConv's attention over taps and cells, and its temperature.

Source: Kang, Liu, Yao, Wang and Wu, AAAI 2023 (arXiv 2302.08760), and its code.
`morse.modules.gridconv` has the layer.
"""

import math
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from morse.modules.kernel_stack import kaiming_
from morse.modules.node_matrix import checked_grid
from morse.modules.temperature import WithTemperature, linear_temperature

AttentionNorm = Literal["batch", "layer"]


def grid_temperature(
    epoch: int,
    iteration: int,
    iterations_per_epoch: int,
    *,
    start: float = 30.0,
    end: float = 1.0,
    epochs: int = 10,
) -> float:
    """Anneal the attention's temperature in a straight line, an iteration at a time.

    With n iterations an epoch, `end + (1 - (epoch + iteration / n) / epochs) * (start - end)`. As
    in the authors' code, the line stops an iteration short of `end` and stays there afterwards.

    Args:
        epoch: Epochs completed, at least 0.
        iteration: Iterations completed in this epoch, 0 to n - 1.
        iterations_per_epoch: n, at least 1.
        start: Temperature at the beginning, above 0.
        end: What the line leads to, above 0.
        epochs: Epochs of annealing, at least 1.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from morse.modules import grid_temperature
        >>> grid_temperature(0, 0, 100), grid_temperature(5, 0, 100)
        (30.0, 15.5)
    """
    if epoch < 0:
        raise ValueError(f"epoch must be at least 0, got {epoch}")
    for name, value in (("iterations_per_epoch", iterations_per_epoch), ("epochs", epochs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= iteration < iterations_per_epoch:
        raise ValueError(f"iteration must be in 0 to {iterations_per_epoch - 1}, got {iteration}")
    start, end = map(GridAttention.checked_temperature, (start, end))
    total = epochs * iterations_per_epoch
    done = min(epoch * iterations_per_epoch + iteration, total - 1)
    return linear_temperature(done, total, start, end)


class GridAttention(WithTemperature):
    """D-GridConv's attention: (B, C, H, W) -> gates (B, k*k, H, W) in (0, 1).

    Global average pool, 1x1 convolution to max(int(C / reduction), min_hidden), batch norm, ReLU,
    1x1 convolution, sigmoid(. / temperature). There is a gate for each tap (row by row) and cell,
    and none a channel. The temperature is a buffer: checkpoints keep it. Dicts without one, such
    as the authors' renamed, leave it as it is, at 30 in a new layer. Theirs were trained down to
    about 1: with n iterations an epoch, `set_temperature(module, grid_temperature(9, n - 1, n))`.

    Args:
        in_channels: Input channels C, at least 1.
        grid_shape: Height H and width W, the only size that the attention fits.
        kernel_size: Taps k along both axes, odd.
        reduction: What the hidden width divides C by, above 0.
        min_hidden: The least hidden width, at least 1.
        temperature: Divides the logits; above 0.
        norm: Norm of the hidden layer: "batch" is the authors' and cannot train on a single
            sample, "layer" can.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from morse.modules import GridAttention
        >>> gates = GridAttention(8, (5, 5))(torch.randn(2, 8, 5, 5))
        >>> gates.shape, bool(((gates > 0) & (gates < 1)).all())
        (torch.Size([2, 9, 5, 5]), True)
    """

    own_weight = "squeeze.weight"

    def __init__(
        self,
        in_channels: int,
        grid_shape: tuple[int, int],
        kernel_size: int = 3,
        *,
        reduction: float = 16,
        min_hidden: int = 16,
        temperature: float = 30.0,
        norm: AttentionNorm = "batch",
    ) -> None:
        """Create the two layers and initialise them as the authors do."""
        super().__init__()
        check_sizes(in_channels, kernel_size)
        if not (reduction > 0 and min_hidden >= 1):
            raise ValueError(
                f"reduction must be above 0 and min_hidden at least 1, got {reduction} and "
                f"{min_hidden}"
            )
        if norm not in ("batch", "layer"):
            raise ValueError(f"norm must be 'batch' or 'layer', got {norm!r}")
        self.in_channels, self.kernel_size = in_channels, kernel_size
        self.grid_shape = checked_grid(grid_shape)
        hidden = max(int(in_channels / reduction), min_hidden)
        self.squeeze = nn.Conv2d(in_channels, hidden, 1, bias=False)
        # On a map of one pixel, group norm with one group is layer norm.
        self.norm = nn.BatchNorm2d(hidden) if norm == "batch" else nn.GroupNorm(1, hidden)
        self.expand = nn.Conv2d(hidden, kernel_size**2 * math.prod(self.grid_shape), 1)
        self._begin_at(temperature)
        for layer in (self.squeeze, self.expand):
            kaiming_(layer.weight)
        nn.init.zeros_(self.expand.bias)

    @staticmethod
    def checked_temperature(temperature: float) -> float:
        """Return what divides the logits; ValueError unless above 0."""
        # Infinity is allowed: all gates are 1/2 there.
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        return float(temperature)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the gates; ValueError for another shape, or one sample in batch norm's training.

        Args:
            x: Features before padding, (B, C, H, W).
        """
        check_input(x, self.in_channels, self.grid_shape)
        if isinstance(self.norm, nn.BatchNorm2d) and self.norm.training and len(x) == 1:
            raise ValueError(
                "the attention's batch norm cannot train on a single sample; use larger batches, "
                "norm='layer', or freeze it with .norm.eval()"
            )
        hidden = functional.relu(self.norm(self.squeeze(x.mean((2, 3), keepdim=True))))
        logits = self.expand(hidden).view(len(x), self.kernel_size**2, *self.grid_shape)
        return (logits / self._read_temperature()).sigmoid()


def check_sizes(in_channels: int, kernel_size: int, out_channels: int = 1) -> None:
    """Raise ValueError unless the sizes are at least 1 and `kernel_size` is odd."""
    for name, size in (("in_channels", in_channels), ("out_channels", out_channels)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be an odd integer, got {kernel_size}")


def check_input(x: Tensor, channels: int, grid: tuple[int, int] | None) -> None:
    """Raise ValueError unless x is (B, channels, H, W) on the grid, if there is one."""
    if x.dim() != 4 or x.shape[1] != channels or grid not in (None, tuple(x.shape[2:])):
        height, width = grid or ("H", "W")
        raise ValueError(f"x must be (B, {channels}, {height}, {width}), got {tuple(x.shape)}")
