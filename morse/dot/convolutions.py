"""Dynamic convolutions in Dot's extra blocks, in place of the plain ones.

The 3x3 convolutions of the ResNet blocks and of the down-samplers become dynamic; 1x1 convolutions
stay as they are, as in the authors' own networks. Untrained layers begin at the temperature that
training ends at, which is no part of a Dot's weights (but of a grid convolution's state):
`anneal` sets it while training.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from morse.dot.conv_layers import DotKWConv2d, DotODConv2d, DotWarehouse
from morse.dot.conv_settings import (
    ConvSettings,
    GridConvSettings,
    KernelWarehouseSettings,
    ODConvSettings,
)
from morse.modules.gridconv import GridConv2d
from morse.modules.kernel_warehouse_plan import WarehousePlan
from morse.modules.temperature import linear_temperature, set_temperature

# Of each kind, the temperature that training begins and ends with; from the papers.
TEMPERATURES = {
    ODConvSettings: (30.0, 1.0),
    KernelWarehouseSettings: (1.0, 0.0),
    GridConvSettings: (30.0, 1.0),
}

DYNAMIC = (DotODConv2d, DotKWConv2d, GridConv2d)


class _Place(NamedTuple):
    """A plain 3x3 convolution of an extra block; `level` counts halvings of the resolution."""

    parent: nn.Module
    name: str
    conv: nn.Conv2d
    level: int


def _find_places(levels: Iterable[Sequence[nn.Module]]) -> Iterator[_Place]:
    for level, blocks in enumerate(levels):
        for block in blocks:
            for parent in list(block.modules()):
                for name, child in parent.named_children():
                    if type(child) is nn.Conv2d and child.kernel_size == (3, 3):
                        yield _Place(parent, name, child, level)


def install_convolutions(
    levels: Iterable[Sequence[nn.Module]],
    settings: ConvSettings | None,
    time_embed_dim: int,
    patch_size: int,
) -> nn.ModuleList:
    """Replace the 3x3 convolutions of Dot's extra blocks.

    Args:
        levels: The blocks at each resolution, from full resolution inwards.
        settings: The kind and its settings; None leaves the convolutions as they are.
        time_embed_dim: Size of the time embedding.
        patch_size: Rows and columns of the sample in a position of the blocks' features.

    Returns:
        Banks of cells that the layers refer to, for Dot to hold; none but for KernelWarehouse.

    Raises:
        ValueError: If the settings do not fit the blocks.
    """
    if settings is None:
        return nn.ModuleList()
    levels = [tuple(blocks) for blocks in levels]
    places = list(_find_places(levels))
    warehouses = nn.ModuleList()
    cond_dim = time_embed_dim if settings.condition == "time" else None
    if isinstance(settings, ODConvSettings):
        _install_odconv(places, settings, cond_dim)
    elif isinstance(settings, KernelWarehouseSettings):
        warehouses.extend(_install_warehouses(places, settings, cond_dim))
    else:
        _install_gridconv(places, settings, patch_size * 2 ** len(levels), patch_size)
    for place in places:
        set_temperature(place.parent, TEMPERATURES[type(settings)][1])
    if cond_dim is not None:
        for block in (block for blocks in levels for block in blocks):
            block.time_listeners = tuple(m for m in block.modules() if isinstance(m, DYNAMIC))
    return warehouses


def _install_odconv(
    places: Iterable[_Place], settings: ODConvSettings, cond_dim: int | None
) -> None:
    """Begin as the plain convolutions; layer norm, since a batch may be of one sample."""
    for place in places:
        layer = DotODConv2d.from_conv(
            place.conv,
            settings.num_kernels,
            reduction=settings.reduction,
            attention_norm="layer",
            cond_dim=cond_dim,
        )
        setattr(place.parent, place.name, layer)


def _install_warehouses(
    places: Iterable[_Place], settings: KernelWarehouseSettings, cond_dim: int | None
) -> list[DotWarehouse]:
    warehouses: dict[object, DotWarehouse] = {}
    for place in places:
        conv = place.conv
        shape = (conv.out_channels, conv.in_channels) if settings.sharing == "shapes" else "all"
        if shape not in warehouses:
            warehouses[shape] = DotWarehouse(
                settings.budget,
                settings.cell_ratio,
                settings.cell_ratio,
                spatial_partition=False,
                reduction=settings.reduction,
                norm="layer",
                cond_dim=cond_dim,
            )
        layer = warehouses[shape].conv2d(
            conv.in_channels, conv.out_channels, 3, conv.stride, conv.padding, bias=True
        )
        setattr(place.parent, place.name, layer)
    for warehouse in warehouses.values():
        try:
            warehouse.build()
        except ValueError as error:
            raise ValueError(
                f"conv_options: budget={settings.budget} and cell_ratio={settings.cell_ratio} "
                "(cell_in_ratio and cell_out_ratio below) don't fit Dot's convolutions: "
                f"{error}"
            ) from error
    return list(warehouses.values())


def _install_gridconv(
    places: Iterable[_Place], settings: GridConvSettings, unit: int, patch_size: int
) -> None:
    """Replace those that keep the size; grid convolution knows no stride."""
    # Samples are filled up to what Dot's blocks halve evenly.
    height, width = (-(-side // unit) * unit // patch_size for side in settings.size)
    for place in places:
        if place.conv.stride == (1, 1):
            layer = GridConv2d(
                place.conv.in_channels,
                place.conv.out_channels,
                paddings=tuple(settings.paddings),
                dynamic=True,
                grid_shape=(height >> place.level, width >> place.level),
                norm="layer",
            )
            setattr(place.parent, place.name, layer)


def anneal(dot: nn.Module, settings: ConvSettings, step: int, total: int) -> float:
    """Set the temperature for an update in training, and return it.

    Args:
        dot: The Dot; its attentions become sharper, or those of KernelWarehouse get to decide.
        settings: Those of its convolutions.
        step: Updates so far, counting the coming one.
        total: Updates until the final temperature, that of an untrained or loaded Dot; 0 for none.
    """
    start, end = TEMPERATURES[type(settings)]
    temperature = linear_temperature(step, total, start, end) if total else end
    set_temperature(dot, temperature)
    return temperature


@dataclass(frozen=True)
class ConvolutionSummary:
    """What the dynamic convolutions of Dot's extra blocks cost; `print` it.

    Attributes:
        layers: How many there are, by the name of their class.
        parameters: Theirs: kernels or banks of cells, biases and attentions.
        plain_parameters: Those of plain convolutions in their places.
        plans: Those of KernelWarehouse's banks.
    """

    layers: dict[str, int]
    parameters: int
    plain_parameters: int
    plans: tuple[WarehousePlan, ...] = ()

    def __str__(self) -> str:
        """Say it in a line, and a few for each bank."""
        if not self.layers:
            return "plain convolutions in Dot's extra blocks"
        kinds = ", ".join(f"{count} {name}" for name, count in self.layers.items())
        ratio = self.parameters / self.plain_parameters
        first = (
            f"{kinds} in Dot's extra blocks: {self.parameters:,} parameters in place of "
            f"{self.plain_parameters:,} (x {ratio:.2f})"
        )
        return "\n".join([first, *map(str, self.plans)])


def summarize_convolutions(dot: nn.Module) -> ConvolutionSummary:
    """Count a Dot's dynamic convolutions and their parameters."""
    layers = [module for module in dot.modules() if isinstance(module, DYNAMIC)]
    banks = [module for module in dot.modules() if isinstance(module, DotWarehouse)]
    plain = sum(layer.out_channels * (9 * layer.in_channels + 1) for layer in layers)
    found = sum(p.numel() for module in [*layers, *banks] for p in module.parameters())
    kinds = Counter(type(layer).__name__.removeprefix("Dot") for layer in layers)
    return ConvolutionSummary(dict(kinds), found, plain, tuple(bank.plan for bank in banks))


def warn_unless_saving(dot: nn.Module, settings: ConvSettings | None) -> None:
    """Warn if KernelWarehouse with a budget below 1 makes Dot larger, not smaller."""
    if not isinstance(settings, KernelWarehouseSettings) or settings.budget >= 1:
        return
    summary = summarize_convolutions(dot)
    if summary.parameters >= summary.plain_parameters:
        warnings.warn(
            f"conv='kernel_warehouse' with conv_options budget={settings.budget}, cell_ratio="
            f"{settings.cell_ratio}, sharing={settings.sharing!r} and condition="
            f"{settings.condition!r} saves no parameters: {summary.parameters:,} in place of "
            f"{summary.plain_parameters:,}. Attentions cost as well: use sharing='shapes', "
            "condition='features', a cell_ratio of 1/2, or wider blocks (block_out_channels).",
            stacklevel=3,
        )
