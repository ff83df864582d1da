"""GridConv: recordings of the authors' code, and what its formulas imply."""

import copy
import doctest

import pytest
import torch
from golden_files import assert_golden, assert_gradient, part, read_golden
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from morse.modules import (
    GridAttention,
    GridConv2d,
    SemanticGridTransform,
    grid_temperature,
    gridconv,
    gridconv_attention,
    gridconv_transform,
)

MEAN = -1
HANDCRAFTED = (
    (7, 7, 7, 7, 7),
    (0, 8, 8, 8, 0),
    (1, 14, MEAN, 11, 4),
    (2, 15, 9, 12, 5),
    (3, 16, 10, 13, 6),
)


def convolution_state(state, conv, attention):
    """Rename the authors' parameters of a dynamic convolution and its attention."""
    renamed = {}
    for name, value in part(state, conv).items():
        branch, kind = name.removeprefix("branch").split("_")
        renamed[f"branches.{int(branch) - 1}.{kind}"] = value
    names = {"fc": "squeeze", "bn": "norm", "position_fc": "expand"}
    for name, value in part(state, attention).items():
        layer, kind = name.split(".")
        renamed[f"attention.{names[layer]}.{kind}"] = value
    return renamed


@pytest.mark.parametrize("module", [gridconv, gridconv_attention, gridconv_transform])
def test_examples(module):
    done = doctest.testmod(module, globs={})  # as pasted, without the module's own names
    assert done.attempted >= 4 and not done.failed


# Recordings


def test_recorded_static_layer():
    meta, tensors = read_golden("gridconv_static_a")
    config = meta["config"]
    conv = GridConv2d(
        config["in_channels"], config["out_channels"], config["kernel_size"],
        paddings=tuple(config["paddings"]), bias=config["bias"],
    )  # fmt: skip
    names = {"donut_conv": "branches.0", "tablet_conv": "branches.1"}
    state = part(tensors, "state.")
    conv.load_state_dict({names[k.split(".")[0]] + "." + k.split(".")[1]: state[k] for k in state})
    x = tensors["in.x"].requires_grad_()
    y = conv(x)
    assert_golden(y, tensors["out.y"], meta)
    y.backward(tensors["in.cotangent"])
    assert_gradient(x.grad, tensors["grad.x"], meta)


@pytest.mark.parametrize("name", ["eval", "train"])
def test_recorded_dynamic_layer(name):
    meta, tensors = read_golden(f"gridconv_dynamic_{name}")
    config = meta["config"]
    conv = GridConv2d(
        config["in_channels"], config["out_channels"], config["kernel_size"],
        paddings=tuple(config["padding_mode"]), bias=config["bias"], dynamic=True,
        grid_shape=tuple(config["grid_shape"]), temperature=config["temperature"],
    )  # fmt: skip
    conv.load_state_dict(convolution_state(part(tensors, "state."), "conv.", "attention."))
    assert conv.attention.squeeze.out_channels == config["attention_channels"]
    conv.train(config["training"])
    x = tensors["in.x"].requires_grad_()
    # A copy computes the gates: in training, each call moves the statistics.
    assert_golden(copy.deepcopy(conv).attention(x), tensors["out.attention"], meta)
    y = conv(x)
    assert_golden(y, tensors["out.y"], meta)
    y.backward(tensors["in.cotangent"])
    assert_gradient(x.grad, tensors["grad.x"], meta)
    state = part(tensors, "state.attention.bn.")
    moved = not torch.equal(conv.attention.norm.running_mean, state["running_mean"])
    assert moved == config["training"]
    assert_golden(conv(x, tensors["out.attention"]), tensors["out.y"], meta)


@pytest.mark.parametrize("learnable", [True, False])
def test_recorded_handcrafted_layout(learnable):
    meta, tensors = read_golden("gridconv_handcrafted_a")
    sgt = SemanticGridTransform(17, (5, 5), init="handcrafted", learnable=learnable).double()
    grid = sgt(tensors["in.pose"])
    assert_golden(grid, tensors["out.grid"], meta)
    assert_golden(sgt.inverse(tensors["in.grid"]), tensors["out.pose_from_grid"], meta)
    assert_golden(sgt.inverse(grid), tensors["out.roundtrip"], meta)
    assert_close(sgt.inverse(grid), tensors["in.pose"], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["standard", "random_prob"])
