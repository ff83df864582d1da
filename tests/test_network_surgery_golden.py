"""Network surgery against recorded runs of the update rule and the authors' released networks."""

import pytest
import torch
from golden_files import read_golden
from torch import nn
from torch.testing import assert_close

from morse.compression import NetworkSurgery, load_sparse, save_sparse


def settings(config):
    return {name: config[name] for name in ("c_rate", "gamma", "power", "iter_stop")}


def released(name):
    """Return metadata, and the dense state dict of a released pruned network."""
    meta, tensors = read_golden(f"dynamic_network_surgery_official_{name}")
    state = {}
    for layer in meta["layers"]:
        for part in ("weight", "bias"):
            full = f"{layer['name']}.{part}"
            state[full] = torch.zeros(layer[f"{part}_shape"])
            state[full].view(-1)[tensors[f"{full}.index"].long()] = tensors[f"{full}.value"]
    return meta, tensors, state


@pytest.mark.parametrize("name", ["train_a", "train_frequent"])
def test_training_run(name):
    meta, data = read_golden(f"dynamic_network_surgery_{name}")
    config, exact = meta["config"], {"rtol": 0, "atol": meta["atol"]}
    layer = nn.Linear(data["weight0"].shape[1], len(data["weight0"])).double()
    layer.load_state_dict({"weight": data["weight0"], "bias": data["bias0"]})
    raw = {"weight": layer.weight, "bias": layer.bias}
    optimizer = torch.optim.SGD(
        layer.parameters(), config["lr"], config["momentum"], weight_decay=config["weight_decay"]
    )
    surgery = NetworkSurgery(layer, **settings(config))
    for iteration in range(config["iters"]):
        updated = surgery.step(iteration, {"": data["draws"][iteration].item()})
        assert updated == {"": bool(data["update_applied"][iteration])}
        for part, mask in surgery.masks.items():
            assert torch.equal(mask, data[f"{part}_masks"][iteration].bool())
        flips = [surgery.flips[part] for part in ("weight", "bias")]
        counts = [flip.pruned for flip in flips] + [flip.spliced for flip in flips]
        assert counts == data["flips"][iteration].tolist()
        loss = (layer(data["x"]) - data["y"]).square().sum() / (2 * len(data["x"]))
        assert_close(loss.detach(), data["losses"][iteration], **exact)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for part, parameter in raw.items():
            if f"{part}_after_iter{iteration}" in data:
                assert_close(parameter.data, data[f"{part}_after_iter{iteration}"], **exact)
    assert_close(surgery.thresholds[""].mu, data["mu"].item(), **exact)
    assert_close(surgery.thresholds[""].std, data["std"].item(), **exact)
    surgery.finalize()
    for part, parameter in raw.items():
        assert parameter is getattr(layer, part)
        assert_close(parameter.data, data[f"final_masked_{part}"], **exact)


@pytest.mark.parametrize("name", ["replay_conv", "replay_nobias_zeros"])
def test_replay_of_given_weights(name):
    meta, data = read_golden(f"dynamic_network_surgery_{name}")
    config, exact = meta["config"], {"rtol": 0, "atol": meta["atol"]}
    shape, bias = data["weight_mask0"].shape, "bias_mask0" in data
    plain = nn.Conv2d(shape[1], shape[0], shape[2:]) if len(shape) == 4 else nn.Linear(*shape[::-1])
    if not bias:
        plain.bias = None
    network = nn.Sequential(plain.double())
    raw = dict(network[0].named_parameters())
    surgery = NetworkSurgery(network, **settings(config))
    state = surgery.state_dict()
    state |= {f"masks.0.{part}": data[f"{part}_mask0"] for part in raw}
    surgery.load_state_dict(state)
    for iteration in range(config["iters"]):
        for part, parameter in raw.items():
            parameter.data.copy_(data[f"{part}_sequence"][iteration])
        surgery.step(draws={"0": data["draws"][iteration].item()})
        for part in raw:
            expected = data[f"{part}_masks"][iteration].bool()
            assert torch.equal(surgery.masks[f"0.{part}"], expected)
            assert torch.equal(getattr(network[0], part), raw[part] * expected)
    assert_close(surgery.thresholds["0"].mu, data["mu"].item(), **exact)
    assert_close(surgery.thresholds["0"].std, data["std"].item(), **exact)
    if config["c_rate"] < 0:
        assert surgery.thresholds["0"][:2] == (0, 0)


@pytest.mark.parametrize(
    ("network", "names"), [("lenet5", ("conv1", "ip2")), ("lenet300100", ("ip3",))]
)
def test_thresholds_of_the_released_dense_networks(network, names):
    meta, tensors = read_golden(f"dynamic_network_surgery_official_{network}")
    for layer in (layer for layer in meta["layers"] if layer["name"] in names):
        shape = layer["weight_shape"]
        dense = (
            nn.Conv2d(shape[1], shape[0], shape[2]) if len(shape) == 4 else nn.Linear(*shape[::-1])
        )
        dense.load_state_dict(
            {part: tensors[f"{layer['name']}.{part}.original"] for part in ("weight", "bias")}
        )
        surgery = NetworkSurgery(nn.ModuleDict({layer["name"]: dense}), c_rate=layer["c_rate"])
        surgery.step(draws={layer["name"]: 1})
        found = surgery.thresholds[layer["name"]]._asdict()
        for key, value in found.items():
            assert_close(value, layer[key], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("network", "kept", "total", "compression"),
    [
        ("lenet5", [74, 779, 2923, 217], [520, 25050, 400500, 5010], 107.96),
        ("lenet300100", [4381, 558, 49], [235500, 30100, 1010], 53.45),
    ],
)
def test_sizes_of_the_released_networks(network, kept, total, compression):
    meta, _, state = released(network)
    names = [layer["name"] for layer in meta["layers"]]

    def count(name, what):
        return sum(what(tensor) for key, tensor in state.items() if key.startswith(name))

    assert [count(name, torch.count_nonzero).item() for name in names] == kept
    assert [count(name, torch.numel) for name in names] == total
    assert round(sum(total) / sum(kept), 2) == compression


def test_storage_of_the_released_lenet5(tmp_path):
    _, _, state = released("lenet5")
    values = 4 * sum(int(tensor.count_nonzero()) for tensor in state.values())
    numel = sum(tensor.numel() for tensor in state.values())
    assert (4 * numel, numel // 8 + values, 2 * values) == (1_724_320, 69_857, 31_944)
    path = tmp_path / "lenet5.safetensors"
    save_sparse(state, path)
    # 8-bit gaps with escapes; the header is the rest.
    assert 21_440 <= path.stat().st_size <= 1.05 * 21_440
    loaded = load_sparse(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
