"""How a warehouse cuts kernels into equal cells, and which cell each mixture begins as.

Source: Li and Yao, "KernelWarehouse: Rethinking the Design of Dynamic Convolution", ICML 2024
(arXiv 2406.07879). `morse.modules.kernel_warehouse` explains the letters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class KernelShape:
    """The kernel (O, I/g, k...) of one layer."""

    out_channels: int
    in_channels_per_group: int
    kernel_size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many weights a plain convolution of this shape has."""
        return self.out_channels * self.in_channels_per_group * math.prod(self.kernel_size)


@dataclass(frozen=True)
class LayerPlan:
    """One layer's share of a warehouse.

    Attributes:
        mixtures: m, its cells to mix: groups_spatial * groups_out * groups_in, in that order.
        start: First cell that is the layer's own.
        stop: The one after its last.
        initial_cell: What each mixture is at temperature 1: a cell's index, or n for zeros.
        local: Cells that a non-local basis leaves to the layer itself, int(budget * m).
        groups_spatial: Cells over the taps, S.
        groups_out: Cells over the output channels, G_o.
        groups_in: Cells over the input channels of a group, G_i.
    """

    mixtures: int
    start: int
    stop: int
    initial_cell: tuple[int, ...]
    local: int
    groups_spatial: int
    groups_out: int
    groups_in: int


@dataclass(frozen=True)
class WarehousePlan:
    """What a warehouse holds and costs; `print` it to compare it with plain convolutions.

    Attributes:
        n: Cells in the bank; as an index it means the null cell, which is zeros.
        cell_shape: (c_o, c_i, k...).
        layers: The layers in the order of their registration.
        bank_parameters: n times the size of a cell.
        attention_parameters: Those of all layers' attentions.
        plain_parameters: Weights of plain convolutions of the same shapes.
    """

    n: int
    cell_shape: tuple[int, ...]
    layers: tuple[LayerPlan, ...]
    bank_parameters: int
    attention_parameters: int
    plain_parameters: int

    @property
    def parameters(self) -> int:
        """Bank and attentions together; biases are in neither count."""
        return self.bank_parameters + self.attention_parameters

    def __str__(self) -> str:
        """Say what the bank and the attentions cost, beside plain convolutions."""
        rows = [
            f"  layer {index}: {layer.mixtures} mixtures, own cells {layer.start}:{layer.stop}"
            for index, layer in enumerate(self.layers)
        ]
        ratio = self.parameters / self.plain_parameters
        verdict = "saves parameters" if ratio < 1 else "does not save parameters"
        shape = "x".join(map(str, self.cell_shape))
        return "\n".join(
            [
                f"warehouse of {self.n} cells, each {shape}, for {len(rows)} layers",
                *rows,
                f"parameters: {self.bank_parameters:,} in cells + {self.attention_parameters:,} "
                f"in attentions = {self.parameters:,}",
                f"plain convolutions: {self.plain_parameters:,} (x {ratio:.2f}, {verdict})",
            ]
        )


def checked_budget(budget: float) -> Fraction:
    """Return b as k or 1/k; ValueError unless k is a whole number below 1e9."""
    if not 1e-9 < budget < 1e9:
        raise ValueError(f"budget must be above 1e-9 and below 1e9, got {budget}")
    steps = round(budget) if budget >= 1 else round(1 / budget)
    share = Fraction(steps) if budget >= 1 else Fraction(1, steps)
    if not math.isclose(budget, share, rel_tol=1e-6):
        raise ValueError(
            f"budget must be a whole number, or one divided by a whole number, got {budget}; the "
            f"nearest ones are {_neighbours(budget, steps)}"
        )
    return share


def _neighbours(budget: float, steps: int) -> str:
    if budget >= 1:
        return f"{math.floor(budget)} and {math.ceil(budget)}"
    above = steps if 1 / steps > budget else steps - 1
    return f"1/{above + 1} and 1/{above}"


