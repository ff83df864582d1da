"""KernelWarehouse against recordings of the authors' code and the sizes of their networks."""

import pytest
import torch
from golden_files import GOLDEN, read_golden
from torch import nn
from torch.testing import assert_close

from morse.modules import Warehouse, linear_temperature, set_temperature

# Single stages may grow where whole networks shrink.
pytestmark = pytest.mark.filterwarnings("ignore:this warehouse does not save")

NAMES = sorted(path.stem for path in GOLDEN.glob("kernel_warehouse_*.safetensors"))
LAYERS = [name for name in NAMES if "_plan_" not in name and "schedule" not in name]
PLANS = [name for name in NAMES if "_plan_" in name]


def warehouse_from(manager, index=0):
    """A warehouse with the arguments of the authors' manager, for its `index`-th bank."""

    def pick(name, default):
        value = manager.get(name, default)
        return value[index] if isinstance(value, list | tuple) else value

    return Warehouse(
        budget=pick("cell_num_ratio", 1),
        cell_in_ratio=pick("cell_inplane_ratio", 1),
        cell_out_ratio=pick("cell_outplane_ratio", 1),
        spatial_partition=pick("spatial_partition", True),
        reduction=pick("reduction", 1 / 16),
        basis_ratio=pick("nonlocal_basis_ratio", 1),
        norm="layer" if manager.get("norm_layer") == "LayerNorm" else "batch",
    )


def create(warehouse, reserved):
    """A layer with the arguments of the authors' `reserve`."""
    options = dict(reserved)
    kind, sizes = options.pop("layer_type"), (options.pop("in_planes"), options.pop("out_planes"))
    options.pop("warehouse_name")
    if kind == "linear":
        return warehouse.linear(*sizes, bias=options["bias"])
    return getattr(warehouse, kind)(*sizes, **options)


class Recorded(nn.Module):
    """The layers of a recording beside their warehouses."""

    def __init__(self, meta):
        super().__init__()
        count = len(meta["warehouses"])
        banks = [warehouse_from(meta["manager"], index) for index in range(count)]
        self.banks = nn.ModuleList(banks)
        for i, (reserved, info) in enumerate(zip(meta["layers"], meta["layer_info"], strict=True)):
            self.add_module(f"layer{i}", create(banks[info["warehouse_id"]], reserved))
        for bank in banks:
            bank.build()

    @property
    def layers(self):
        return [layer for name, layer in self.named_children() if name.startswith("layer")]


def own_name(official):
    """The name of a parameter in `Recorded`."""
    name = official.replace("warehouse_manager.weights.", "banks.")
    return f"{name}.cells" if name.startswith("banks.") else name.replace(".conv.", ".")


@pytest.fixture(params=LAYERS)
def recorded(request):
    meta, tensors = read_golden(request.param)
    network = Recorded(meta)
    state = {
        key.removeprefix("state."): value
        for key, value in tensors.items()
        if key.startswith("state.")
    }
    # Linear layers take the authors' names as they are.
    banks = {k: own_name(k) if "weights" in k else k for k in state}
    network.load_state_dict({banks[k]: v for k, v in state.items()})
    return meta, tensors, network


def test_there_are_recordings():
    assert len(LAYERS) == 10 and len(PLANS) == 4


def test_recorded_plan(recorded):
    meta, tensors, network = recorded
    assert sum(p.numel() for p in network.parameters()) == meta["params"]
    for i, (info, layer) in enumerate(zip(meta["layer_info"], network.layers, strict=True)):
        plan = network.banks[info["warehouse_id"]].plan
        share = next(part for part in plan.layers if part.start == info["start_cell_idx"])
        assert share.mixtures == info["mixtures"] and plan.n == info["cells"]
        assert list(plan.cell_shape) == info["cell_shape"]
        for axis in ("groups_spatial", "groups_out", "groups_in"):
            assert getattr(share, axis) == info[axis]
        expected = tensors[f"layer{i}.temp_bias"]
        assert_close(layer.attention.temp_bias.flatten(), expected, rtol=0, atol=0)
        assert layer.temperature == 0.0


