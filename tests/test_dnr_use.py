"""DNR in use: norms it replaces, states and copies, compiled, low precision, bad arguments."""

import copy

import pytest
import torch
from doctests import run_examples
from draws import draw
from relays import BASES, drawn
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from morse.modules import (
    CrossTemporalNorm,
    DynamicNormRelay,
    RelayCell,
    RelayState,
    dnr,
    dnr_cell,
    dnr_clips,
)


def plain_norms(affine=True):
    torch.manual_seed(0)
    norms = [
        nn.GroupNorm(4, 8, eps=1e-3, affine=affine),
        nn.BatchNorm2d(8, 1e-4, 0.2, affine),
    ]
    return [drawn(norm, dtype=torch.float32) for norm in norms]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_from_norm_begins_as_the_norm_to_the_last_bit(which, training, affine):
    plain = plain_norms(affine)[which].train(training)
    norm = DynamicNormRelay.from_norm(plain)
    x, state = draw(3, 8, 5, 5, dtype=torch.float32), None
    for scale in (1.0, 3.0):
        y, state = norm(scale * x, state)
        assert torch.equal(y, plain(scale * x))
    for name, buffer in plain.named_buffers():
        if "running" in name:
            assert torch.equal(getattr(norm, name), buffer)
    assert norm.training == training and norm.eps == plain.eps


def test_from_norm_over_time_and_with_a_shared_cell():
    group, batch = plain_norms()
    clips = draw(2 * 4, 8, 3, 3, dtype=torch.float32)
    temporal = CrossTemporalNorm.from_norm(batch.eval(), n_segment=4, num_groups=2)
    # Clips are normalised in another memory layout, which rounds otherwise.
    assert_close(temporal(clips), batch(clips), rtol=1e-6, atol=1e-6)
    cell = RelayCell(8)
    shared = DynamicNormRelay.from_norm(group.half(), cell=cell)
    assert shared.cell is cell and shared.weight.dtype == torch.float16
    assert not any("lstm" in name for name in shared.state_dict())


def test_states_are_plain_values(tmp_path):
    norm = drawn(DynamicNormRelay(8)).requires_grad_()
    x = draw(3, 8, 4, 4)
    _, state = norm(x)
    assert state.h.requires_grad and not state.detach().c.requires_grad
    assert state.to(torch.float32).h.dtype == torch.float32
    assert torch.equal(state.index(torch.tensor([True, False, True])).h, state.h[:, [0, 2]])
    assert torch.equal(state.index(slice(1, 2)).c, state.c[:, 1:2])
    expected = norm(x, state)[0]
    save_file(state.detach()._asdict(), tmp_path / "state.safetensors")
    restored = RelayState(**load_file(tmp_path / "state.safetensors"))
    assert torch.equal(norm(x, restored)[0], expected)
    # Nothing stays behind in the module: two trajectories may take turns.
    with torch.no_grad():
        alone = [norm(x)[1]]
        alone.append(norm(x, alone[0])[1])
        mine, other = norm(x)[1], norm(-x)[1]
        other = norm(-x, other)[1]
        assert torch.equal(norm(x, mine)[1].c, alone[1].c)
        assert not torch.equal(other.c, alone[1].c)


def test_a_shared_cell_is_no_child(tmp_path):
    cell = RelayCell(8)
    norms = nn.ModuleList([DynamicNormRelay(8, cell=cell) for _ in range(2)])
    network = drawn(nn.ModuleDict({"lstm": cell, "norms": norms}), dtype=torch.float32)
    names = [name for name in network.state_dict() if "w_ih" in name]
    assert len(names) == 4 and all(name.startswith("lstm.") for name in names)

    def run(network, x):
        y, state = network["norms"][0](x)
        return network["norms"][1](y, state)[0]

    x = draw(2, 8, 3, 3, dtype=torch.float32)
    clone = copy.deepcopy(network)
    assert torch.equal(run(clone, x), run(network, x))
    assert clone["norms"][0].cell is clone["norms"][1].cell is clone["lstm"]
    assert clone["lstm"] is not cell
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    fresh = nn.ModuleDict({"lstm": RelayCell(8)})
    fresh["norms"] = nn.ModuleList([DynamicNormRelay(8, cell=fresh["lstm"]) for _ in range(2)])
    fresh.load_state_dict(load_file(tmp_path / "network.safetensors"))
    assert torch.equal(run(fresh, x), run(network, x))


@pytest.mark.parametrize("plain", [nn.GroupNorm(2, 8), nn.BatchNorm2d(8)])
def test_begins_as_a_plain_norm_after_to_empty(plain):
    base = "batch" if isinstance(plain, nn.BatchNorm2d) else "group"
    with torch.device("meta"):
        norm = DynamicNormRelay(8, base=base)
    norm.to_empty(device="cpu")
    for name, value in norm.state_dict().items():
        value.fill_(7 if name == "num_batches_tracked" else float("nan"))
    for module in norm.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = draw(3, 8, 4, 4, dtype=torch.float32)
    assert torch.equal(norm.eval()(x)[0], plain.eval()(x))
    assert base == "group" or norm.num_batches_tracked == 0


@pytest.mark.parametrize("init", ["official", "identity"])
@pytest.mark.parametrize("base", BASES)
def test_an_empty_batch(base, init):
    norm = drawn(DynamicNormRelay(8, base=base, init=init))
    before = copy.deepcopy(norm.state_dict())
    y, state = norm(draw(0, 8, 4, 4))
    assert y.shape == (0, 8, 4, 4) and state.h.shape == (1, 0, 8)
    assert_close(norm.state_dict(), before, rtol=0, atol=0)
    clips = CrossTemporalNorm(8, 4, 2, base=base, init=init)
    assert clips(torch.zeros(0, 8, 5, 5)).shape == (0, 8, 5, 5)


