"""What a warehouse costs, which budgets fit, and what is refused with which words."""

import warnings

import pytest
import torch
from doctests import run_examples
from torch.testing import assert_close
from warehouses import HALVES, draw, make

from morse.modules import Warehouse, kernel_warehouse, kernel_warehouse_layers, set_temperature

pytestmark = pytest.mark.filterwarnings("ignore:this warehouse does not save")


@pytest.mark.parametrize(
    "channels, spatial, whole",
    [(32, 199_312, 23_056), (64, 256_656, 80_400), (128, 481_936, 305_680)],
)
def test_the_plan_compares_with_plain_convolutions(channels, spatial, whole):
    plain_parameters = 4 * channels**2 * 9
    for partition, total in ((True, spatial), (False, whole)):
        warehouse = Warehouse(budget=0.5, **HALVES, spatial_partition=partition)
        with torch.device("meta"):
            layers = [warehouse.conv2d(channels, channels, 3) for _ in range(4)]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                plan = warehouse.build().plan
        assert plan.parameters == total and plan.plain_parameters == plain_parameters
        own = sum(p.numel() for layer in layers for p in layer.parameters())
        assert own + warehouse.cells.numel() == total
        saves = total < plain_parameters
        assert ("does not save" in str(plan)) == (not saves) == bool(caught)
        assert f"{total:,}" in str(plan) and f"{plain_parameters:,}" in str(plan)
        # The bank is b times the plain convolutions where b * sum(m) is whole.
        assert plan.bank_parameters == plain_parameters / 2


def test_as_many_cells_as_kernels_do_not_save():
    warehouse = Warehouse(budget=1)
    warehouse.conv2d(8, 8, 3)
    with pytest.warns(UserWarning, match="does not save parameters"):
        warehouse.build()


@pytest.mark.parametrize(
    "budget, ratio, works",
    [
        (0.5, 0.5, True),
        (0.25, 0.5, True),
        (0.25, 1.0, True),
        (1 / 3, 0.5, True),
        (2, 1.0, True),
        (3, 0.5, True),
        (0.5, 1.0, False),
        (1.5, 1.0, False),
        (0.3, 0.5, False),
        (0.49, 0.5, False),
        (0.334, 0.5, False),
        (1.01, 1.0, False),
    ],
)
def test_which_budgets_fit(budget, ratio, works):
    def build():
        warehouse = Warehouse(budget, ratio, ratio, norm="layer")
        layers = [warehouse.conv2d(8, 8, 3, padding=1) for _ in range(2)]
        warehouse.build()
        return layers[0](torch.ones(1, 8, 4, 4))

    if works:
        build()
    else:
        with pytest.raises(ValueError, match="budget"):
            build()


