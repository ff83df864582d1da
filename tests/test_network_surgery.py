"""Network surgery: masks, gradients, schedules, resuming, and what surrounds training."""

import copy
import doctest

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from morse.compression import NetworkSurgery, network_surgery, sparse


def make_network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(96, 5))
    x, y = torch.randn(8, 2, 4, 4), torch.randn(8, 5)
    return network.to(dtype), x.to(dtype), y.to(dtype)


def raw(network):
    """The raw parameters by the names that they have without surgery."""
    return {
        name.replace("parametrizations.", "").replace(".original", ""): parameter
        for name, parameter in network.named_parameters()
    }


def train(network, surgery, optimizer, x, y, steps):
    for _ in range(steps):
        surgery.step()
        optimizer.zero_grad()
        functional.mse_loss(network(x), y).backward()
        optimizer.step()


def adam(network):
    return torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("module", [network_surgery, sparse])
def test_examples(module):
    result = doctest.testmod(module, globs={})
    assert result.attempted > 3 and result.failed == 0


# Masks and gradients


def test_gradients_reach_pruned_weights_and_move_them():
    network, x, y = make_network()
    surgery = NetworkSurgery(network, c_rate=0.5)
    surgery.step(draws={"0": 0.5, "4": 0.5})
    assert 0 < surgery.density() < 0.5
    before = {name: parameter.detach().clone() for name, parameter in raw(network).items()}
    dense, _, _ = make_network()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.mul_(surgery.masks.get(name, torch.tensor(1)))
    x, other = x.requires_grad_(), x.detach().clone().requires_grad_()
    assert torch.equal(network(x), dense(other))
    functional.mse_loss(network(x), y).backward()
    functional.mse_loss(dense(other), y).backward()
    assert_close(x.grad, other.grad)
    for name, parameter in dense.named_parameters():
        assert_close(raw(network)[name].grad, parameter.grad)
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    mask = surgery.masks["4.weight"]
    moved = raw(network)["4.weight"].detach() - before["4.weight"]
    assert_close(moved, -0.1 * dense[4].weight.grad)
    assert moved[~mask].abs().max() > 0


def test_the_output_ignores_pruned_values_and_splicing_has_a_band():
    network, x, _ = make_network()
    surgery = NetworkSurgery(network, c_rate=0.0, gamma=0.0)
    surgery.step()
    output, weight = network(x), raw(network)["4.weight"]
    low, high, *_ = surgery.thresholds["4"]
    pruned = (~surgery.masks["4.weight"]).nonzero()[0]
    kept = surgery.masks["4.weight"].nonzero()[0]
    with torch.no_grad():
        weight[~surgery.masks["4.weight"]] = 123.0
    assert torch.equal(network(x), output)
    for size, expected in ((high, False), (1.001 * high, True), (-1.001 * low, True), (low, False)):
        with torch.no_grad():
            weight[tuple(pruned)] = size
        surgery.step()
        assert surgery.masks["4.weight"][tuple(pruned)] == expected
    for size, expected in ((1.001 * low, True), (-low, False), (high, False), (-1.01 * high, True)):
        with torch.no_grad():
            weight[tuple(kept)] = size
        surgery.step()
        assert surgery.masks["4.weight"][tuple(kept)] == expected
    assert surgery.flips["4.weight"].spliced == 1
    assert surgery.thresholds["4"][:2] == (low, high)


def test_accumulated_gradients_are_those_of_one_batch():
    network, x, y = make_network()
    surgery = NetworkSurgery(network, c_rate=0.5)
    surgery.step()
    functional.mse_loss(network(x), y).backward()
    whole = {name: parameter.grad.clone() for name, parameter in raw(network).items()}
    network.zero_grad()
    for part in range(4):
        rows = slice(2 * part, 2 * part + 2)
        (functional.mse_loss(network(x[rows]), y[rows]) / 4).backward()
    for name, parameter in raw(network).items():
        assert_close(parameter.grad, whole[name])


def test_gradcheck_of_inputs_and_kept_weights():
    layer = nn.Linear(5, 3).double()
    surgery = NetworkSurgery(layer, c_rate=0.0)
    surgery.step()
    mask, weight = surgery.masks["weight"], layer.parametrizations.weight.original
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def forward(x, kept):
        return functional.linear(
            x, layer.parametrizations.weight[0](weight.masked_scatter(mask, kept))
        )

    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradcheck(forward, (x, weight[mask].detach().requires_grad_()))