def plan_layers(
    shapes: Sequence[KernelShape],
    share: Fraction,
    cell_out_ratio: float,
    cell_in_ratio: float,
    spatial_partition: bool,
) -> tuple[int, tuple[int, ...], tuple[LayerPlan, ...]]:
    """Cut all layers' kernels into cells and assign every cell to its first mixture.

    Args:
        shapes: The kernels, in order of registration; all of one rank.
        share: Cells for each mixture, a whole number or one divided by a whole number.
        cell_out_ratio: c_o relative to the greatest common divisor of the output channels.
        cell_in_ratio: c_i relative to that of the input channels of a group.
        spatial_partition: Cells of one tap; otherwise of all, which are then as many everywhere.

    Returns:
        n, (c_o, c_i, k...) and the layers' shares.

    Raises:
        ValueError: If cells do not tile the kernels, or the assignment does not use each once.
    """
    cell_shape = _cell_shape(shapes, cell_out_ratio, cell_in_ratio, spatial_partition)
    n, layers = _assign(shapes, cell_shape, share)
    assigned = layers[-1].stop
    if assigned != n:
        legal = ", ".join(map(str, _legal_ratios(shapes, share, spatial_partition))) or "none"
        raise ValueError(
            f"budget={share} gives {n} cells for layers of "
            f"{[layer.mixtures for layer in layers]} mixtures, whose first assignment takes "
            f"{assigned}; with cell_in_ratio and cell_out_ratio at {cell_in_ratio} and "
            f"{cell_out_ratio} it does not fit. Set both to one of: {legal}; or change the budget."
        )
    return n, cell_shape, layers


def _cell_shape(
    shapes: Sequence[KernelShape], out_ratio: float, in_ratio: float, spatial_partition: bool
) -> tuple[int, ...]:
    sides = []
    for name, widths, ratio in (
        ("cell_out_ratio", [shape.out_channels for shape in shapes], out_ratio),
        ("cell_in_ratio", [shape.in_channels_per_group for shape in shapes], in_ratio),
    ):
        common = math.gcd(*widths)
        side = max(int(common * ratio), 1)
        if common % side:
            raise ValueError(
                f"{name}={ratio} makes cells of {side} channels, which do not tile layers of "
                f"{widths}; {side} must divide {common}"
            )
        sides.append(side)
    taps = shapes[0].kernel_size
    return (*sides, *((1,) * len(taps) if spatial_partition else taps))


def _assign(
    shapes: Sequence[KernelShape], cell_shape: tuple[int, ...], share: Fraction
) -> tuple[int, list[LayerPlan]]:
    """Return n and the layers' shares (the initial one-to-one relationship)."""
    groups = [
        (
            math.prod(shape.kernel_size) // math.prod(cell_shape[2:]),
            shape.out_channels // cell_shape[0],
            shape.in_channels_per_group // cell_shape[1],
        )
        for shape in shapes
    ]
    # In whole numbers, since int(b * m) of a rounded b = 1/3 could fall one short.
    n = max(int(share * sum(map(math.prod, groups))), 1)
    layers, start = [], 0
    for sizes in groups:
        mixtures = math.prod(sizes)
        cells, stop = _initial_cells(mixtures, start, n, share)
        layers.append(LayerPlan(mixtures, start, stop, cells, int(share * mixtures), *sizes))
        start = stop
    return n, layers


def _initial_cells(
    mixtures: int, start: int, null: int, share: Fraction
) -> tuple[tuple[int, ...], int]:
    """Return each mixture's cell at temperature 1 and the first cell left for the next layer."""
    if share >= 1:
        step = int(share)
        return tuple(start + j * step for j in range(mixtures)), start + mixtures * step
    period, cells = share.denominator, []
    for j in range(mixtures):
        # One mixture in `period` takes a cell, the next one along in each following period.
        taken = j % period == j // period % period
        cells.append(start if taken else null)
        start += taken
    return tuple(cells), start


def _legal_ratios(
    shapes: Sequence[KernelShape], share: Fraction, spatial_partition: bool
) -> list[Fraction]:
    """Ratios for both channel axes at which every cell is assigned once."""
    legal = []
    for divisor in (1, 2, 3, 4, 8, 16):
        ratio = Fraction(1, divisor)
        if all(
            shape.out_channels % divisor == shape.in_channels_per_group % divisor == 0
            for shape in shapes
        ):
            cell_shape = _cell_shape(shapes, ratio, ratio, spatial_partition)
            n, layers = _assign(shapes, cell_shape, share)
            if layers[-1].stop == n:
                legal.append(ratio)
    return legal
