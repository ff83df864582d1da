"""DNR's mathematics: the relay's formulas and bounds, causality, statistics and gradients."""

import pytest
import torch
from draws import draw
from relays import BASES, drawn
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from morse.modules import CrossTemporalNorm, DynamicNormRelay, RelayCell, RelayState


def step_by_hand(cell, x, h, c):
    """One step of a cell with a single layer, by its formulas."""

    def bottleneck(maps, v):
        first, last = maps[0].seq[0], maps[0].seq[2]
        inner = (v @ first.weight.mT + first.bias).clamp(min=0)
        return inner @ last.weight.mT + last.bias

    gates = bottleneck(cell.w_ih, x) + bottleneck(cell.w_hh, h)
    i, f, g, o = gates.unflatten(1, (4, -1)).unbind(1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.sigmoid(c), c


@pytest.mark.parametrize("channels, hidden, reduction", [(8, 8, 4), (12, 5, 3), (16, 16, 1)])
def test_cell_is_the_formula_and_bounded(channels, hidden, reduction):
    cell = drawn(RelayCell(channels, hidden, reduction))
    state, h, c = None, torch.zeros(3, hidden).double(), torch.zeros(3, hidden).double()
    for step in range(1, 6):
        x = draw(3, channels, seed=step)
        state = cell(x, state)
        h, c = step_by_hand(cell, x, h, c)
        assert_close(state.h[0], h)
        assert_close(state.c[0], c)
        assert (state.h > 0).all() and (state.h < 1).all()
        assert (state.c.abs() < step).all()


def test_cell_of_zeros():
    cell = RelayCell(8).double()
    for parameter in cell.parameters():
        nn.init.zeros_(parameter)
    c = draw(1, 3, 8)
    state = cell(draw(3, 8), RelayState(draw(1, 3, 8, seed=2), c))
    assert_close(state.c, c / 2, rtol=0, atol=0)
    assert_close(state.h, (c / 2).sigmoid() / 2, rtol=0, atol=0)
    norm = DynamicNormRelay(8, base="batch", init="official", cell=cell).double()
    x = draw(3, 8, 4, 4)
    y, _ = norm(x)
    assert_close(y, functional.batch_norm(x, None, None, training=True) / 4, rtol=0, atol=0)


def test_layers_read_the_same_feature():
    cell = drawn(RelayCell(8, num_layers=3))
    x, state = draw(2, 8), RelayState(draw(3, 2, 8, seed=2), draw(3, 2, 8, seed=3))
    after = cell(x, state)
    gates = cell.w_ih[2](x) + cell.w_hh[2](state.h[2])
    i, f, g, _ = gates.chunk(4, 1)
    assert_close(after.c[2], f.sigmoid() * state.c[2] + i.sigmoid() * g.tanh())
    norm = DynamicNormRelay(8, base="none", init="official", cell=cell)
    y, last = norm(x, state)
    assert_close(last.h, after.h)
    assert_close(y, x * after.h[2] + after.c[2])


def test_parameter_count():
    for channels in (64, 10):
        q = channels // 4
        count = 2 * (channels * q + q + 4 * channels * q + 4 * channels)
        assert sum(p.numel() for p in RelayCell(channels).parameters()) == count
        official = CrossTemporalNorm(channels)
        assert sum(p.numel() for p in official.parameters()) == count
        identity = DynamicNormRelay(channels)
        assert sum(p.numel() for p in identity.parameters()) == count + 3 * channels
    assert sum(p.numel() for p in RelayCell(64).parameters()) == 10_784


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("init", ["official", "identity"])
def test_output_does_not_see_the_future(base, init, training):
    norm = drawn(CrossTemporalNorm(8, 6, 3, base=base, init=init)).train(training)
    x = draw(2 * 6, 8, 3, 3).requires_grad_()
    for group in range(3):
        output = norm(x).unflatten(0, (2, 6))[:, 2 * group : 2 * group + 2]
        (grad,) = torch.autograd.grad(output.square().sum(), x)
        seen = grad.unflatten(0, (2, 6)).abs().amax((0, 2, 3, 4)) > 0
        # The relay brings every earlier group in, and nothing a later one.
        assert seen.tolist() == [frame < 2 * group + 2 for frame in range(6)]


@pytest.mark.parametrize("frames", [1, 4])
def test_one_group_is_one_step_from_zeros(frames):
    norm = drawn(CrossTemporalNorm(8, frames, 1)).eval()
    x = draw(3 * frames, 8, 4, 4)
    clips = x.unflatten(0, (3, frames))
    h, c = (part.view(3, 1, 8, 1, 1) for part in norm.cell(clips.mean((1, 3, 4))))
    plain = functional.batch_norm(x, norm.running_mean, norm.running_var).view_as(clips)
    assert_close(norm(x), (plain * h + c).flatten(0, 1))


@pytest.mark.parametrize("init", ["official", "identity"])
def test_running_statistics_move_once_a_group(init):
    norm = CrossTemporalNorm(8, 6, 3, momentum=0.3, init=init).double()
    x = draw(2 * 6, 8, 3, 3)
    norm(x)
    mean, var = torch.zeros(8).double(), torch.ones(8).double()
    for frames in x.unflatten(0, (2, 6)).chunk(3, 1):
        mean = 0.7 * mean + 0.3 * frames.mean((0, 1, 3, 4))
        var = 0.7 * var + 0.3 * frames.var((0, 1, 3, 4), correction=1)
    assert_close(norm.running_mean, mean)
    assert_close(norm.running_var, var)
    assert norm.num_batches_tracked == 0
    once = DynamicNormRelay(8, base="batch", momentum=0.3, init=init).double()
    once(x)
    assert (once.running_mean - mean).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 4)])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("init", ["official", "identity"])
