"""KernelWarehouse's layers: convolutions whose kernels are mixed of a shared bank's cells.

Source: Li and Yao, ICML 2024 (arXiv 2406.07879). `morse.modules.kernel_warehouse` has the bank and
the meaning of the letters in shapes; here R rows of attention are B, or 1 where all samples share
one conditioning row.
"""

import torch
from torch import Tensor, nn

from morse.modules.kernel_stack import add_bias, check_cond, convolve
from morse.modules.kernel_warehouse_attention import AttentionSettings, CellAttention
from morse.modules.kernel_warehouse_plan import KernelShape, LayerPlan
from morse.modules.temperature import WithTemperature


class BuildOrderError(RuntimeError, ValueError):
    """A warehouse or one of its layers was used before `build`, or extended after it."""


class WarehouseConv(WithTemperature):
    """A convolution whose kernel is mixed of a warehouse's cells; the base of all its layers.

    A layer's names in state dicts are the authors', so theirs load, at temperature 0, once the bank
    is renamed (see `Warehouse`). Ours also hold the temperature, a buffer.
    """

    axes: int
    final_temperature, own_weight = 0.0, "attention.fc1.weight"

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        """Take the sizes; the attention comes when the warehouse is built."""
        super().__init__()
        for name, size in {"in_ch": in_ch, "out_ch": out_ch, "groups": groups}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if in_ch % groups or out_ch % groups:
            raise ValueError(f"groups={groups} must divide in_ch={in_ch} and out_ch={out_ch}")
        self.in_channels, self.out_channels, self.groups = in_ch, out_ch, groups
        taps = (kernel_size,) * self.axes if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(taps) != self.axes or min(taps) < 1:
            raise ValueError(
                f"kernel_size must be {self.axes} numbers of at least 1, got {kernel_size}"
            )
        self.kernel_size = taps
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.bias = nn.Parameter(torch.zeros(out_ch)) if bias else None
        self._begin_at(1.0)
        self.cond_dim: int | None = None
        # In a tuple, so that the bank is no child of each layer but the one of the network.
        self._warehouse: tuple[nn.Module, ...] = ()

    @property
    def shape(self) -> KernelShape:
        """The kernel's shape."""
        return KernelShape(self.out_channels, self.in_channels // self.groups, self.kernel_size)

    def connect(
        self, warehouse: nn.Module, n: int, layer: LayerPlan, settings: AttentionSettings
    ) -> None:
        """Take part in a warehouse of n cells; `Warehouse.build` calls it."""
        self.attention = CellAttention(self.in_channels, n, layer, settings)
        self.cond_dim, self._layout = settings.cond_dim, layer
        self._warehouse = (warehouse,)

    @staticmethod
    def checked_temperature(temperature: float) -> float:
        """Return how much of the initial assignment is mixed in; ValueError unless in [0, 1]."""
        if not 0 <= temperature <= 1:
            raise ValueError(f"temperature must be in [0, 1], got {temperature}")
        return float(temperature)

    def reset_parameters(self) -> None:
        """Initialise the attention and the bias anew; the cells are the warehouse's."""
        if self._warehouse:
            self.attention.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def attentions(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Compute each mixture's weights on all cells.

        Args:
            x: Input, (B, I, ...).
            cond: Conditioning, (B or 1, cond_dim), for a warehouse with `cond_dim` and no other.

        Returns:
            (B, m, n), a view of one row when `cond` has one.

        Raises:
            BuildOrderError: If the warehouse is not built.
            ValueError: If a shape or `cond` does not fit, or batch norm is to train on one row.
        """
        return self._attend(self._channels_second(x), cond).expand(len(x), -1, -1)

    def assembled_kernel(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Assemble each sample's kernel, (B, O, I/g, k...); takes and raises as `attentions`."""
        kernel = self._assemble(self._attend(self._channels_second(x), cond))
        return kernel.expand(len(x), *kernel.shape[1:])

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Convolve each sample with its own kernel; takes and raises what `attentions` does."""
        x = self._channels_second(x)
        kernel = self._assemble(self._attend(x, cond))
        place = self.stride, self.padding, self.dilation
        return add_bias(convolve(x, kernel, place, self.groups), self.bias)

    def _attend(self, x: Tensor, cond: Tensor | None) -> Tensor:
        if not self._warehouse:
            raise BuildOrderError(
                "this layer has no cells yet: create it with Warehouse.conv2d (conv1d, conv3d, "
                "linear) and call Warehouse.build() once all layers are registered"
            )
        check_cond(cond, len(x), self.cond_dim)
        if len(x) == 0:  # any kernel serves no sample, and one gives the result its shape
            return self.attention.temp_bias[None, :, :-1]
        source = x.flatten(2).mean(2) if cond is None else cond
        return self.attention(source, self._read_temperature())

    def _channels_second(self, x: Tensor) -> Tensor:
        """Check the input and return it as (B, I, positions...)."""
        if x.dim() != self.axes + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must be (B, {self.in_channels}{', *' * self.axes}), got {tuple(x.shape)}"
            )
        return x

    def _assemble(self, attentions: Tensor) -> Tensor:
        """Mix the cells and join them: (R, m, n) -> (R, O, I/g, k...)."""
        cells, plan = self._warehouse[0](), self._layout
        mixed = attentions @ cells.flatten(1)
        blocks = (plan.groups_spatial, plan.groups_out, plan.groups_in)
        # (R, S, G_o, G_i, c_o, c_i, taps of a cell) -> (R, G_o, c_o, G_i, c_i, S, taps)
        mixed = mixed.view(len(mixed), *blocks, *cells.shape[1:3], -1).permute(0, 2, 4, 3, 5, 1, 6)
        shape = self.out_channels, self.in_channels // self.groups, *self.kernel_size
        return mixed.reshape(len(mixed), *shape)


class KWConv1d(WarehouseConv):
    """`WarehouseConv` over one axis: (B, I, L) -> (B, O, L').

    >>> import torch
    >>> from morse.modules import Warehouse
    >>> warehouse = Warehouse(norm="layer")
    >>> layer = warehouse.conv1d(8, 4, kernel_size=3)
    >>> _ = warehouse.build()
    >>> layer(torch.ones(2, 8, 5)).shape
    torch.Size([2, 4, 3])
    """

    axes = 1


class KWConv2d(WarehouseConv):
    """`WarehouseConv` over two axes: (B, I, H, W) -> (B, O, H', W').

    >>> import torch
    >>> from morse.modules import Warehouse
    >>> warehouse = Warehouse(norm="layer")
    >>> layer = warehouse.conv2d(8, 4, kernel_size=3, padding=1)
    >>> _ = warehouse.build()
    >>> x = torch.ones(2, 8, 5, 5)
    >>> layer(x).shape, layer.attentions(x).shape, layer.assembled_kernel(x).shape
    (torch.Size([2, 4, 5, 5]), torch.Size([2, 9, 9]), torch.Size([2, 4, 8, 3, 3]))
    """

    axes = 2


class KWConv3d(WarehouseConv):
    """`WarehouseConv` over three axes: (B, I, D, H, W) -> (B, O, D', H', W').

    >>> import torch
    >>> from morse.modules import Warehouse
    >>> warehouse = Warehouse(norm="layer")
    >>> layer = warehouse.conv3d(8, 4, kernel_size=(1, 3, 3))
    >>> _ = warehouse.build()
    >>> layer(torch.ones(2, 8, 2, 5, 5)).shape
    torch.Size([2, 4, 2, 3, 3])
    """

    axes = 3


class KWLinear(WarehouseConv):
    """A linear layer in a warehouse of 1-tap convolutions: (B, ..., I) -> (B, ..., O).

    All positions of a sample share its matrix, (O, I, 1) in `assembled_kernel`. The authors' layer
    has its convolution inside as `conv`; its state dicts load too.

    >>> import torch
    >>> from morse.modules import Warehouse
    >>> warehouse = Warehouse(norm="layer")
    >>> layer = warehouse.linear(8, 4, bias=True)
    >>> _ = warehouse.build()
    >>> layer(torch.ones(2, 5, 8)).shape
    torch.Size([2, 5, 4])
    """

    axes = 1

    def __init__(self, in_ch: int, out_ch: int, bias: bool = False) -> None:
        """Take the sizes; the attention comes when the warehouse is built."""
        super().__init__(in_ch, out_ch, 1, bias=bias)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Map each sample with its own matrix; takes and raises what `attentions` does."""
        return super().forward(x, cond).transpose(1, 2).reshape(*x.shape[:-1], self.out_channels)

    def _channels_second(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[-1] != self.in_channels:
            raise ValueError(f"x must be (B, ..., {self.in_channels}), got {tuple(x.shape)}")
        return (x.flatten(1, -2) if x.dim() > 2 else x[:, None]).transpose(1, 2)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        for key in [key for key in state_dict if key.startswith(prefix + "conv.")]:
            state_dict[prefix + key.removeprefix(prefix + "conv.")] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)