def test_recorded_learned_layout(name):
    meta, tensors = read_golden("gridconv_sgt_a")
    scores = tensors[f"state.{name}.sgt_trans_mat"][0]
    sgt = SemanticGridTransform(17, (5, 5), init=scores)
    if name == "standard":
        assert torch.equal(SemanticGridTransform(17, (5, 5)).scores, scores)
    chosen = sgt.assignment()
    assert_golden(chosen, tensors[f"out.{name}.assignment_train"][0], meta)
    chosen.backward(tensors[f"in.{name}.cotangent"][0])
    assert_gradient(sgt.scores.grad, tensors[f"grad.{name}.sgt_trans_mat"][0], meta)
    sgt.eval()
    assert_golden(sgt.assignment(), tensors[f"out.{name}.assignment"][0], meta)
    grid = sgt(tensors[f"in.{name}.pose"])
    assert_golden(grid.flatten(2).mT, tensors[f"out.{name}.grid_tokens"], meta)
    assert_golden(sgt.inverse(grid), tensors[f"out.{name}.roundtrip"], meta)


def test_recorded_network():
    meta, tensors = read_golden("gridconv_network_a")
    config, state = meta["config"], part(tensors, "state.")
    hidden, letters = config["hidden_size"], tuple(config["padding_mode"])

    def convolve(x, conv, attention):
        renamed = convolution_state(state, conv, attention)
        sizes = x.shape[1], len(renamed["branches.0.weight"])
        options = {"grid_shape": (5, 5), "temperature": config["temperature"], "dynamic": True}
        bias = "branches.0.bias" in renamed
        layer = GridConv2d(*sizes, paddings=letters, bias=bias, **options).eval()
        layer.load_state_dict(renamed)
        return layer(x)

    def normalise(x, name):
        norm = nn.BatchNorm2d(hidden).eval()
        norm.load_state_dict(part(state, f"{name}."))
        return norm(x).relu()

    sgt = SemanticGridTransform(17, (5, 5), init=config["prior"])
    sgt.load_state_dict({"scores": state["sgt_layer.sgt_trans_mat"][0]})
    pose = tensors["in.pose2d"].requires_grad_()
    y = normalise(convolve(sgt(pose), "w1.", "atten_conv1."), "batch_norm1")
    for index in range(config["num_block"]):
        block, skipped = f"linear_stages.{index}.", y
        for k in "12":
            y = convolve(y, f"{block}w{k}.", f"{block}atten_conv{k}.")
            y = normalise(y, f"{block}batch_norm{k}")
        y = skipped + y
    y = sgt.inverse(convolve(y, "w2.", "atten_conv2."))
    assert_golden(y, tensors["out.pose3d"], meta)
    y.backward(tensors["in.cotangent"])
    assert_gradient(pose.grad, tensors["grad.pose2d"], meta)
    expected = tensors["grad.sgt_layer.sgt_trans_mat"][0]
    assert_gradient(sgt.scores.grad, expected, meta)


# The transform


def test_layouts():
    sgt = SemanticGridTransform(17, (5, 5), init="handcrafted")
    expected = torch.zeros(25, 17)
    for cell, node in enumerate(sum(HANDCRAFTED, ())):
        expected[cell, [8, 9] if node == MEAN else node] = 0.5 if node == MEAN else 1
    assert torch.equal(sgt.assignment(), expected)
    x = torch.randn(2, 17, 3)
    assert_close(sgt(x)[:, :, 2, 2], x[:, 8:10].mean(1))
    assert sgt.coverage().tolist() == [2, *[1] * 6, 5, 3, *[1] * 8]
    # "standard" is its mirror image but for the mean.
    mirrored = [nodes[::-1] for nodes in HANDCRAFTED]
    mirrored[2] = tuple(9 if node == MEAN else node for node in mirrored[2])
    chosen = SemanticGridTransform(17, (5, 5)).assignment().argmax(1)
    assert chosen.view(5, 5).tolist() == [list(nodes) for nodes in mirrored]


