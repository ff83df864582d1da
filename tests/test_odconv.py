"""ODConv against closed forms, plain convolutions and bad arguments."""

import copy
import doctest

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from morse.modules import ODConv2d, linear_temperature, odconv, set_temperature

# in, out, kernel, options: every combination of heads, grouped and depthwise.
SHAPES = [
    (6, 10, 3, {"padding": 1, "stride": 2}),
    (8, 12, 3, {"padding": 2, "dilation": 2, "groups": 4, "kernel_num": 3}),
    (8, 8, 3, {"padding": 1, "groups": 8}),
    (8, 16, 3, {"padding": 1, "groups": 8, "kernel_num": 1}),
    (8, 8, 1, {"groups": 8}),
    (6, 10, 1, {}),
    (6, 10, 1, {"kernel_num": 1}),
    (6, 10, 3, {"kernel_num": 1, "bias": True}),
]
GATES = [3, 3, 2, 3, 1, 2, 2, 3]


def make(shape, dtype=torch.float32, seed=0, **more):
    """A layer of `SHAPES` with every parameter drawn, its input and the plain conv's options."""
    torch.manual_seed(seed)
    in_channels, out_channels, kernel, options = shape
    layer = ODConv2d(in_channels, out_channels, kernel, **options, **more).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    plain = {k: v for k, v in options.items() if k in ("stride", "padding", "dilation", "groups")}
    return layer.eval(), torch.randn(3, in_channels, 7, 6, dtype=dtype), plain


