"""What dynamic layers of different methods share: the setter of temperatures, and channels last."""

import pytest
import torch
from test_odconv import SHAPES, make
from torch import nn
from torch.testing import assert_close

from morse.modules import GridConv2d, Warehouse, set_temperature


def test_one_that_cannot_take_a_temperature_leaves_all_as_they_were():
    warehouse = Warehouse(budget=2, norm="layer")
    mixed = warehouse.conv2d(6, 6, 3)
    warehouse.build()
    mixed.set_temperature(0.5)
    dynamic = make(SHAPES[0], temperature=7.5)[0]
    for layers in ((mixed, dynamic), (dynamic, mixed)):
        for refused in (0.0, 30.0):
            with pytest.raises(ValueError, match="temperature"):
                set_temperature(nn.ModuleList(layers), refused)
            assert (mixed.temperature, dynamic.temperature) == (0.5, 7.5)


def test_temperatures_of_grid_convolutions():
    grid, static = (GridConv2d(4, 4, grid_shape=(3, 3), dynamic=d) for d in (True, False))
    dynamic = make(SHAPES[0], temperature=7.5)[0]
    layers = nn.ModuleList([grid, static, grid, dynamic])
    assert set_temperature(layers, 3.0) == 2 and set_temperature(grid.attention, 5.0) == 1
    with pytest.raises(ValueError, match="temperature"):
        set_temperature(layers, float("inf"))
    assert (grid.temperature, dynamic.temperature) == (5.0, 3.0)


def test_temperatures_are_saved_from_any_default_device():
    warehouse = Warehouse(budget=2, norm="layer")
    mixed = warehouse.conv2d(6, 6, 3)
    warehouse.build()
    for layer, last in ((mixed, 0.0), (make(SHAPES[0])[0], 1.0)):
        layer.set_temperature(0.5)
        state = layer.state_dict()
        others = {name: value for name, value in state.items() if name != "_extra_state"}
        with torch.device("meta"):
            assert layer.get_extra_state().device.type == "cpu"
            layer.load_state_dict(others)  # without a temperature, as the authors' are
        assert layer.temperature == last
        layer.load_state_dict(state)
        assert layer.temperature == 0.5


@pytest.mark.parametrize("kind", ["odconv", "warehouse"])
def test_channels_last(kind):
    if kind == "odconv":
        layer, x, _ = make(SHAPES[1])
        network, kernels = nn.ModuleList([layer]), layer.weight
    else:
        warehouse = Warehouse(budget=2, norm="layer", spatial_partition=False)
        layer, x = warehouse.conv2d(8, 8, 3, padding=1), torch.randn(3, 8, 7, 6)
        network, kernels = nn.ModuleList([layer, warehouse.build()]), warehouse.cells
    expected = layer(x)
    network.to(memory_format=torch.channels_last)
    assert kernels[0].is_contiguous(memory_format=torch.channels_last)
    assert_close(layer(x.to(memory_format=torch.channels_last)), expected)