def test_what_does_not_fit_names_what_does():
    warehouse = Warehouse(budget=0.5)
    for _ in range(2):
        warehouse.conv2d(8, 8, 3)
    with pytest.raises(ValueError, match=r"\[9, 9\] mixtures.*1/2, 1/4, 1/8;"):
        warehouse.build()
    with pytest.raises(ValueError, match="1/4 and 1/3"):
        Warehouse(budget=0.3)
    with pytest.raises(ValueError, match="1 and 2"):
        Warehouse(budget=1.5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"budget": 0}, "budget"),
        ({"budget": -1.0}, "budget"),
        ({"budget": float("nan")}, "budget"),
        ({"budget": float("inf")}, "budget"),
        ({"budget": 1e-320}, "budget"),
        ({"cell_in_ratio": 0.0}, "cell_in_ratio"),
        ({"cell_out_ratio": 1.5}, "cell_out_ratio"),
        ({"reduction": 0}, "reduction"),
        ({"reduction": float("inf")}, "reduction"),
        ({"budget": 10**400}, "below 1e9"),
        ({"basis_ratio": 0.0}, "basis_ratio"),
        ({"basis_ratio": 2.0}, "basis_ratio"),
        ({"norm": "instance"}, "norm"),
        ({"cond_dim": 0}, "cond_dim"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(ValueError, match=words):
        Warehouse(**options)


def test_bad_layers():
    warehouse = Warehouse(cell_in_ratio=0.4, spatial_partition=False)
    for arguments, words in [
        ((0, 8, 3), "in_ch"), ((8, 0, 3), "out_ch"), ((8, 8, 0), "kernel_size"),
        ((8, 8, (3, 3, 3)), "kernel_size"), ((8, 8, 3, 1, 0, 1, 3), "groups=3"),
        ((8, 8, 3, 1, 0, 1, 0), "groups"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            warehouse.conv2d(*arguments)
    warehouse.conv2d(8, 8, 3)
    for wrong in (lambda: warehouse.conv2d(8, 8, 1), lambda: warehouse.conv1d(8, 8, 3)):
        with pytest.raises(ValueError, match="kernel_size must be"):
            wrong()
    with pytest.raises(ValueError, match="cells of 3 channels"):
        warehouse.build()


def test_wrong_order():
    warehouse = Warehouse(norm="layer")
    with pytest.raises(RuntimeError, match="layers"):
        warehouse.build()
    layer = warehouse.conv2d(4, 4, 3)
    x = torch.ones(2, 4, 5, 5)
    for early in (lambda: layer(x), lambda: layer.attentions(x), lambda: warehouse.plan):
        with pytest.raises(RuntimeError, match="build"):
            early()
    warehouse.build()
    for late in (
        lambda: warehouse.conv2d(4, 4, 3),
        lambda: warehouse.linear(4, 4),
        warehouse.build,
    ):
        with pytest.raises(RuntimeError, match="build"):
            late()


def test_bad_inputs():
    layer = make("half")["layers"][0]
    x = draw(layer)
    for bad in (x[0], x[:, :5], x[..., None]):
        with pytest.raises(ValueError, match=r"x must be \(B, 8, \*, \*\)"):
            layer(bad)
    with pytest.raises(ValueError, match="set cond_dim"):
        layer(x, torch.zeros(3, 4))
    conditioned = make("half", cond_dim=4)["layers"][0]
    with pytest.raises(ValueError, match="cond is missing"):
        conditioned(x)
    for shape in ((3, 5), (2, 4), (4,)):
        with pytest.raises(ValueError, match="cond must be"):
            conditioned(x, torch.zeros(shape))
    warehouse = Warehouse()
    linear = warehouse.linear(8, 4)
    warehouse.build()
    for bad in (torch.ones(8), torch.ones(2, 5)):
        with pytest.raises(ValueError, match=r"x must be \(B, ..., 8\)"):
            linear(bad)


def test_bad_temperatures():
    network = make("half", tau=0.5)
    for tau in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            set_temperature(network, tau)
    assert network["layers"][0].temperature == 0.5


def test_batch_norm_names_the_way_out():
    network = make("half", norm="batch").train()
    layer = network["layers"][0]
    with pytest.raises(ValueError, match="norm='layer'"):
        layer(draw(layer, 1))
    layer.attention.norm1.eval()
    layer(draw(layer, 1))
    layer = make("half", norm="batch", cond_dim=4).train()["layers"][0]
    with pytest.raises(ValueError, match="single row"):
        layer(draw(layer), torch.zeros(1, 4))
    layer = make("half").train()["layers"][0]
    assert_close(layer(draw(layer, 3)[:1]), layer(draw(layer, 3))[:1])


def test_nothing_nonlocal_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warehouse = Warehouse(budget=2, basis_ratio=0.5, norm="layer")
        layer = warehouse.conv2d(8, 8, 3)
        warehouse.build()
    assert layer.attention.fc3.weight.shape == (0, 16)
    assert layer(torch.ones(2, 8, 4, 4)).shape == (2, 8, 2, 2)


def test_examples():
    layers = {"KWConv1d", "KWConv2d", "KWConv3d", "KWLinear"}
    assert run_examples(kernel_warehouse) == {"Warehouse"}
    assert run_examples(kernel_warehouse_layers) == layers