def test_examples():
    done = doctest.testmod(odconv, globs={})
    assert done.attempted >= 5 and not done.failed


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_a_convolution_a_sample(shape, dtype, atol):
    layer, x, plain = make(shape, dtype, temperature=2.0)
    kernels = layer.assembled_kernel(x)
    assert kernels.shape == (3, *layer.weight.shape[1:])
    rows = [
        functional.conv2d(row[None], kernel, layer.bias, **plain)
        for row, kernel in zip(x, kernels, strict=True)
    ]
    assert_close(layer(x), torch.cat(rows), rtol=atol, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_assembled_kernel_is_the_formula(shape):
    layer, x, _ = make(shape, torch.float64)
    gates = layer.attentions(x)
    n, out_channels, per_group, k, _ = layer.weight.shape
    expected = torch.zeros(3, out_channels, per_group, k, k, dtype=torch.float64)
    a_w = torch.ones(3, 1).double() if gates["kernel"] is None else gates["kernel"]
    for b in range(3):
        for o in range(out_channels):
            for i in range(per_group):
                group = o // (out_channels // layer.groups)
                gate = gates["channel"][b, group * per_group + i]
                if gates["filter"] is not None:
                    gate = gate * gates["filter"][b, o]
                if gates["spatial"] is not None:
                    gate = gate * gates["spatial"][b]
                expected[b, o, i] = gate * sum(a_w[b, j] * layer.weight[j, o, i] for j in range(n))
    assert_close(layer.assembled_kernel(x), expected)


@pytest.mark.parametrize("shape, gates", zip(SHAPES, GATES, strict=True))
def test_gates_at_one_half(shape, gates):
    layer, x, plain = make(shape, torch.float64)
    expected = 2.0**-gates * functional.conv2d(x, layer.weight.mean(0), **plain)
    if layer.bias is not None:
        expected = expected + layer.bias[:, None, None]
    hot = copy.deepcopy(layer)
    assert set_temperature(nn.Sequential(hot, nn.ReLU()), 1e9) == 1
    assert_close(hot(x), expected, rtol=1e-6, atol=1e-6)
    for name, parameter in layer.attention.named_parameters():
        if "_fc" in name:
            nn.init.zeros_(parameter)
    assert_close(layer(x), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_independent(shape):
    layer, x, _ = make(shape, torch.float64)
    order = torch.tensor([2, 0, 1])
    output = layer(x)
    assert_close(layer(x[order]), output[order])
    assert_close(torch.cat([layer(row[None]) for row in x]), output)
    other = torch.cat((x[:1], torch.randn_like(x[1:])))
    assert_close(layer(other)[:1], output[:1])


@pytest.mark.parametrize("shape", SHAPES)
def test_one_conditioning_row_serves_all(shape):
    layer, x, _ = make(shape, torch.float64, cond_dim=5)
    cond = torch.randn(1, 5, dtype=torch.float64)
    assert layer.attention.fc.weight.shape == (16, 5, 1, 1)
    assert_close(layer(x, cond), layer(x, cond.expand(3, 5)))
    assert_close(layer.assembled_kernel(x, cond), layer.assembled_kernel(x, cond.expand(3, 5)))
    rows = torch.randn(3, 5, dtype=torch.float64)
    assert_close(layer(x, rows)[1:2], layer(x[1:2], rows[1:2]))


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor that any operation returned has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_single_pointwise_kernel_is_gate_conv_gate():
    torch.manual_seed(0)
    layer = ODConv2d(32, 48, 1, kernel_num=1).eval()
    x = torch.randn(3, 32, 2, 2)
    gates = layer.attentions(x)
    expected = functional.conv2d(x * gates["channel"][..., None, None], layer.weight[0])
    with LargestTensor() as largest, torch.no_grad():
        output = layer(x)
    assert_close(output, expected * gates["filter"][..., None, None])
    assert largest.numel < 3 * 48 * 32


@pytest.mark.parametrize("temperature", [1.0, 30.0])
@pytest.mark.parametrize("kernel_num", [1, 4])
@pytest.mark.parametrize(
    "groups, out_channels, kernel", [(1, 12, 3), (4, 12, 3), (8, 8, 3), (1, 6, 1)]
)
def test_from_conv_begins_as_the_conv(temperature, kernel_num, groups, out_channels, kernel):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, out_channels, kernel, 2, 1, groups=groups).eval()
    layer = ODConv2d.from_conv(conv, kernel_num, temperature=temperature)
    x = torch.randn(2, 8, 7, 6)
    assert not layer.training
    assert_close(layer(x), conv(x), rtol=0, atol=1e-6)
    assert_close(layer.train()(x), conv(x), rtol=0, atol=1e-6)
    spread = layer.weight.std(0, correction=0).mean()
    assert spread > 1e-3 if kernel_num > 1 else spread == 0


@pytest.mark.parametrize("cond_dim", [None, 5])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_empty_batch(shape, norm, cond_dim):
    layer, x, _ = make(shape, attention_norm=norm, cond_dim=cond_dim)
    rows = () if cond_dim is None else (torch.zeros(3, 5),)
    expected, none = layer(x, *rows), [each[:0] for each in rows]
    for module in (layer, copy.deepcopy(layer).train()):
        found = module(x[:0], *none)
        assert found.shape == (0, *expected.shape[1:]) and found.requires_grad
    assert layer.assembled_kernel(x[:0], *none).shape == (0, *layer.weight.shape[1:])


def test_from_conv_parts_the_candidates():
    torch.manual_seed(0)
    layer = ODConv2d.from_conv(nn.Conv2d(8, 8, 3).double(), attention_norm="layer", cond_dim=4)
    assert layer.weight.dtype == torch.float64 and layer.training
    output = layer(torch.randn(2, 8, 5, 5).double(), torch.randn(2, 4).double())
    output.square().sum().backward()
    for name in ("channel", "filter", "spatial", "kernel"):
        assert getattr(layer.attention, f"{name}_fc").weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_count(shape):
    layer, _, _ = make(shape)
    n, out_channels, per_group, k, _ = layer.weight.shape
    width, h, g = layer.in_channels, 16, layer.groups
    count = n * out_channels * per_group * k**2 + width * h + 2 * h + (h + 1) * width
    count += (h + 1) * out_channels if not width == out_channels == g else 0
    count += ((h + 1) * k**2 if k > 1 else 0) + ((h + 1) * n if n > 1 else 0)
    count += out_channels if layer.bias is not None else 0
    assert sum(p.numel() for p in layer.parameters()) == count


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_gradients_are_right(norm):
    shape = (4, 6, 3, {"groups": 2, "kernel_num": 2, "min_hidden": 4, "bias": True})
    layer, x, _ = make(shape, torch.float64, attention_norm=norm, temperature=1.5)
    x = x[:2, :, :4, :4].clone().requires_grad_()
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))
    layer(x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in values)


@pytest.mark.parametrize("norm", ["layer", "group", "none"])
def test_trains_on_a_single_row(norm):
    layer, x, _ = make(SHAPES[0], attention_norm=norm)
    layer.train()
    assert_close(layer(x[:1]), layer(x)[:1])


def test_batch_norm_names_the_way_out():
    layer, x, _ = make(SHAPES[0])
    with pytest.raises(ValueError, match="attention_norm='layer'"):
        layer.train()(x[:1])
    layer.attention.bn.eval()
    layer(x[:1])
    shared, x, _ = make(SHAPES[0], cond_dim=4)
    with pytest.raises(ValueError, match="single row"):
        shared.train()(x, torch.randn(1, 4))


def test_layer_norm_is_torch_layer_norm():
    layer, _, _ = make(SHAPES[0], attention_norm="layer")
    rows = torch.randn(3, 16)
    expected = functional.layer_norm(
        rows, (16,), layer.attention.bn.weight, layer.attention.bn.bias
    )
    assert_close(layer.attention.bn(rows[..., None, None]).flatten(1), expected)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6]])