def test_the_mean_cell_does_not_learn():
    sgt = SemanticGridTransform(17, (5, 5), init="handcrafted")
    grid = sgt(torch.randn(2, 17, 3))
    (grid.pow(2).sum() + sgt.inverse(torch.randn_like(grid)).pow(2).sum()).backward()
    assert not sgt.scores.grad[12].any() and sgt.scores.grad[11].any()
    with torch.no_grad():
        sgt.scores.fill_(0).add_(torch.randn(25, 17))
    assert sgt.assignment()[12, 8:10].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cover", ["none", "repair"])
def test_assignments_are_binary_and_invertible(seed, cover):
    torch.manual_seed(seed)
    sgt = SemanticGridTransform(17, (4, 5), init="random", cover=cover)
    assert_close(sgt.scores.sum(1), torch.ones(20))
    for mode in (True, False):
        chosen = sgt.train(mode).assignment()
        assert set(chosen.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(chosen.sum(1), torch.ones(20))
    covered = sgt.coverage() > 0
    assert torch.equal(sgt.coverage(), chosen.sum(0))
    assert covered.all() if cover == "repair" else not covered.all()
    x = torch.randn(3, 17, 2)
    back = sgt.inverse(sgt(x))
    assert_close(back[:, covered], x[:, covered], rtol=0, atol=1e-6)
    assert not back[:, ~covered].any()


def test_repair_takes_the_cell_that_loses_least():
    scores = torch.tensor([[9.0, 1, 0], [5, 4.9, 3], [7, 0, 5.5], [8, 7.5, 6]])
    sgt = SemanticGridTransform(3, (2, 2), init=scores, cover="repair")
    # Node 1 takes cell 1 (5 - 4.9), then node 2 cell 2 (7 - 5.5), both not where they score most.
    assert sgt.assignment().argmax(1).tolist() == [0, 1, 2, 0]
    sgt = SemanticGridTransform(4, (2, 2), init=torch.zeros(2, 2).long(), cover="repair")
    assert sorted(sgt.assignment().argmax(1).tolist()) == [0, 1, 2, 3]
    whole = SemanticGridTransform(17, (5, 5), cover="repair").assignment()
    assert torch.equal(whole, SemanticGridTransform(17, (5, 5)).assignment())


@pytest.mark.parametrize("cover", ["none", "repair"])
def test_straight_through(cover):
    sgt = SemanticGridTransform(17, (5, 5), init="random", cover=cover)
    cotangent = torch.randn(25, 17)
    sgt.assignment().backward(cotangent)
    assert torch.equal(sgt.scores.grad, cotangent)
    assert not sgt.eval().assignment().requires_grad
    fixed = SemanticGridTransform(17, (5, 5), learnable=False)
    assert not fixed.assignment().requires_grad
    assert not any(parameter.requires_grad for parameter in fixed.parameters())


def test_inverse_is_the_formula_with_its_gradient():
    sgt = SemanticGridTransform(6, (3, 3), init="random", eps=1e-3).double()
    y = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    chosen = sgt.assignment()
    expected = chosen.T @ y.flatten(2).mT / (chosen.sum(0)[:, None] + 1e-3)
    cotangent = torch.randn_like(expected)
    grads = [torch.autograd.grad(out, sgt.scores, cotangent) for out in (expected, sgt.inverse(y))]
    assert_close(sgt.inverse(y), expected)
    assert_close(*grads)


def test_soft_samples():
    sgt = SemanticGridTransform(2, (1, 2), init=torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sgt.assignment(hard=False, generator=generator) for _ in range(4000)])
    assert_close(draws.sum(2), torch.ones(4000, 2))
    assert (draws > 0).all()
    # The largest entry is distributed as softmax of the scores (Gumbel's trick).
    shares = (draws.argmax(2) == 1).double().mean(0)
    assert_close(shares, sgt.scores.detach().double().softmax(1)[:, 1], rtol=0, atol=0.03)
    assert sgt.assignment(hard=False).requires_grad


