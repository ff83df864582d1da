"""KernelWarehouse's shared bank in copies, state dicts, gradients, compiled and low precision."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from warehouses import CASES, draw, make

from morse.modules import KWConv2d, ODConv2d, Warehouse, set_temperature

pytestmark = pytest.mark.filterwarnings("ignore:this warehouse does not save")


def test_the_bank_is_shared():
    network = make("whole", torch.float64)
    first, second = network["layers"]
    second.attention.load_state_dict(first.attention.state_dict())
    x, bank = draw(first, dtype=torch.float64), network["bank"]
    before = first.assembled_kernel(x)
    assert_close(second.assembled_kernel(x), before)
    with torch.no_grad():
        bank.cells[5] += 1.0
    assert (first.assembled_kernel(x) - before).abs().max() > 1e-3
    assert_close(second.assembled_kernel(x), first.assembled_kernel(x))

    grads = []
    for layers in ([first], [second], [first, second]):
        bank.cells.grad = None
        sum(layer(x).square().sum() for layer in layers).backward()
        grads.append(bank.cells.grad.clone())
    assert_close(grads[2], grads[0] + grads[1])


def test_the_bank_is_one_parameter_also_in_copies(tmp_path):
    network = make("half", tau=0.4)
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    assert [name for name in names if "cells" in name] == ["bank.cells"]
    assert [name for name in network.state_dict() if "cells" in name] == ["bank.cells"]
    assert not any("temp_bias" in name for name in network.state_dict())
    bank = network["bank"].cells
    groups = torch.optim.SGD(network.parameters(), lr=0.1).param_groups
    assert sum(p is bank for group in groups for p in group["params"]) == 1

    x = draw(network["layers"][0])
    clone = copy.deepcopy(network)
    assert_close(clone["layers"][0](x), network["layers"][0](x), rtol=0, atol=0)
    with torch.no_grad():
        clone["bank"].cells.zero_()
    assert not clone["layers"][0](x).any() and network["layers"][0](x).any()
    # safetensors refuses tensors that share memory.
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    fresh = make("half", seed=1)
    fresh.load_state_dict(load_file(tmp_path / "network.safetensors"))
    for own, other in zip(fresh["layers"], network["layers"], strict=True):
        assert own.temperature == 0.4
        assert_close(own(draw(own)), other(draw(own)), rtol=0, atol=0)


@pytest.mark.parametrize("case", ["half", "basis"])
def test_the_first_assignment_survives_to_empty(case):
    network = make(case, tau=0.5)
    layer, x = network["layers"][0], draw(network["layers"][0])
    expected = layer(x)
    with torch.device("meta"):
        fresh = make(case)
    fresh.to_empty(device="cpu")
    for each in fresh["layers"]:
        each.attention.temp_bias.fill_(float("nan"))  # what `to_empty` finds is chance
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh["layers"][0](x), expected)
    attention = fresh["layers"][0].attention
    attention.temp_bias.fill_(float("nan"))
    attention.reset_parameters()
    assert torch.equal(attention.temp_bias, layer.attention.temp_bias)


def test_layers_begin_anew():
    layer = make("one")["layers"][1]
    assert layer.bias.any() and layer.attention.fc2.bias.any()
    layer.reset_parameters()
    assert not layer.bias.any() and not layer.attention.fc2.bias.any()
    KWConv2d(8, 8, 3, bias=True).reset_parameters()  # one that is not built


def test_copies_before_build_are_built_on_their_own():
    warehouse = Warehouse(norm="layer")
    network = nn.ModuleList([warehouse, warehouse.conv2d(4, 4, 3), warehouse.conv2d(4, 4, 1)])
    clone = copy.deepcopy(network)
    clone[0].build()
    assert clone[0].plan.n == 10 and clone[1](torch.ones(2, 4, 5, 5)).shape == (2, 4, 3, 3)
    with pytest.raises(RuntimeError):
        network[1](torch.ones(2, 4, 5, 5))
    warehouse.build()
    assert network[2](torch.ones(1, 4, 2, 2)).shape == (1, 4, 2, 2)


def test_temperature_of_fresh_trained_and_official_layers():
    network = make("half", norm="batch")
    layer = network["layers"][0]
    fresh = make("half", tau=1.0, seed=1, norm="batch")
    assert Warehouse().conv2d(4, 4, 1).temperature == 1.0
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for tau in (0.5, 0.0):
        set_temperature(network, tau)
        layer(draw(layer)).square().mean().backward()
        optimizer.step()
    state = network.eval().state_dict()
    fresh.load_state_dict(state)
    assert_close(fresh["layers"][0](draw(layer)), layer(draw(layer)), rtol=0, atol=0)

    set_temperature(fresh, 1.0)
    fresh.load_state_dict({k: v for k, v in state.items() if "temperature" not in k})
    assert fresh["layers"][0].temperature == 0.0
    set_temperature(fresh, 0.7)
    fresh.load_state_dict({}, strict=False)
    assert fresh["layers"][0].temperature == 0.7


def test_one_setter_for_both_dynamic_layers():
    network = nn.ModuleList([make("one"), ODConv2d(4, 4, 3)])
    assert set_temperature(network, 0.25) == 3
    assert network[1].temperature == network[0]["layers"][1].temperature == 0.25


class Pick(nn.Module):
    """One layer of a network, whose bank is found beside it."""

    def __init__(self, network, index):
        super().__init__()
        self.network, self.index = network, index

    def forward(self, x):
        return self.network["layers"][self.index](x)


@pytest.mark.parametrize("case", ["half", "basis", "grouped"])
def test_gradients_are_right(case):
    network = make(case, torch.float64, tau=0.3)
    layer, whole = network["layers"][1], Pick(network, 1)
    x = draw(layer, 2, torch.float64)[..., :4, :4].clone().requires_grad_()
    names, values = zip(*whole.named_parameters(), strict=True)

    def run(x, *parameters):
        swapped = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(whole, swapped, (x,))

    used = ["bank" in name or "layers.1." in name for name in names]
    # Only what the layer reads, since every number is perturbed on its own.
    inputs = [v if own else v.detach() for v, own in zip(values, used, strict=True)]
    assert torch.autograd.gradcheck(run, (x, *inputs), fast_mode=True)
    run(x, *values).square().sum().backward()
    for value, own in zip(values, used, strict=True):
        assert value.grad.abs().max() > 0 if own else value.grad is None


@pytest.mark.parametrize("case, backend", [("half", "aot_eager"), ("basis", "eager")])
def test_compiles_without_breaks_or_recompiling(case, backend):
    layer = make(case)["layers"][1]
    x, counter = draw(layer), CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for tau in (1.0, 0.5, 0.4, 0.3):
        layer.set_temperature(tau)
        assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES)
def test_autocast_and_low_precision(case):
    network = make(case, tau=0.2)
    for layer in network["layers"]:
        x = draw(layer)
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            output, single = layer(x), layer(x[:1])
        assert output.dtype == single.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits.
        close = {"rtol": 0.05, "atol": 0.05 * expected.abs().max().item()}
        assert_close(output.float(), expected, **close)
        assert_close(single.float(), expected[:1], **close)
    low = copy.deepcopy(network).bfloat16()["layers"][0]
    expected = network["layers"][0](draw(low))
    output = low(draw(low).bfloat16())
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
