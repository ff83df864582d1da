"""Network surgery within training loops, copies and compilers; its end."""

import copy
import warnings

import pytest
import torch
from test_network_surgery import adam, make_network, raw, train
from torch import nn
from torch.nn import functional

from morse.compression import NetworkSurgery, save_sparse


def test_finalize_keeps_outputs_and_objects():
    network, x, y = make_network()
    plain = {name: parameter.shape for name, parameter in network.named_parameters()}
    parameters = dict(network.named_parameters())
    frozen = nn.Linear(5, 5).double().requires_grad_(False)
    dash = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    whole = nn.Sequential(network, frozen)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)  # made before the surgery
    surgery = NetworkSurgery(whole, c_rate=0.5, iter_stop=20)
    train(whole, surgery, optimizer, x, y, 25)
    output, masks = whole(x), {name: mask.clone() for name, mask in surgery.masks.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert surgery.finalize() is whole
    assert torch.equal(whole(x), output)
    assert {name: parameter.shape for name, parameter in network.named_parameters()} == plain
    assert list(network.state_dict()) == list(plain)
    assert not list(whole.buffers()) and type(network[0]) is nn.Conv2d
    assert not network[0]._forward_hooks and not network[0]._forward_pre_hooks
    for name, parameter in network.named_parameters():
        assert parameter is parameters[name] and parameter.requires_grad
        if f"0.{name}" in masks:
            assert torch.equal(parameter != 0, masks[f"0.{name}"])
            assert not torch.signbit(parameter[parameter == 0]).any()
    for name, tensor in frozen.state_dict().items():
        assert torch.equal(tensor, dash[name])
    train_on = functional.mse_loss(whole(x), y)
    train_on.backward()
    optimizer.step()


def test_without_biases_the_parameters_keep_their_order():
    network, _, _ = make_network()
    names = list(network.state_dict())
    surgery = NetworkSurgery(network, c_rate=0.5, prune_bias=False, iter_stop=1)
    surgery.step()
    assert list(surgery.finalize().state_dict()) == names


def test_after_finalize_nothing_goes_on():
    surgery = NetworkSurgery(nn.Linear(8, 8), iter_stop=1, c_rate=0.0)
    surgery.step()
    density, state = surgery.density(), surgery.state_dict()
    module = surgery.finalize()
    for action in (surgery.step, surgery.finalize, surgery.freeze):
        with pytest.raises(ValueError, match="after finalize"):
            action()
    with pytest.raises(ValueError, match="after finalize"):
        surgery.load_state_dict(state)
    assert surgery.density() == density
    assert NetworkSurgery(module).density() == 1  # another one may follow


def test_copies_are_independent():
    network, x, y = make_network()
    surgery = NetworkSurgery(network, c_rate=0.5, gamma=0.1)
    train(network, surgery, adam(network), x, y, 3)
    twin = copy.deepcopy(surgery)
    assert twin.module is not network and torch.equal(twin.module(x), network(x))
    train(twin.module, twin, adam(twin.module), x, y, 10)
    train(network, surgery, adam(network), x, y, 10)
    assert torch.equal(twin.module(x), network(x))
    masks = {name: mask.clone() for name, mask in surgery.masks.items()}
    train(twin.module, twin, adam(twin.module), x, -y, 5)
    assert all(torch.equal(mask, masks[name]) for name, mask in surgery.masks.items())


def test_finalize_leaves_copies_alone():
    network, x, _ = make_network()
    surgery = NetworkSurgery(network, c_rate=0.5, iter_stop=1)
    surgery.step()
    expected = network(x)
    other, average = copy.deepcopy(surgery), torch.optim.swa_utils.AveragedModel(network)
    other.finalize()
    assert torch.equal(other.module(x), expected) and torch.equal(network(x), expected)
    surgery.finalize()
    assert torch.equal(network(x), expected) and torch.equal(average(x), expected)
    assert [type(layer) for layer in network] == [type(layer) for layer in make_network()[0]]


def test_an_average_of_raw_weights_takes_the_latest_masks_and_is_finished(tmp_path):
    network, x, y = make_network()
    surgery = NetworkSurgery(network, c_rate=0.5, gamma=0.0, iter_stop=5)
    average = torch.optim.swa_utils.AveragedModel(network)
    optimizer = adam(network)
    for _ in range(5):
        train(network, surgery, optimizer, x, y, 1)
        average.update_parameters(network)
    for name, mask in surgery.masks.items():
        layer, own = name.split(".")
        assert torch.equal(getattr(average.module[int(layer)], own) != 0, mask)
    for refuse in (NetworkSurgery, lambda module: save_sparse(module, tmp_path / "average")):
        with pytest.raises(ValueError, match="into the module of a copy of the surgery"):
            refuse(average.module)
    before = network(x)
    twin = copy.deepcopy(surgery)
    twin.module.load_state_dict(average.module.state_dict())
    assert torch.equal(twin.finalize()(x), average(x)) and torch.equal(network(x), before)
    save_sparse(twin.module, tmp_path / "average")
    assert not surgery.finalized and not torch.equal(average(x), before)


def test_layers_pruned_in_part_have_their_order_back():
    layer = nn.Linear(3, 2)
    order = list(layer.parameters())
    surgery = NetworkSurgery(layer, c_rate=-1.0, prune_bias=False, iter_stop=1)
    assert [parameter.dim() for parameter in layer.parameters()] == [1, 2]
    surgery.step()
    surgery.finalize()
    assert all(a is b for a, b in zip(layer.parameters(), order, strict=True))


def test_state_dicts_hold_raw_weights_and_masks():
    network, x, y = make_network()
    surgery = NetworkSurgery(network, c_rate=0.5)
    train(network, surgery, adam(network), x, y, 3)
    other, _, _ = make_network(seed=1)
    copied = NetworkSurgery(other)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))
    assert all(torch.equal(copied.masks[name], mask) for name, mask in surgery.masks.items())