def test_compiles_without_breaks_or_recompiling(shape):
    layer, x, _ = make(shape)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for temperature in (1.0, 30.0, 29.0, 28.0):
        layer.set_temperature(temperature)
        assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", SHAPES)
def test_autocast_and_low_precision(shape):
    layer, x, _ = make(shape)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        single = layer(x[:1])
    assert output.dtype == single.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits.
    close = {"rtol": 0.05, "atol": 0.05 * expected.abs().max().item()}
    assert_close(output.float(), expected, **close)
    assert_close(single.float(), expected[:1], **close)
    low = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), expected, **close)


def test_temperature_survives_own_checkpoints_only(tmp_path):
    layer, x, _ = make(SHAPES[0], temperature=7.5)
    network = nn.Sequential(nn.ReLU(), layer)
    assert copy.deepcopy(network)[1].temperature == 7.5
    assert_close(copy.deepcopy(network)(x), network(x), rtol=0, atol=0)

    save_file(network.state_dict(), tmp_path / "own.safetensors")
    fresh = nn.Sequential(nn.ReLU(), make(SHAPES[0], seed=1)[0])
    fresh.load_state_dict(load_file(tmp_path / "own.safetensors"))
    assert fresh[1].temperature == 7.5
    assert_close(fresh(x), network(x), rtol=0, atol=0)

    official = {k: v for k, v in network.state_dict().items() if k != "1.temperature"}
    assert "1.attention.channel_fc.bias" in official
    fresh.load_state_dict(official)
    assert fresh[1].temperature == 1.0
    fresh[1].set_temperature(3.0)
    fresh.load_state_dict({}, strict=False)
    assert fresh[1].temperature == 3.0


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kernel_num": 0}, "kernel_num"),
        ({"reduction": 0.0}, "reduction"),
        ({"reduction": float("inf")}, "finite"),
        ({"min_hidden": float("inf")}, "finite"),
        ({"min_hidden": 0}, "min_hidden"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"groups": 3}, "groups=3"),
        ({"groups": 0}, "groups"),
        ({"kernel_size": (3, 1)}, "square"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"cond_dim": 0}, "cond_dim"),
        ({"init": "zeros"}, "init"),
        ({"attention_norm": "instance"}, "attention_norm"),
        ({"attention_norm": "layer", "min_hidden": 1}, "min_hidden"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(ValueError, match=words):
        ODConv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, **options})


def test_bad_inputs():
    layer, x, _ = make(SHAPES[0])
    for bad in (x[0], x[:, :5]):
        with pytest.raises(ValueError, match=r"x must be \(B, 6, H, W\)"):
            layer(bad)
    with pytest.raises(ValueError, match="set cond_dim"):
        layer(x, torch.zeros(3, 4))
    layer, x, _ = make(SHAPES[0], cond_dim=4)
    with pytest.raises(ValueError, match="cond is missing"):
        layer(x)
    for shape in ((3, 5), (2, 4), (4,)):
        with pytest.raises(ValueError, match="cond must be"):
            layer(x, torch.zeros(shape))


def test_default_temperature_and_identity_start():
    torch.manual_seed(0)
    layer, x = ODConv2d(6, 10, 3, padding=1, init="identity").eval(), torch.randn(3, 6, 7, 6)
    assert layer.temperature == 1.0 and layer.kernel_num == 4
    # The candidates differ; their mixture, with three gates at one half, is one kernel for all.
    assert (layer.weight[0] - layer.weight[1]).abs().max() > 1e-4
    kernel = layer.assembled_kernel(x)
    assert_close(kernel, layer.weight.mean(0).expand_as(kernel) / 8)
    assert_close(layer(x), functional.conv2d(x, kernel[0], padding=1))


def test_bad_sources_temperatures_and_schedules():
    with pytest.raises(TypeError, match="Conv2d"):
        ODConv2d.from_conv(nn.ConvTranspose2d(4, 4, 3))
    for options in ({"padding_mode": "circular", "padding": 1}, {"padding": "same"}):
        with pytest.raises(ValueError, match="pad with zeros"):
            ODConv2d.from_conv(nn.Conv2d(4, 4, 3, **options))
    with pytest.raises(ValueError, match="square"):
        ODConv2d.from_conv(nn.Conv2d(4, 4, (3, 1)))
    with pytest.raises(ValueError, match="noise"):
        ODConv2d.from_conv(nn.Conv2d(4, 4, 3), noise=-1.0)
    with pytest.raises(ValueError, match="temperature"):
        set_temperature(make(SHAPES[0])[0], -1.0)
    for arguments in ((-1, 10), (0, 0), (0, 10, 0.0), (0, 10, 30.0, -1.0)):
        with pytest.raises(ValueError, match=r"step|total|temperature"):
            linear_temperature(*arguments)