# Schedule


def test_probability_of_updates():
    layer = nn.Linear(3, 3)
    surgery = NetworkSurgery(layer, gamma=0.5, power=2.0, iter_stop=4, c_rate=-9.0)
    for iteration, chance in ((0, 1.0), (1, 1 / 2.25), (2, 0.25), (2, 0.25), (3, 0.16)):
        assert surgery.step(iteration, {"": chance - 1e-9})[""]
        assert not surgery.step(iteration, {"": chance})[""]
    assert not surgery.step(4, {"": 0.0})[""]
    surgery = NetworkSurgery(nn.Linear(3, 3), gamma=0.0, c_rate=-9.0)
    assert all(surgery.step()[""] for _ in range(50))
    assert not any(surgery.step(draws={"": 1.0})[""] for _ in range(50))


def test_masks_stay_after_iter_stop_and_freeze():
    for stop in ("iter_stop", "freeze"):
        network, x, y = make_network()
        surgery = NetworkSurgery(network, c_rate=0.5, gamma=0.0, iter_stop=5)
        optimizer = adam(network)
        train(network, surgery, optimizer, x, y, 5 if stop == "iter_stop" else 3)
        if stop == "freeze":
            surgery.freeze()
        masks = {name: mask.clone() for name, mask in surgery.masks.items()}
        weights = {name: parameter.detach().clone() for name, parameter in raw(network).items()}
        train(network, surgery, optimizer, x, y, 20)
        assert all(torch.equal(mask, masks[name]) for name, mask in surgery.masks.items())
        assert all((parameter != weights[name]).any() for name, parameter in raw(network).items())
        assert surgery.flips["4.weight"] == (0, 0)


def test_generators():
    def run(generator):
        network, x, y = make_network()
        surgery = NetworkSurgery(network, c_rate=0.5, gamma=1.0, generator=generator)
        train(network, surgery, adam(network), x, y, 30)
        return surgery.masks

    first, again = (run(torch.Generator().manual_seed(3)) for _ in range(2))
    other, default = run(torch.Generator().manual_seed(4)), (run(None), run(None))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(torch.equal(default[0][name], default[1][name]) for name in first)
    layer, state = nn.Linear(2, 2), torch.get_rng_state()
    NetworkSurgery(layer, c_rate=-9.0).step()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    network, x, y = make_network()
    surgery = NetworkSurgery(network, c_rate=0.5, gamma=0.1)
    optimizer = adam(network)
    train(network, surgery, optimizer, x, y, 10)
    save_file(surgery.state_dict(), tmp_path / "surgery.safetensors")
    weights = {name: parameter.detach().clone() for name, parameter in raw(network).items()}
    resumed, _, _ = make_network(seed=1)
    resumed.load_state_dict(weights)
    again = NetworkSurgery(resumed, c_rate=0.5, gamma=0.1)
    other = adam(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(load_file(tmp_path / "surgery.safetensors"))
    assert again.iteration == 9 and again.thresholds == surgery.thresholds
    before = {name: mask.clone() for name, mask in surgery.masks.items()}
    for run in ((network, surgery, optimizer), (resumed, again, other)):
        train(*run, x, y, 15)
    assert not torch.equal(surgery.masks["4.weight"], before["4.weight"])
    for name, mask in surgery.masks.items():
        assert torch.equal(again.masks[name], mask)
        assert torch.equal(raw(resumed)[name], raw(network)[name])


def test_the_state_is_not_on_the_default_device():
    surgery = NetworkSurgery(make_network()[0], c_rate=0.5)
    surgery.step()
    with torch.device("meta"):
        state = surgery.state_dict()
        assert {value.device.type for value in state.values()} == {"cpu"}
        surgery.load_state_dict(state)
        surgery.step()
    assert surgery.iteration == 1


def test_the_state_before_the_first_step_has_no_thresholds():
    network, _, _ = make_network()
    state = NetworkSurgery(network).state_dict()
    assert not any(name.startswith("thresholds") for name in state)
    surgery = NetworkSurgery(make_network()[0], c_rate=0.5)
    surgery.step()
    surgery.freeze()
    surgery.load_state_dict(state)
    assert (surgery.iteration, surgery.thresholds, surgery.frozen) == (-1, {}, False)
    assert surgery.density() == 1
