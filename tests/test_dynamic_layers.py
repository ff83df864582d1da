"""What dynamic layers of different methods share: the setter of temperatures, and channels last."""

import copy

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from test_odconv import SHAPES, make
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from morse.modules import GridConv2d, ODConv2d, Warehouse, set_temperature

pytestmark = pytest.mark.filterwarnings("ignore:this warehouse does not save")


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
        state = copy.deepcopy(layer.state_dict())
        others = {name: value for name, value in state.items() if name != "temperature"}
        with torch.device("meta"):
            layer.load_state_dict(others)  # without a temperature, as the authors' are
        assert layer.temperature == last
        older = others | {"_extra_state": torch.tensor(0.5, dtype=torch.float64)}
        for each in (state, older):
            layer.set_temperature(1.0)
            layer.load_state_dict(each)
            assert layer.temperature == 0.5 and layer.temperature.dtype == torch.float32
        empty = copy.deepcopy(layer).to("meta")
        empty.load_state_dict(others, assign=True)
        assert empty.temperature == last


class Both(ModelMixin, ConfigMixin):
    """A user's model with layers of two methods."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, width=4):
        super().__init__()
        self.warehouse = Warehouse(norm="layer")
        mixed = self.warehouse.conv2d(width, width, 3)
        self.warehouse.build()
        dynamic = ODConv2d(width, width, 3, kernel_num=2, attention_norm="layer")
        grid = GridConv2d(width, width, dynamic=True, grid_shape=(2, 2), norm="layer")
        self.layers = nn.ModuleList([mixed, dynamic, grid])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def temperatures(self):
        return [float(layer.temperature) for layer in self.layers]


def test_models_of_diffusers_keep_the_temperature(tmp_path):
    model, x = Both().eval(), torch.randn(3, 4, 6, 6)
    for layer, temperature in zip(model.layers, (0.25, 7.5, 3.0), strict=True):
        layer.set_temperature(temperature)
    model.save_pretrained(tmp_path)
    for low in (True, False):
        loaded = Both.from_pretrained(tmp_path, low_cpu_mem_usage=low)
        assert loaded.temperatures() == [0.25, 7.5, 3.0]
        assert_close(loaded(x), model(x))


def test_moving_averages_follow_the_temperature():
    model = Both()
    averages = [AveragedModel(model, use_buffers=averaged) for averaged in (False, True)]
    for temperature in (1.0, 0.5):
        assert set_temperature(model, temperature) == 3
        for average in averages:
            average.update_parameters(model)
    assert [average.module.temperatures() for average in averages] == [[0.5] * 3, [0.75] * 3]
    assert set_temperature(averages[1], 0.5) == 3
    assert averages[1].module.temperatures() == [0.5] * 3


def test_a_temperature_set_before_the_backward_pass_does_not_reach_it():
    model, gradients = Both(), []
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    for then in (1.0, 0.5):
        set_temperature(model, 1.0)
        y = model(x).square().sum()
        set_temperature(model, then)
        gradients.append(torch.autograd.grad(y, x)[0])
    assert_close(*gradients, rtol=0, atol=0)


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
