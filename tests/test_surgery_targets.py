"""What network surgery prunes, and with which settings."""

import pytest
import torch
from test_network_surgery import make_network
from torch import nn
from torch.testing import assert_close

from morse.compression import NetworkSurgery


def test_default_targets_are_convolutions_and_linear_layers():
    network, _, _ = make_network()
    network[4].weight.requires_grad_(False)
    surgery = NetworkSurgery(network)
    assert list(surgery.masks) == ["0.weight", "0.bias", "4.bias"]
    assert all(mask.dtype == torch.bool and mask.all() for mask in surgery.masks.values())
    assert [mask.shape for mask in surgery.masks.values()] == [(6, 2, 3, 3), (6,), (5,)]
    transposed = nn.ModuleDict({"up": nn.ConvTranspose1d(2, 3, 2), "emb": nn.Embedding(3, 3)})
    assert list(NetworkSurgery(transposed, prune_bias=False).masks) == ["up.weight"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "body.0"}, ["body.0.weight", "body.0.bias"]),
        ({"include": ["body"]}, ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"]),
        ({"include": ["*.weight"]}, ["body.0.weight", "body.2.weight", "out.weight"]),
        ({"include": "body.*", "exclude": "*.2"}, ["body.0.weight", "body.0.bias"]),
        ({"exclude": ["body", "*.bias"]}, ["out.weight"]),
        ({"include": "body.1.weight"}, ["body.1.weight"]),
        ({"include": "scale"}, ["scale"]),
        ({"include": "out.bias", "prune_bias": False}, ["out.bias"]),
    ],
)
def test_include_and_exclude(options, expected):
    body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    network = nn.ModuleDict({"body": body, "out": nn.Linear(4, 2)})
    network.register_parameter("scale", nn.Parameter(torch.ones(4)))
    assert sorted(NetworkSurgery(network, **options).masks) == sorted(expected)


def test_settings_by_layer():
    network = nn.ModuleDict({name: nn.Linear(20, 20) for name in ("a1", "a2", "b")})
    rates = {"a*": 1.0, "a2": -9.0}
    nn.init.normal_(network["b"].weight)
    surgery = NetworkSurgery(network, c_rate=rates, iter_stop={"b": 1}, gamma=0.0)
    assert surgery.step() == {"a1": True, "a2": True, "b": True}
    for name, rate in {"a1": 1.0, "a2": -9.0, "b": 3.0}.items():
        low, high, mu, std = surgery.thresholds[name]
        sizes = torch.cat([p.detach().flatten() for p in network[name].parameters()]).abs()
        assert_close(mu, sizes.double().mean().item())
        assert_close(std, sizes.double().std(correction=0).item())
        goal = max(mu + rate * std, 0)
        assert_close((low, high), (0.9 * goal, 1.1 * goal))
    assert surgery.density("a2") == 1 and 0.05 < surgery.density("a1") < 0.3
    assert surgery.density("b.weight") == surgery.masks["b.weight"].double().mean().item()
    assert surgery.step() == {"a1": True, "a2": True, "b": False}