def test_rows_are_independent(base, init, shape):
    norm = drawn(DynamicNormRelay(8, base=base, init=init))
    # Group norm needs no running statistics, so it does not mix samples in training either.
    norm.train(base != "batch")
    x, state = draw(3, 8, *shape), RelayState(draw(1, 3, 8, seed=2), draw(1, 3, 8, seed=3))
    y, after = norm(x, state)
    order = torch.tensor([2, 0, 1])
    permuted, permuted_after = norm(x[order], state.index(order))
    assert_close(permuted, y[order])
    assert_close(permuted_after.c, after.index(order).c)
    single, _ = norm(x[1:2], state.index([1]))
    assert_close(single, y[1:2])


def test_formula_of_the_open_identity():
    norm = drawn(DynamicNormRelay(8, num_groups=2))
    x = draw(3, 8, 4, 4)
    y, state = norm(x)
    h, c = state.h[0, :, :, None, None], state.c[0, :, :, None, None]
    weight, bias, a = (p[:, None, None] for p in (norm.weight, norm.bias, norm.a))
    plain = functional.group_norm(x, 2)
    assert_close(y, plain * (weight + a * h) + (bias + a * c))


@pytest.mark.parametrize("base, training", [("group", True), ("group", False), ("batch", False)])
def test_two_calls_are_one_sequence(base, training):
    temporal = drawn(CrossTemporalNorm(8, 4, 2, base=base, init="identity")).train(training)
    norm = DynamicNormRelay(8, base=base, num_groups=temporal.norm_groups).double()
    norm.load_state_dict(temporal.state_dict())
    norm.train(training)
    x = draw(3 * 4, 8, 5, 5)
    clips = x.unflatten(0, (3, 4)).transpose(1, 2)
    first, state = norm(clips[:, :, :2])
    second, _ = norm(clips[:, :, 2:], state)
    together = torch.cat((first, second), 2).transpose(1, 2).flatten(0, 1)
    assert_close(temporal(x), together)
    again, _ = norm(clips[:, :, :2])
    assert torch.equal(again, first)


@pytest.mark.parametrize("base, init", [("group", "identity"), ("batch", "official")])
def test_gradients_are_right(base, init):
    norm = drawn(CrossTemporalNorm(4, 2, 2, base=base, init=init))
    norm.eval()
    x = draw(2 * 2, 4, 2, 2).requires_grad_()
    names, values = zip(*norm.named_parameters(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(norm, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


def test_the_identity_opens():
    torch.manual_seed(0)
    norm = DynamicNormRelay(32).double()
    x = draw(3, 32, 4, 4)

    def gradients():
        norm.zero_grad()
        _, state = norm(x)
        norm(x.flip(0), state)[0].square().sum().backward()
        return {name: p.grad.abs().max() for name, p in norm.named_parameters()}

    first = gradients()
    assert all((grad > 0) == ("lstm" not in name) for name, grad in first.items())
    norm.a.data.fill_(0.1)
    assert all(grad > 0 for grad in gradients().values())