def test_broadcast_reaches_the_masks(tmp_path):
    """DDP sends rank 0's buffers to the others before each forward."""
    networks = [make_network(seed)[0] for seed in (0, 0)]
    surgeries = [NetworkSurgery(network, c_rate=0.5) for network in networks]
    surgeries[0].step()
    x = make_network()[1]
    assert not torch.equal(networks[0](x), networks[1](x))
    for source, target in zip(networks[0].buffers(), networks[1].buffers(), strict=True):
        target.copy_(source)
    assert torch.equal(networks[0](x), networks[1](x))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(networks[0])
        train(wrapped, surgeries[0], adam(wrapped), x, make_network()[2], 3)
        assert 0 < surgeries[0].density() < 0.5
        # Before its process group, which it else takes down holding the GIL that gloo's thread may
        # be waiting for: a deadlock now and then.
        del wrapped
    finally:
        torch.distributed.destroy_process_group()


def test_lower_precision():
    for dtype in (torch.float32, torch.bfloat16):
        network, x, y = make_network(dtype=dtype)
        surgery = NetworkSurgery(network, c_rate=0.5, gamma=0.0)
        optimizer = adam(network)
        for _ in range(3):
            surgery.step()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = network(x)
            assert output.dtype == torch.bfloat16
            functional.mse_loss(output.float(), y.float()).backward()
            assert all(parameter.grad.dtype == dtype for parameter in network.parameters())
            optimizer.step()
        weight = network[4].weight
        assert torch.equal(weight != 0, surgery.masks["4.weight"] & (raw(network)["4.weight"] != 0))
        assert torch.equal(weight[weight != 0], raw(network)["4.weight"][weight != 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_thresholds_are_not_rounded_to_the_weights(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(200, 100, bias=False).to(dtype)
    sizes = layer.weight.detach().double().abs()
    surgery = NetworkSurgery(layer, c_rate=0.5, gamma=0.0)
    surgery.step()
    assert torch.equal(surgery.masks["weight"], sizes > surgery.thresholds[""].prune_below)


def test_a_cast_module_keeps_its_masks():
    network, x, _ = make_network()
    surgery = NetworkSurgery(network, c_rate=0.5)
    surgery.step()
    masks = {name: mask.clone() for name, mask in surgery.masks.items()}
    network.to(torch.float32)
    assert network(x.float()).dtype == torch.float32
    assert all(torch.equal(mask, masks[name]) for name, mask in surgery.masks.items())
    assert surgery.masks["4.weight"] is network[4].parametrizations.weight[0].mask


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    network, x, y = make_network()
    twin, _, _ = make_network()
    surgery, other = NetworkSurgery(network, c_rate=0.5), NetworkSurgery(twin, c_rate=0.5)
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    train(compiled, surgery, adam(network), x, y, 4)
    train(twin, other, adam(twin), x, y, 4)
    torch.testing.assert_close(compiled(x), twin(x))
    torch._dynamo.reset()


def test_other_modules_that_read_weights():
    """Attention reads its output layer's weight itself, past hooks on that layer."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2)
    x = torch.randn(3, 1, 8)
    surgery = NetworkSurgery(attention, c_rate=-9.0)
    surgery.masks["out_proj.weight"].zero_()
    assert torch.count_nonzero(attention(x, x, x)[0]) == 0
    surgery.freeze()
    surgery.finalize()
    assert torch.count_nonzero(attention.out_proj.weight) == 0