@pytest.mark.parametrize("backend, base", [("eager", "group"), ("eager", "batch")])
def test_compiles_without_breaks(backend, base):
    norm = drawn(DynamicNormRelay(8, base=base), dtype=torch.float32).eval()
    x, counter = draw(2, 8, 4, 4, dtype=torch.float32), CompileCounterWithBackend(backend)
    compiled = torch.compile(norm, backend=counter, fullgraph=True)
    state = mine = None
    for _ in range(3):
        y, state = norm(x, state)
        got, mine = compiled(x, mine)
        assert_close(got, y)
    # Once without a state, once with one.
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("init", ["official", "identity"])
def test_autocast_and_low_precision(base, init):
    norm = drawn(DynamicNormRelay(8, base=base, init=init), dtype=torch.float32).eval()
    x = draw(3, 8, 4, 4, dtype=torch.float32)
    _, state = norm(x)
    expected = norm(x, state)[0]
    close = {"rtol": 0.05, "atol": 0.05 * expected.abs().max().item()}
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            _, state = norm(given)
            y, _ = norm(given, state)
        # bfloat16 keeps 8 bits.
        assert_close(y.float(), expected, **close)
    low = copy.deepcopy(norm).bfloat16()
    _, state = low(x.bfloat16())
    y, state = low(x.bfloat16(), state)
    assert y.dtype == state.c.dtype == torch.bfloat16
    assert_close(y.float(), expected, **close)


def test_groups_by_themselves():
    for channels, groups in ((8, 2), (64, 16), (320, 32), (12, 3), (4, 1), (17, 1)):
        assert DynamicNormRelay(channels).norm_groups == groups


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: RelayCell(3), "channels must be at least reduction=4"),
        (lambda: RelayCell(8, 3), "hidden must be at least reduction=4"),
        (lambda: RelayCell(8, reduction=0), "reduction"),
        (lambda: RelayCell(8, num_layers=0), "num_layers"),
        (lambda: RelayCell(8, 12, num_layers=2), "hidden must be channels=8"),
        (lambda: DynamicNormRelay(3), "channels"),
        (lambda: DynamicNormRelay(8, base="layer"), "base"),
        (lambda: DynamicNormRelay(8, init="zeros"), "init"),
        (lambda: DynamicNormRelay(8, num_groups=3), "num_groups must divide channels=8"),
        (lambda: DynamicNormRelay(8, num_groups=0), "num_groups"),
        (lambda: DynamicNormRelay(8, cell=RelayCell(12)), "channels=8"),
        (lambda: DynamicNormRelay(8, cell=RelayCell(8, 12)), "channels=8"),
        (lambda: CrossTemporalNorm(8, 8, 3), "num_groups must divide n_segment=8"),
        (lambda: CrossTemporalNorm(8, 0, 1), "n_segment"),
        (lambda: CrossTemporalNorm(8, 4, 0), "num_groups"),
        (lambda: CrossTemporalNorm(8, norm_groups=3), "norm_groups must divide channels=8, got 3"),
        (lambda: DynamicNormRelay.from_norm(nn.BatchNorm2d(8, momentum=None)), "momentum"),
        (lambda: DynamicNormRelay(8, base="batch", momentum=None), "momentum must be a number"),
        (lambda: CrossTemporalNorm(8, 4, 2, momentum=None), "momentum must be a number"),
        (
            lambda: DynamicNormRelay.from_norm(nn.BatchNorm2d(8, track_running_stats=False)),
            "running statistics",
        ),
    ],
)
def test_bad_settings(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_bad_inputs():
    norm, x = DynamicNormRelay(8), torch.zeros(2, 8, 3, 3)
    for bad in (torch.zeros(8), torch.zeros(2, 4, 3)):
        with pytest.raises(ValueError, match=r"x must be \(N, 8, ...\)"):
            norm(bad)
    with pytest.raises(ValueError, match="pooled"):
        norm.cell(x)
    for shape in ((1, 2, 4), (1, 3, 8), (2, 2, 8), (2, 8)):
        right, wrong = torch.zeros(1, 2, 8), torch.zeros(shape)
        with pytest.raises(ValueError, match=r"state.h must be .* \(1, 2, 8\)"):
            norm(x, RelayState(wrong, right))
        with pytest.raises(ValueError, match=r"state.c must be"):
            norm(x, RelayState(right, wrong))
        with pytest.raises(ValueError, match=r"state\.h must be"):
            norm.modulate(x, RelayState(wrong, right))
    state = norm(x)[1]
    with pytest.raises(ValueError, match=r"state.to"):
        norm(x, state.to("meta"))
    with pytest.raises(ValueError, match=r"x must be \(N, 8, ...\)"):
        norm.modulate(x[:, :4], state)
    for bad in (torch.zeros(6, 8, 3, 3), torch.zeros(4)):
        with pytest.raises(ValueError, match="clips of n_segment=4"):
            CrossTemporalNorm(8, 4, 2)(bad)
    with pytest.raises(TypeError, match="takes no state"):
        CrossTemporalNorm(8, 4, 2).modulate(torch.zeros(4, 8), state)
    with pytest.raises(TypeError, match="LayerNorm"):
        DynamicNormRelay.from_norm(nn.LayerNorm(8))


def test_examples():
    seen = run_examples(dnr, dnr_cell, dnr_clips)
    assert seen == {"CrossTemporalNorm", "DynamicNormRelay", "RelayCell", "RelayState"}