def test_layouts_given_as_tensors():
    layout = torch.tensor([[0, 1, 2], [2, 1, 1]])
    sgt = SemanticGridTransform(4, (2, 3), init=layout)
    assert sgt.assignment().argmax(1).tolist() == [0, 1, 2, 2, 1, 1]
    assert sgt.coverage().tolist() == [1, 3, 2, 0]
    x = torch.randn(1, 4, 2)
    assert torch.equal(sgt(x)[0, :, 1, 0], x[0, 2])


# The convolution


@pytest.mark.parametrize("paddings", [("circular", "replicate"), ("zeros", "circular"), ("r", "z")])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_static_is_a_sum_of_two_convolutions(paddings, kernel_size):
    conv = GridConv2d(3, 4, kernel_size, paddings=paddings)
    x = torch.randn(2, 3, 6, 5)
    names = {"r": "replicate", "z": "zeros"}
    expected = 0
    for branch, padding in zip(conv.branches, paddings, strict=True):
        mode = names.get(padding, padding)
        plain = nn.Conv2d(3, 4, kernel_size, padding=kernel_size // 2, padding_mode=mode)
        plain.load_state_dict(branch.state_dict())
        expected = expected + plain(x)
    assert_close(conv(x), expected, rtol=0, atol=1e-6)
    ones = torch.ones(2, kernel_size**2, 6, 5)
    assert_close(conv(x, ones), expected, rtol=0, atol=1e-5)


def test_circular_commutes_with_shifts():
    conv = GridConv2d(2, 3, paddings=("circular", "circular"))
    x = torch.randn(2, 2, 5, 5)
    shifted = conv(x.roll((1, 2), (2, 3)))
    assert_close(shifted, conv(x).roll((1, 2), (2, 3)), rtol=0, atol=1e-5)


def test_forced_attention():
    conv = GridConv2d(4, 6, bias=False, dynamic=True, grid_shape=(4, 5)).eval()
    static = GridConv2d(4, 6, bias=False)
    static.branches.load_state_dict(conv.branches.state_dict())
    x, ones = torch.randn(3, 4, 4, 5), torch.ones(3, 9, 4, 5)
    assert_close(conv(x, ones), static(x), rtol=0, atol=1e-5)
    assert_close(conv(x, ones / 2), static(x) / 2, rtol=0, atol=1e-5)
    gates = conv.attention(x)
    assert gates.shape == (3, 9, 4, 5) and gates.min() > 0 and gates.max() < 1
    assert_close(gates, torch.full_like(gates, 0.5), rtol=0, atol=0.1)
    conv.set_temperature(float("inf"))
    assert torch.equal(conv.attention(x), ones / 2)
    assert_close(conv(x), static(x) / 2, rtol=0, atol=1e-5)


def test_gates_weigh_taps_and_cells_but_no_bias():
    conv = GridConv2d(2, 3, paddings=("circular", "zeros")).double()
    x, gates = torch.randn(1, 2, 4, 4).double(), torch.rand(1, 9, 4, 4).double()
    y = conv(x, gates)
    expected = sum(branch.bias for branch in conv.branches).detach().clone()
    for branch, mode in zip(conv.branches, ("circular", "constant"), strict=True):
        padded = functional.pad(x, (1, 1, 1, 1), mode)
        for tap in range(9):
            # Cell (1, 2) of the input is (2, 3) of the padded one.
            value = padded[0, :, 1 + tap // 3, 2 + tap % 3]
            kernel = branch.weight[:, :, tap // 3, tap % 3]
            expected += gates[0, tap, 1, 2] * (kernel @ value)
    assert_close(y[0, :, 1, 2], expected)


def test_initialisation():
    torch.manual_seed(0)
    conv = GridConv2d(64, 64, dynamic=True, grid_shape=(5, 5))
    bound = (64 * 9) ** -0.5
    for branch in conv.branches:
        for parameter in branch.parameters():
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
    attention = conv.attention
    assert attention.squeeze.bias is None and not attention.expand.bias.any()
    for layer, fan_out in ((attention.squeeze, 16), (attention.expand, 225)):
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert attention.squeeze.out_channels == 16
    assert GridAttention(512, (5, 5)).squeeze.out_channels == 32
    assert GridAttention(10, (5, 5), reduction=2, min_hidden=1).squeeze.out_channels == 5


def test_the_authors_network_has_its_size():
    def conv(i, o, bias=True):
        with torch.device("meta"):
            layer = GridConv2d(i, o, bias=bias, dynamic=True, grid_shape=(5, 5))
        return sum(p.numel() for p in layer.parameters())

    total = conv(2, 256) + 4 * conv(256, 256) + conv(256, 3, bias=False)
    assert (total + 5 * 2 * 256) / 1e6 == pytest.approx(4.79, abs=0.005)


def test_temperature_line():
    assert grid_temperature(0, 0, 7) == 30
    assert grid_temperature(3, 2, 8) == pytest.approx(1 + (1 - 3.25 / 10) * 29)
    assert grid_temperature(9, 6, 7) == pytest.approx(1 + 29 / 70)
    assert grid_temperature(10, 0, 7) == grid_temperature(99, 3, 7) == grid_temperature(9, 6, 7)
    assert grid_temperature(1, 0, 4, start=5.0, end=3.0, epochs=2) == 4


def test_the_temperature_is_saved():
    conv = GridConv2d(2, 3, dynamic=True, grid_shape=(4, 4))
    assert float(conv.temperature) == 30
    conv.set_temperature(7.5)
    assert isinstance(conv.temperature, torch.Tensor) and float(conv.temperature) == 7.5
    other = GridConv2d(2, 3, dynamic=True, grid_shape=(4, 4)).eval()
    other.load_state_dict(conv.state_dict())
    assert float(other.temperature) == 7.5
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(other(x), conv.eval()(x))
    without = {k: v for k, v in conv.state_dict().items() if "temperature" not in k}
    other.set_temperature(2)
    other.load_state_dict(without)
    assert float(other.temperature) == 2
    static = GridConv2d(2, 3)
    static.set_temperature(4)
    assert static.temperature is None and len(static.state_dict()) == 4


# Both


def layers():
    torch.manual_seed(0)
    yield GridConv2d(2, 3), (2, 2, 4, 4)
    yield GridConv2d(2, 3, dynamic=True, grid_shape=(4, 4)), (2, 2, 4, 4)
    yield SemanticGridTransform(5, (3, 3), init="random"), (2, 5, 2)
    yield SemanticGridTransform(5, (3, 3), init="random", cover="repair"), (2, 5, 2)
    yield SemanticGridTransform(17, (5, 5), init="handcrafted"), (2, 17, 2)


@pytest.mark.parametrize("index", range(5))
def test_gradients_copies_states_and_compilation(index):
    layer, shape = [*layers()][index]
    layer.eval()
    x = torch.randn(shape)
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), layer(x))
    with torch.no_grad():
        next(again.parameters()).add_(torch.randn_like(next(again.parameters())))
    assert not torch.equal(again(x), layer(x))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))

    compiled = torch.compile(again.train(), backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, copy.deepcopy(again)):
        again.zero_grad()
        inputs = x.clone().requires_grad_()
        y = function(inputs)
        y.sin().sum().backward()
        results.append((y, inputs.grad))
    assert_close(*results, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(layer.double().eval(), x.double().requires_grad_())


def test_parameters_pass_gradcheck():
    conv = GridConv2d(2, 2, dynamic=True, grid_shape=(3, 3), temperature=2).double()
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    names = [name for name, _ in conv.named_parameters()]

    def run(*values):
        return torch.func.functional_call(conv, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, tuple(conv.parameters()), fast_mode=True)
    sgt = SemanticGridTransform(5, (3, 3), init="random").double()
    grid = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sgt.inverse, grid)


