"""KernelWarehouse's mathematics against closed forms, loops and plain convolutions."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from warehouses import CASES, HALVES, draw, make

from morse.modules import Warehouse, set_temperature

pytestmark = pytest.mark.filterwarnings("ignore:this warehouse does not save")


def plain(x, kernel, layer):
    place = layer.stride, layer.padding, layer.dilation, layer.groups
    return functional.conv2d(x, kernel, layer.bias, *place)


def assembled_by_loops(layer, cells, weights):
    """One sample's kernel from (m, n) weights, one number at a time."""
    kernel = torch.zeros(layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    kernel = kernel.to(cells)
    c_o, c_i, taps = cells.shape[1], cells.shape[2], cells.shape[3:]
    g_o, g_i = kernel.shape[0] // c_o, kernel.shape[1] // c_i
    for o in range(kernel.shape[0]):
        for i in range(kernel.shape[1]):
            for y in range(kernel.shape[2]):
                for x in range(kernel.shape[3]):
                    tap = y * kernel.shape[3] + x if taps == (1, 1) else 0
                    inside = (0, 0) if taps == (1, 1) else (y, x)
                    mixture = (tap * g_o + o // c_o) * g_i + i // c_i
                    column = cells[(slice(None), o % c_o, i % c_i, *inside)]
                    kernel[o, i, y, x] = weights[mixture] @ column
    return kernel


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("case", CASES)
def test_forward_is_a_convolution_a_sample(case, dtype, close):
    network = make(case, dtype, tau=0.3)
    for layer in network["layers"]:
        x = draw(layer, dtype=dtype)
        kernels = layer.assembled_kernel(x)
        rows = [plain(row[None], k, layer) for row, k in zip(x, kernels, strict=True)]
        assert_close(layer(x), torch.cat(rows), rtol=close, atol=close)


@pytest.mark.parametrize("case", CASES)
def test_assembled_kernel_is_the_formula(case):
    network = make(case, torch.float64, tau=0.3)
    for layer in network["layers"]:
        x = draw(layer, 2, torch.float64)
        weights = layer.attentions(x)
        assert weights.shape == (2, layer.attention.mixtures, network["bank"].plan.n)
        expected = assembled_by_loops(layer, network["bank"].cells, weights[1])
        assert_close(layer.assembled_kernel(x)[1], expected)


@pytest.mark.parametrize("case", CASES)
def test_begins_as_fixed_cells(case):
    network = make(case, torch.float64, tau=1.0)
    bank, used = network["bank"], []
    for layer, part in zip(network["layers"], bank.plan.layers, strict=True):
        cells = list(part.initial_cell)
        null = [cell == bank.plan.n for cell in cells]
        used += [cell for cell in cells if cell < bank.plan.n]
        budget = bank.budget
        assert sum(null) == (round((1 - budget) * len(cells)) if budget < 1 else 0)
        one_hot = torch.eye(bank.plan.n + 1, dtype=torch.float64)[cells][:, :-1]
        kernel = assembled_by_loops(layer, bank.cells, one_hot)
        x = draw(layer, dtype=torch.float64)
        output = layer(x)
        assert_close(output, plain(x, kernel, layer))
        for parameter in layer.attention.parameters():
            nn.init.normal_(parameter)
        assert_close(layer(x), output, rtol=0, atol=0)
    # Every cell once for budgets up to 1, every budget-th above.
    assert used == list(range(0, bank.plan.n, max(1, int(bank.budget))))


def logits_by_hand(attention, x):
    """The map from pooled features to (B, m, n + 1) logits, cell by cell."""
    hidden = functional.relu(attention.norm1(attention.fc1(x.mean((2, 3)))))
    rows = attention.fc2(hidden).view(len(x), attention.mixtures, -1)
    if not hasattr(attention, "fc3"):
        return rows
    bias, n = attention.basis_bias.view(attention.mixtures, -1), attention.n
    others = iter((rows[..., attention.local : -1] @ attention.fc3.weight.mT).unbind(-1))
    own = range(attention.start, attention.start + attention.local)
    columns = [rows[..., j - attention.start] if j in own else next(others) for j in range(n)]
    return torch.stack([*columns, rows[..., -1]], -1) + bias


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_attentions_are_normalised_by_magnitude(case):
    network = make(case, torch.float64)
    for layer in network["layers"]:
        x, attention = draw(layer, dtype=torch.float64), layer.attention
        logits = logits_by_hand(attention, x)
        size, weights = logits.abs().sum(-1, keepdim=True), layer.attentions(x)
        assert_close(weights, (logits / (size + 1e-3))[..., :-1])
        null = logits[..., -1:].abs() / (size + 1e-3)
        assert_close(weights.abs().sum(-1, keepdim=True) + null, size / (size + 1e-3))
        assert weights.abs().sum(-1).max() <= 1
        assert (weights < 0).any() and (weights > 0).any()
        # Only the direction matters once logits are large.
        for last in (
            attention.fc2.weight,
            attention.fc2.bias,
            getattr(attention, "basis_bias", None),
        ):
            if last is not None:
                last *= 1e6
        assert_close(layer.attentions(x), (logits / size)[..., :-1], rtol=1e-6, atol=1e-9)


def test_attentions_are_affine_in_temperature():
    network = make("half", torch.float64)
    layer = network["layers"][0]
    x, found = draw(layer, dtype=torch.float64), {}
    for tau in (0.0, 0.3, 1.0):
        set_temperature(network, tau)
        found[tau] = layer.attentions(x)
    assert_close(found[0.3], 0.7 * found[0.0] + 0.3 * found[1.0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_rows_are_independent(case, norm):
    network = make(case, torch.float64, norm=norm)
    for layer in network["layers"]:
        x, order = draw(layer, dtype=torch.float64), torch.tensor([2, 0, 1])
        output = layer(x)
        assert_close(layer(x[order]), output[order])
        assert_close(torch.cat([layer(row[None]) for row in x]), output)


@pytest.mark.parametrize("case", ["half", "grouped", "basis"])
def test_one_conditioning_row_serves_all(case):
    network = make(case, torch.float64, tau=0.2, cond_dim=5)
    layer = network["layers"][0]
    assert layer.attention.fc1.weight.shape == (16, 5)
    x, rows = draw(layer, dtype=torch.float64), torch.randn(3, 5).double()
    assert_close(layer(x, rows[:1]), layer(x, rows[:1].expand(3, 5)))
    assert layer.attentions(x, rows[:1]).shape == layer.attentions(x, rows).shape
    assert layer.assembled_kernel(x, rows[:1]).shape == layer.assembled_kernel(x, rows).shape
    assert_close(layer(x, rows)[1:2], layer(x[1:2], rows[1:2]))
    calls = layer.attentions(x, rows), layer.attentions(torch.randn_like(x), rows)
    assert_close(*calls, rtol=0, atol=0)


@pytest.mark.parametrize("kind, shape", [("conv1d", (9,)), ("conv3d", (3, 4, 5))])
def test_other_numbers_of_axes(kind, shape):
    torch.manual_seed(0)
    warehouse = Warehouse(budget=0.5, **HALVES, norm="layer")
    options = {"stride": 2, "padding": 1, "bias": True}
    layer = getattr(warehouse, kind)(4, 8, 3, **options)
    warehouse.build()
    nn.init.normal_(layer.bias)
    layer.set_temperature(0.5)
    x = torch.randn(2, 4, *shape)
    convolve = getattr(functional, kind)
    kernels = layer.assembled_kernel(x)
    rows = [convolve(x[b : b + 1], kernels[b], layer.bias, 2, 1) for b in range(2)]
    assert_close(layer(x), torch.cat(rows), rtol=1e-5, atol=1e-5)


def test_linear_layers():
    torch.manual_seed(0)
    warehouse = Warehouse(budget=2, norm="layer")
    layer, conv = warehouse.linear(8, 12, bias=True), warehouse.conv1d(8, 12, 3)
    warehouse.build()
    layer.set_temperature(0.5)
    x = torch.randn(2, 3, 5, 8)
    kernel = layer.assembled_kernel(x)
    assert kernel.shape == (2, 12, 8, 1) and layer.attentions(x).shape == (2, 1, 8)
    expected = torch.einsum("bpqi,boi->bpqo", x, kernel[..., 0]) + layer.bias
    assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert layer(x[:, 0, 0]).shape == (2, 12) and conv(x[:, 0].mT).shape == (2, 12, 3)


@pytest.mark.parametrize("cond_dim", [None, 5])
@pytest.mark.parametrize("case", ["one", "half", "grouped", "basis"])
def test_an_empty_batch(case, cond_dim):
    network = make(case, tau=0.3, cond_dim=cond_dim, norm="batch")
    for layer in network["layers"]:
        x, rows = draw(layer), () if cond_dim is None else (torch.zeros(3, 5),)
        expected, none = layer(x, *rows), [each[:0] for each in rows]
        kernels, weights = layer.assembled_kernel(x, *rows), layer.attentions(x, *rows)
        found = layer.train()(x[:0], *none)
        assert found.shape == (0, *expected.shape[1:]) and found.requires_grad
        assert layer.assembled_kernel(x[:0], *none).shape == (0, *kernels.shape[1:])
        assert layer.attentions(x[:0], *none).shape == (0, *weights.shape[1:])


def test_an_empty_batch_of_a_linear_layer():
    warehouse = Warehouse(norm="layer")
    layer = warehouse.linear(8, 12)
    warehouse.build()
    for shape in ((0, 8), (0, 3, 8), (0, 3, 5, 8)):
        assert layer(torch.zeros(shape)).shape == (*shape[:-1], 12)


def test_official_initialisation():
    torch.manual_seed(0)
    warehouse = Warehouse(budget=2)
    layers = [warehouse.conv2d(32, 32, 3, padding=1), warehouse.conv2d(32, 64, 1)]
    warehouse.build()
    attention = layers[0].attention
    expected = (2 / (9 * (warehouse.plan.n + 1))) ** 0.5
    assert attention.fc2.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert attention.fc1.bias is None and not attention.fc2.bias.any()
    for part in warehouse.plan.layers:
        own = warehouse.cells[part.start : part.stop]
        fan_out = len(own) * 32
        assert own.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_a_fresh_output_shrinks_to_a_fifth():
    torch.manual_seed(0)
    warehouse = Warehouse()
    layers = [warehouse.conv2d(64, 64, 3, padding=1) for _ in range(4)]
    warehouse.build()
    x, spread = torch.randn(8, 64, 8, 8), []
    for tau in (1.0, 0.0):
        layers[0].set_temperature(tau)
        spread.append(layers[0](x).std().item())
    # The authors' code measured 1.37 and 0.28.
    assert spread == pytest.approx([1.37, 0.28], rel=0.1)
