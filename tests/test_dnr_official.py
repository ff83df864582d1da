"""DNR against recordings of the authors' code."""

import pytest
import torch
from golden_files import part, read_golden
from torch import nn
from torch.testing import assert_close

from morse.modules import CrossTemporalNorm, DynamicNormRelay, RelayCell, RelayState

TEMPORAL = ["dnr_ct_seg4_g1", "dnr_ct_seg4_g4", "dnr_ct_seg8_g4"]


def recorded(name):
    """Give settings, tensors, and tolerances of values and of gradients."""
    meta, tensors = read_golden(name)
    close = {"rtol": meta["rtol"], "atol": meta["atol"]}
    return meta["config"], tensors, close, {"rtol": meta["rtol"], "atol": meta["grad_atol"]}


def check_gradients(module, tensors, close):
    grads = {name: p.grad for name, p in module.named_parameters()}
    expected = part(tensors, "grad.")
    assert grads.keys() == expected.keys() - {"x", "h", "c"}
    for name, grad in grads.items():
        assert_close(grad, expected[name], **close)


def check_buffers(module, tensors, close):
    state, expected = module.state_dict(), part(tensors, "state_after_train.")
    assert expected
    for name, value in expected.items():
        assert_close(state[name], value, **close)


@pytest.mark.parametrize("name", ["dnr_cell_c16", "dnr_cell_two_layers"])
def test_recorded_cell(name):
    config, tensors, close, grad_close = recorded(name)
    cell = RelayCell(config["input_size"], config["hidden_size"], num_layers=config["nlayers"])
    cell.load_state_dict(part(tensors, "state."))
    state, loss = None, 0.0
    for step in range(3):
        state = cell(tensors[f"step{step}.x"], state)
        for key, value in state._asdict().items():
            assert_close(value, tensors[f"step{step}.{key}"], **close)
            loss = loss + (value * tensors[f"step{step}.probe_{key}"]).sum()
    loss.backward()
    check_gradients(cell, tensors, grad_close)


def test_recorded_norm_with_a_given_state():
    config, tensors, close, grad_close = recorded("dnr_cl_norm")
    channels = config["num_features"]
    shared = RelayCell(channels)
    norm = DynamicNormRelay(channels, base="batch", init="official", cell=shared)
    norm.load_state_dict(part(tensors, "state."))
    x, h, c = (tensors[key].requires_grad_() for key in ("x", "h", "c"))
    state = RelayState(h.view(1, 2, channels), c.view(1, 2, channels))
    assert_close(norm.eval().modulate(x, state), tensors["output.eval"], **close)
    output = norm.train().modulate(x, state)
    assert_close(output, tensors["output.train"], **close)
    (output * tensors["probe"]).sum().backward()
    for key, value in (("x", x), ("h", h), ("c", c)):
        assert_close(value.grad, tensors[f"grad.{key}"], **grad_close)
    check_buffers(norm, tensors, close)


@pytest.mark.parametrize("name", TEMPORAL)
def test_recorded_temporal_norm(name):
    config, tensors, close, grad_close = recorded(name)
    norm = CrossTemporalNorm(config.pop("num_features"), **config)
    norm.load_state_dict(part(tensors, "state."))
    x = tensors["x"].requires_grad_()
    assert_close(norm.eval()(x), tensors["output.eval"], **close)

    state = None
    clips = x.unflatten(0, (-1, norm.n_segment))
    for index, frames in enumerate(clips.chunk(norm.num_groups, 1)):
        state = norm.cell(frames.mean((1, 3, 4)), state)
        assert_close(state.h, tensors[f"group{index}.h"], **close)
        assert_close(state.c, tensors[f"group{index}.c"], **close)

    output = norm.train()(x)
    assert_close(output, tensors["output.train"], **close)
    (output * tensors["probe"]).sum().backward()
    assert_close(x.grad, tensors["grad.x"], **grad_close)
    check_gradients(norm, tensors, grad_close)
    check_buffers(norm, tensors, close)


class Bottleneck(nn.Module):
    """A block of the authors' networks: relay across layers, then across time, then batch norm."""

    def __init__(self, in_channels, width, segments, groups, cell):
        super().__init__()
        out_channels = 4 * width
        self.segments = segments
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = DynamicNormRelay(width, base="batch", init="official", cell=cell)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = CrossTemporalNorm(width, segments, groups)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        if in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x, state):
        clips = self.conv1(x).unflatten(0, (-1, self.segments)).transpose(1, 2)
        y, state = self.bn1(clips, state)
        y = self.conv2(y.transpose(1, 2).flatten(0, 1).relu())
        y = self.bn3(self.conv3(self.bn2(y).relu()))
        skip = self.downsample(x) if hasattr(self, "downsample") else x
        return (y + skip).relu(), state


class Stage(nn.Module):
    """The authors' stage: a cell beside its blocks, whose first norms share it."""

    def __init__(self, config):
        super().__init__()
        self.lstm = RelayCell(config["planes"])
        widths = [config["inplanes"]] + [4 * config["planes"]] * (config["blocks"] - 1)
        options = config["planes"], config["n_segment"], config["ct_num_groups"], self.lstm
        self.ModuleList = nn.ModuleList(Bottleneck(width, *options) for width in widths)

    def forward(self, x):
        state, states = None, []
        for block in self.ModuleList:
            x, state = block(x, state)
            states.append(state)
        return x, states


def test_recorded_stage():
    config, tensors, close, _ = recorded("dnr_stage_two_blocks")
    stage = Stage(config)
    stage.load_state_dict(part(tensors, "state."))
    with torch.no_grad():
        output, states = stage.eval()(tensors["x"])
        assert_close(output, tensors["output.eval"], **close)
        for index, state in enumerate(states):
            assert_close(state.h, tensors[f"block{index}.h"], **close)
            assert_close(state.c, tensors[f"block{index}.c"], **close)
        pooled = [tensors[f"block{index}.pooled"] for index in range(len(states))]
        assert_close(stage.lstm(pooled[1], stage.lstm(pooled[0])).h, states[1].h, **close)
        output, _ = stage.train()(tensors["x"])
    assert_close(output, tensors["output.train"], **close)
    check_buffers(stage, tensors, close)
