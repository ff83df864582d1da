"""KernelWarehouse: convolutions that share one bank of kernel cells, mixed anew for each input.

Source: Li and Yao, "KernelWarehouse: Rethinking the Design of Dynamic Convolution", ICML 2024
(arXiv 2406.07879). Kernels are cut into equal cells (kernel partition); the bank's size, not the
number of layers, sets the parameter budget, which may be below that of plain convolutions
(warehouse sharing); attentions are signed and begin one-to-one (contrasting-driven attention).

Shapes: B samples, I input and O output channels, g groups, k taps an axis; n cells (c_o, c_i, k...)
in the bank; m mixtures in a layer, each of which becomes one cell-sized block of its kernel.
"""

import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn

from morse.modules.kernel_stack import KernelStack, kaiming_
from morse.modules.kernel_warehouse_attention import (
    AttentionNorm,
    AttentionSettings,
    check_settings,
)
from morse.modules.kernel_warehouse_layers import (
    BuildOrderError,
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    WarehouseConv,
)
from morse.modules.kernel_warehouse_plan import WarehousePlan, checked_budget, plan_layers

Layer = TypeVar("Layer", bound=WarehouseConv)
Size = int | tuple[int, ...]


class Warehouse(KernelStack):
    """The bank of cells, and the place where its layers are created.

    Create the layers, in the order in which they shall own cells, then call `build`. The network
    must hold the warehouse beside the layers: the bank is one parameter, `cells`, which the layers
    refer to without owning it, also in a deep copy of the network.

    Layers begin at temperature 1, where each mixture is one fixed cell (zeros for a part of 1 -
    budget of them, if that is below 1), and are trained down to 0, where the attentions alone
    count: see `linear_temperature` (start=1.0, end=0.0) and `set_temperature`, which goes over the
    layers and hence takes the network. The authors' layers are created at 0 and their training
    loop sets 1; their state dicts load at 0, with one name changed: their i-th bank, in the order
    of first use, is `warehouse_manager.weights.<i>` there, and the `cells` of a warehouse here.

    >>> import torch
    >>> from morse.modules import Warehouse, set_temperature
    >>> warehouse = Warehouse(budget=0.5, cell_in_ratio=0.5, cell_out_ratio=0.5, norm="layer",
    ...                       spatial_partition=False)
    >>> layers = [warehouse.conv2d(16, 16, kernel_size=3, padding=1) for _ in range(4)]
    >>> print(warehouse.build().plan)
    warehouse of 8 cells, each 8x8x3x3, for 4 layers
      layer 0: 4 mixtures, own cells 0:2
      layer 1: 4 mixtures, own cells 2:4
      layer 2: 4 mixtures, own cells 4:6
      layer 3: 4 mixtures, own cells 6:8
    parameters: 4,608 in cells + 3,664 in attentions = 8,272
    plain convolutions: 9,216 (x 0.90, saves parameters)
    >>> convs = torch.nn.Sequential(*layers)
    >>> network = torch.nn.ModuleDict({"warehouse": warehouse, "convs": convs})
    >>> set_temperature(network, 0.5)
    4
    >>> network["convs"](torch.ones(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])

    Args:
        budget: b, cells for each mixture: a whole number, or 1 divided by one.
        cell_in_ratio: Width c_i of a cell relative to the greatest common divisor of the layers'
            input channels of a group, in (0, 1].
        cell_out_ratio: Width c_o relative to that of the output channels, in (0, 1].
        spatial_partition: Cells of one tap; False for whole kernels, which must then be equal.
        reduction: Width of the attentions' hidden layer relative to I, above 0; at least 16 wide.
        basis_ratio: Below 1, a layer sees the other layers' cells through a basis of so many times
            fewer (at least 16), which makes attentions smaller; in (0, 1].
        norm: Norm of the hidden layer: "batch" is the authors' and cannot train on a single row,
            "layer" can.
        cond_dim: Width of the conditioning vector (such as a time embedding) that the attentions
            read in place of pooled features; None to read features.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        budget: float = 1.0,
        cell_in_ratio: float = 1.0,
        cell_out_ratio: float = 1.0,
        spatial_partition: bool = True,
        reduction: float = 1 / 16,
        basis_ratio: float = 1.0,
        norm: AttentionNorm = "batch",
        cond_dim: int | None = None,
    ) -> None:
        """Create an empty warehouse."""
        super().__init__()
        self._share = checked_budget(budget)
        for name, ratio in (("cell_in_ratio", cell_in_ratio), ("cell_out_ratio", cell_out_ratio)):
            if not 0 < ratio <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {ratio}")
        self.budget, self.spatial_partition = budget, spatial_partition
        self.cell_in_ratio, self.cell_out_ratio = cell_in_ratio, cell_out_ratio
        self._settings = AttentionSettings(reduction, basis_ratio, norm, cond_dim)
        check_settings(self._settings)
        self.register_parameter("cells", None)
        self._plan: WarehousePlan | None = None
        # In a list, so that they are children of the network alone; let go of when built.
        self._layers: list[WarehouseConv] = []

    def conv1d(
        self, in_ch: int, out_ch: int, kernel_size: Size, stride: Size = 1, padding: Size = 0,
        dilation: Size = 1, groups: int = 1, bias: bool = False,
    ) -> KWConv1d:  # fmt: skip
        """Create a layer of this warehouse; see `conv2d`."""
        sizes = in_ch, out_ch, kernel_size, stride, padding, dilation, groups, bias
        return self._register(KWConv1d(*sizes))

    def conv2d(
        self, in_ch: int, out_ch: int, kernel_size: Size, stride: Size = 1, padding: Size = 0,
        dilation: Size = 1, groups: int = 1, bias: bool = False,
    ) -> KWConv2d:  # fmt: skip
        """Create a layer of this warehouse.

        Args:
            in_ch: Input channels I.
            out_ch: Output channels O.
            kernel_size: Taps k of all axes, or of each.
            stride: As in `torch.nn.Conv2d`.
            padding: As there, in numbers.
            dilation: As there.
            groups: Groups g; divides I and O.
            bias: Add a plain bias, which belongs to the layer.

        Raises:
            BuildOrderError: If the warehouse is built already.
            ValueError: If an argument is out of its range, or the kernel has another number of axes
                than those before, or other taps without `spatial_partition`.
        """
        sizes = in_ch, out_ch, kernel_size, stride, padding, dilation, groups, bias
        return self._register(KWConv2d(*sizes))

    def conv3d(
        self, in_ch: int, out_ch: int, kernel_size: Size, stride: Size = 1, padding: Size = 0,
        dilation: Size = 1, groups: int = 1, bias: bool = False,
    ) -> KWConv3d:  # fmt: skip
        """Create a layer of this warehouse; see `conv2d`."""
        sizes = in_ch, out_ch, kernel_size, stride, padding, dilation, groups, bias
        return self._register(KWConv3d(*sizes))

    def linear(self, in_ch: int, out_ch: int, bias: bool = False) -> KWLinear:
        """Create a linear layer, a `conv1d` of one tap over (B, ..., I); see `conv2d`."""
        return self._register(KWLinear(in_ch, out_ch, bias))

    def _register(self, layer: Layer) -> Layer:
        if self._plan is not None:
            raise BuildOrderError(
                "this warehouse is built, and the number of its cells fixed: register all layers "
                "before Warehouse.build()"
            )
        for other in self._layers[:1]:
            taps, expected = layer.kernel_size, other.kernel_size
            if len(taps) != len(expected) or not (self.spatial_partition or taps == expected):
                raise ValueError(
                    f"kernel_size must be {expected} as in the warehouse's first layer, got {taps};"
                    " cells of one tap (spatial_partition=True) serve other sizes of as many axes"
                )
        self._layers.append(layer)
        return layer

    def build(self) -> "Warehouse":
        """Freeze the plan, create the cells and all layers' attentions; returns the warehouse.

        Warns if a budget of 1 or less does not save parameters, since attentions cost some as well.

        Raises:
            BuildOrderError: If there are no layers, or the warehouse is built already.
            ValueError: If cells do not tile the kernels or the initial assignment does not use each
                once; the message lists ratios with which it would.
        """
        if self._plan is not None or not self._layers:
            raise BuildOrderError("build needs registered layers, and can be called only once")
        shapes = [layer.shape for layer in self._layers]
        ratios = self.cell_out_ratio, self.cell_in_ratio
        n, cell_shape, plans = plan_layers(shapes, self._share, *ratios, self.spatial_partition)
        for layer, plan in zip(self._layers, plans, strict=True):
            layer.connect(self, n, plan, self._settings)
        self.cells = nn.Parameter(torch.empty(n, *cell_shape))
        self._plan = WarehousePlan(
            n, cell_shape, tuple(plans), self.cells.numel(),
            sum(p.numel() for layer in self._layers for p in layer.attention.parameters()),
            sum(shape.numel for shape in shapes),
        )  # fmt: skip
        self._layers = []
        self.reset_parameters()
        self._warn_unless_saving()
        return self

    def _warn_unless_saving(self) -> None:
        if self._share <= 1 and self._plan.parameters >= self._plan.plain_parameters:
            warnings.warn(
                f"this warehouse does not save parameters: {self._plan.parameters:,} against "
                f"{self._plan.plain_parameters:,} of plain convolutions; larger cells (cell ratios,"
                " spatial_partition=False) or a basis_ratio below 1 make attentions smaller",
                stacklevel=3,
            )

    @property
    def plan(self) -> WarehousePlan:
        """What the warehouse holds and costs; BuildOrderError before `build`."""
        if self._plan is None:
            raise BuildOrderError("there is no plan yet: register layers, then Warehouse.build()")
        return self._plan

    def forward(self) -> Tensor:
        """Return the cells; layers call it, so that hooks which move weights (offloading) act."""
        return self.cells

    def reset_parameters(self) -> None:
        """Draw the cells anew, each layer's own as its kernel would be."""
        with torch.no_grad():
            for layer in self.plan.layers:
                # The fan counts the layer's own cells: (cells * c_o, c_i, k...).
                kaiming_(self.cells[layer.start : layer.stop].flatten(0, 1))
