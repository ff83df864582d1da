"""What network surgery warns of and refuses."""

import warnings

import pytest
import torch
from test_network_surgery import make_network
from torch import nn

from morse.compression import NetworkSurgery


def test_warnings():
    surgery = NetworkSurgery(nn.Sequential(nn.Linear(50, 8)), c_rate=1e9)
    with pytest.warns(UserWarning, match=r"0 of the 400 entries of '0\.weight' are left"):
        surgery.step()
    assert surgery.density() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        surgery.step()
    with pytest.warns(UserWarning, match=r"iter_stop was not reached \(iteration 1\) in layers"):
        surgery.finalize()


@pytest.mark.parametrize("c_rate", [-1e9, -float("inf")])
def test_a_very_low_rate_prunes_exact_zeros_alone(c_rate):
    layer = nn.Linear(4, 4)
    layer.weight.data[0] = 0
    surgery = NetworkSurgery(layer, c_rate=c_rate)
    surgery.step()
    assert torch.equal(surgery.masks["weight"], layer.parametrizations.weight.original != 0)
    assert surgery.thresholds[""][:2] == (0, 0)


def test_an_infinite_rate_prunes_all_unless_its_share_is_zero():
    for low, kept in ((0.9, 0), (0.0, 16)):
        layer = nn.Linear(4, 4, bias=False)
        surgery = NetworkSurgery(layer, c_rate=float("inf"), low=low)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            surgery.step()
        assert surgery.thresholds[""][:2] == (low and float("inf"), float("inf"))
        assert surgery.masks["weight"].sum() == kept


@pytest.mark.parametrize("c_rate", [-3.0, 0.0, 3.0, float("inf")])
def test_equal_sizes_have_no_spread(c_rate):
    layer = nn.Linear(7, 3, bias=False)
    layer.weight.data.fill_(0.1)
    layer.weight.data[0] *= -1
    surgery = NetworkSurgery(layer, c_rate=c_rate)
    surgery.step()
    assert surgery.thresholds[""].std < 1e-8
    assert surgery.density() == 1 or c_rate == float("inf")


def test_zero_and_broken_layers_have_no_thresholds():
    layers = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    for parameter in layers["b"].parameters():
        nn.init.zeros_(parameter)
    surgery = NetworkSurgery(layers)
    with pytest.raises(ValueError, match="layer 'b' has only zeros"):
        surgery.step()
    assert surgery.thresholds == {} and surgery.density() == 1
    surgery.masks["a.weight"].zero_(), surgery.masks["a.bias"].zero_()
    with pytest.raises(ValueError, match="layer 'a' has only zeros"):
        surgery.step()
    broken = nn.Linear(3, 3)
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        NetworkSurgery(broken).step()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"low": 1.2}, "high must be finite and at least low=1.2, got 1.1"),
        ({"low": -0.1}, "low must be"),
        ({"high": float("inf")}, "high must be"),
        ({"iter_stop": 0}, "iter_stop must be above 0, got 0"),
        ({"iter_stop": {"4": -1}}, "iter_stop must be above 0, got -1 for '4'"),
        ({"gamma": -1e-3}, "gamma must be"),
        ({"power": -1}, "power must be"),
        ({"c_rate": float("nan")}, "c_rate must be a number, got nan"),
        ({"c_rate": {"4": "3"}}, "c_rate must be a number, got '3'"),
        ({"c_rate": {"conv": 1.0}}, r"c_rate has 'conv', which matches none of .*'0', '4'"),
        ({"c_rate": {"1": 1.0}}, "c_rate has '1'"),
        ({"iter_stop": {"x*": 1}}, r"iter_stop has 'x\*'"),
        ({"include": ["4", "conv"]}, r"include has \['conv'\]"),
        ({"include": ["4", "1"]}, r"include has \['1'\]"),
        ({"include": "conv"}, "No target matched: include="),
        ({"include": []}, "No target matched"),
        ({"exclude": "conv"}, "exclude has 'conv'"),
        ({"exclude": "*"}, "No target matched"),
        ({"include": ["4"], "exclude": ["4"]}, "No target matched"),
        ({"include": "5"}, r"include has '5', but '5\.weight' is frozen"),
        ({"include": ["0", "5.bias"]}, r"include has '5\.bias', but '5\.bias' is frozen"),
        ({"include": "5*"}, "No target matched"),
        ({"include": ["0", "5*"]}, r"include has \['5\*'\]"),
    ],
)
def test_bad_arguments(options, match):
    network, _, _ = make_network()
    network.append(nn.Linear(5, 5).requires_grad_(False))
    before = list(network.state_dict())
    with pytest.raises(ValueError, match=match):
        NetworkSurgery(network, **options)
    assert list(network.state_dict()) == before


def test_bad_modules():
    with pytest.raises(ValueError, match="No target matched"):
        NetworkSurgery(nn.LayerNorm(3))
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5)})
    tied["out"].weight = tied["embed"].weight
    with pytest.raises(ValueError, match=r"'out\.weight' is shared"):
        NetworkSurgery(tied)
    assert list(NetworkSurgery(tied, exclude="out.weight").masks) == ["out.bias"]
    with pytest.raises(ValueError, match=r"under surgery; finalize\(\) that one before"):
        NetworkSurgery(tied)


def test_bad_calls():
    network, _, _ = make_network()
    surgery = NetworkSurgery(network, c_rate=0.5)
    surgery.step(5)
    surgery.step(5)
    for iteration in (4, -1):
        with pytest.raises(ValueError, match=f"must not decrease, got {iteration} after 5"):
            surgery.step(iteration)
    for draws, match in (({"1": 0.5}, "draws has '1'"), ({"4": 1.5}, "got 1.5"), ({"4": -1}, "4")):
        with pytest.raises(ValueError, match=match):
            surgery.step(draws=draws)
    with pytest.raises(ValueError, match="name must be one of"):
        surgery.density("1")
    with pytest.raises(ValueError, match="got -1 after -1"):
        NetworkSurgery(nn.Linear(2, 2)).step(-1)
    assert surgery.iteration == 5


def test_state_of_another_network():
    network, _, _ = make_network()
    surgery = NetworkSurgery(network, c_rate=0.5)
    surgery.step()
    state = surgery.state_dict()
    for change, match in (
        ({"masks.0.weight": torch.ones(6, 2, 3, 2)}, r"masks\.0\.weight \(6, 2, 3, 2\) for"),
        ({"masks.7.weight": torch.ones(1)}, r"masks\.7\.weight \(1,\) for None"),
        ({"thresholds.0": torch.ones(2)}, r"thresholds\.0 \(2,\) for \(4,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            surgery.load_state_dict(state | {"iteration": torch.tensor(7)} | change)
    for missing in ("masks.4.bias", "thresholds.4", "generator"):
        with pytest.raises(ValueError, match=f"{missing} None for"):
            surgery.load_state_dict({k: v for k, v in state.items() if k != missing})
    broken = {"generator": torch.zeros_like(state["generator"])}
    with pytest.raises(ValueError, match="generator is no state"):
        surgery.load_state_dict(state | {"iteration": torch.tensor(7)} | broken)
    assert surgery.iteration == 0
    with pytest.raises(ValueError, match="same parameters"):
        NetworkSurgery(nn.Linear(3, 3)).load_state_dict(state)