@pytest.mark.parametrize("paddings", [("c", "r"), ("z", "z")])
def test_autocast(paddings):
    conv = GridConv2d(4, 3, paddings=paddings, dynamic=True, grid_shape=(5, 5))
    static = GridConv2d(4, 3, paddings=paddings)
    sgt = SemanticGridTransform(17, (5, 5))
    x = torch.randn(2, 17, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        grid = sgt(x)
        assert grid.dtype == torch.float32
        assert_close(sgt.inverse(grid), x, rtol=0, atol=1e-6)
        y = conv(grid)
        assert y.dtype == static(grid).dtype == torch.bfloat16
        back = sgt.inverse(y)
    back.float().sum().backward()
    assert_close(y.float(), conv(sgt(x)), rtol=0.05, atol=0.05)
    for tensor in (x, sgt.scores, *conv.parameters()):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    sgt = SemanticGridTransform(17, (4, 5), init="random").to(dtype)
    x = torch.randn(2, 17, 2, dtype=dtype)
    covered = sgt.coverage() > 0
    back = sgt.inverse(sgt(x))
    assert back.dtype == dtype and not back[:, ~covered].any()
    assert_close(back[:, covered], x[:, covered], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"num_nodes": 0}, "num_nodes"),
        ({"grid_shape": (0, 5)}, "grid_shape"),
        ({"grid_shape": (4, 4)}, "random"),
        ({"num_nodes": 16}, "random"),
        ({"init": "learnt"}, "init"),
        ({"init": torch.zeros(4, 4).long()}, "layout"),
        ({"init": torch.full((5, 5), 17)}, "0 to 16"),
        ({"init": torch.zeros(5, 5)}, "scores"),
        ({"cover": "all"}, "cover"),
        ({"init": "random", "grid_shape": (4, 4), "cover": "repair"}, "fewer cells"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_transform_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        SemanticGridTransform(**{"num_nodes": 17, "grid_shape": (5, 5), **arguments})


def test_transform_errors_of_inputs():
    with pytest.raises(TypeError, match="init"):
        SemanticGridTransform(17, (5, 5), init=[[0]])
    sgt = SemanticGridTransform(17, (5, 5))
    for shape in ((2, 16, 3), (17, 3), (1, 2, 17, 3)):
        with pytest.raises(ValueError, match="17"):
            sgt(torch.zeros(shape))
    for shape in ((2, 3, 5, 4), (2, 25, 3)):
        with pytest.raises(ValueError, match="5, 5"):
            sgt.inverse(torch.zeros(shape))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"in_channels": 0}, "in_channels"),
        ({"out_channels": 0}, "out_channels"),
        ({"kernel_size": 2}, "odd"),
        ({"kernel_size": 0}, "odd"),
        ({"paddings": ("circular", "reflect")}, "paddings"),
        ({"paddings": ("circular",)}, "paddings"),
        ({"kernel_size": 7, "grid_shape": (2, 5)}, "circular"),
        ({"dynamic": True}, "grid_shape"),
        ({"dynamic": True, "grid_shape": (5, 5), "reduction": 0}, "reduction"),
        ({"dynamic": True, "grid_shape": (5, 5), "min_hidden": 0}, "min_hidden"),
        ({"temperature": 0.0}, "temperature"),
        ({"dynamic": True, "grid_shape": (5, 5), "temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_convolution_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        GridConv2d(**{"in_channels": 2, "out_channels": 3, **arguments})


def test_convolution_errors_of_inputs():
    conv = GridConv2d(2, 3, dynamic=True, grid_shape=(5, 5))
    x = torch.zeros(2, 2, 5, 5)
    for shape in ((2, 9, 5, 4), (1, 9, 5, 5), (2, 3, 5, 5), (2, 9, 25)):
        with pytest.raises(ValueError, match="attention"):
            conv(x, torch.ones(shape))
    for bad in (x[:, :1], x[..., :4], x[0]):
        with pytest.raises(ValueError, match=r"x must be \(B, 2, 5, 5\)"):
            conv(bad)
    with pytest.raises(ValueError, match="single sample"):
        conv(x[:1])
    for layer in (conv, GridConv2d(2, 3)):
        with pytest.raises(ValueError, match="temperature"):
            layer.set_temperature(0)
    with pytest.raises(ValueError, match="circular"):
        GridConv2d(2, 3, 7)(torch.zeros(1, 2, 2, 5))


@pytest.mark.parametrize(
    "arguments", [(-1, 0, 5), (0, 5, 5), (0, -1, 5), (0, 0, 0), (0, 0, 5, 0, 1), (0, 0, 5, 1, 0)]
)
def test_temperature_errors(arguments):
    options = dict(zip(("start", "epochs"), arguments[3:], strict=False))
    with pytest.raises(ValueError):
        grid_temperature(*arguments[:3], **options)