def test_recorded_layers(recorded):
    meta, tensors, network = recorded
    close = {"rtol": meta["rtol"], "atol": meta["atol"]}
    network.eval()
    for tau in meta["eval_taus"]:
        assert set_temperature(network, tau) == len(network.layers)
        for i, layer in enumerate(network.layers):
            output = layer(tensors[f"layer{i}.x"])
            assert_close(output, tensors[f"layer{i}.output.eval.tau{tau:g}"], **close)
    for i, layer in enumerate(network.layers):
        x = tensors[f"layer{i}.x"]
        expected = tensors[f"layer{i}.attention.eval.tau0"]
        assert_close(layer.attentions(x).flatten(0, 1), expected, **close)
        kernel = tensors.get(f"layer{i}.kernel.eval.tau0")
        if kernel is not None:
            assert_close(layer.assembled_kernel(x), kernel, **close)


def test_recorded_training(recorded):
    meta, tensors, network = recorded
    set_temperature(network.train(), meta["train_tau"])
    loss = 0.0
    for i, layer in enumerate(network.layers):
        output = layer(tensors[f"layer{i}.x"])
        expected = tensors[f"layer{i}.output.train"]
        assert_close(output, expected, rtol=meta["rtol"], atol=meta["atol"])
        loss = loss + (output * tensors[f"layer{i}.probe"]).sum()
    loss.backward()
    parameters, seen = dict(network.named_parameters()), set()
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind not in ("grad", "grad_sum_over_columns", "grad_sum_over_rows"):
            continue
        grad = parameters[own_name(name)].grad
        if kind != "grad":
            grad = grad.sum(1 if kind == "grad_sum_over_columns" else 0)
        assert_close(grad, value, rtol=meta["rtol"], atol=meta["grad_atol"])
        seen.add(own_name(name))
    assert seen == parameters.keys()
    state = network.state_dict()
    for key, value in tensors.items():
        if key.startswith("state_after_train."):
            name = own_name(key.removeprefix("state_after_train."))
            assert_close(state[name], value, rtol=meta["rtol"], atol=meta["atol"])


def test_recorded_schedule():
    meta, tensors = read_golden("kernel_warehouse_temperature_schedule")
    for number, schedule in enumerate(meta["schedules"]):
        length, epochs = schedule["iter_per_epoch"], schedule["temp_epoch"]
        for epoch, row in enumerate(tensors[f"schedule{number}"].tolist()):
            got = [
                linear_temperature(
                    epoch * length + s, epochs * length, schedule["temp_init_value"], 0.0
                )
                for s in range(len(row))
            ]
            assert got == pytest.approx(row, abs=1e-12)


@pytest.mark.parametrize("name", PLANS)
def test_recorded_network(name):
    meta, tensors = read_golden(name)
    config = meta["config"]
    count = 1 + max(layer["warehouse"] for layer in meta["layers"])
    with torch.device("meta"):
        banks = [warehouse_from(config, index) for index in range(count)]
        for layer in meta["layers"]:
            sizes = layer["in_planes"], layer["out_planes"], tuple(layer["kernel_size"])
            banks[layer["warehouse"]].conv2d(*sizes, groups=layer["groups"])
        for bank in banks:
            bank.build()
    parts = [list(bank.plan.layers) for bank in banks]
    for i, layer in enumerate(meta["layers"]):
        plan, part = banks[layer["warehouse"]].plan, parts[layer["warehouse"]].pop(0)
        assert (part.mixtures, part.start) == (layer["mixtures"], layer["start_cell_idx"])
        assert plan.n == layer["null_index"]
        assert list(part.initial_cell) == tensors[f"layer{i}.initial_cell"].tolist()
    for index, bank in enumerate(banks):
        assert list(bank.cells.shape) == tensors[f"warehouse{index}.shape"].tolist()
    assert sum(bank.plan.bank_parameters for bank in banks) == meta["params_warehouse"]
    assert sum(bank.plan.attention_parameters for bank in banks) == meta["params_attention"]
