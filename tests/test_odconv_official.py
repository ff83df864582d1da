"""ODConv against recordings of the authors' code and the sizes of their networks."""

import pytest
import torch
from golden_files import GOLDEN, part, read_golden
from torch.nn import functional
from torch.testing import assert_close

from morse.modules import ODConv2d, linear_temperature, set_temperature

LAYERS = sorted(
    path.stem
    for path in GOLDEN.glob("odconv_*.safetensors")
    if "trajectory" not in path.stem and "schedule" not in path.stem
)


def official_layer(meta, tensors):
    config = dict(meta["config"])
    sizes = config.pop("in_planes"), config.pop("out_planes"), config.pop("kernel_size")
    layer = ODConv2d(*sizes, **config)
    layer.load_state_dict(part(tensors, "state."))
    layer.set_temperature(meta.get("temperature", 1.0))
    return layer


def test_there_are_recordings():
    assert len(LAYERS) == 9


@pytest.mark.parametrize("name", LAYERS)
def test_recorded_layer(name):
    meta, tensors = read_golden(name)
    close = {"rtol": meta["rtol"], "atol": meta["atol"]}
    layer = official_layer(meta, tensors).eval()
    assert sum(p.numel() for p in layer.parameters()) == meta["params"]

    x = tensors["input.x"].requires_grad_()
    for which, gate in layer.attentions(x).items():
        assert (gate is None) == (f"attention_eval.{which}" not in tensors)
        assert (gate is None) == (which in meta["skipped_attentions"])
        if gate is not None:
            assert_close(gate, tensors[f"attention_eval.{which}"].view(gate.shape), **close)
    assert_close(layer(x), tensors["output.eval"], **close)
    assert_close(layer(x[:1]), tensors["output.eval_first_sample"], **close)

    output = layer.train()(x)
    assert_close(output, tensors["output.train"], **close)
    (output * tensors["probe"]).sum().backward()
    close_grad = {"rtol": meta["rtol"], "atol": meta["grad_atol"]}
    assert_close(x.grad, tensors["grad.x"], **close_grad)
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert grads.keys() == part(tensors, "grad.").keys() - {"x"}
    for key, grad in grads.items():
        assert_close(grad, tensors[f"grad.{key}"], **close_grad)
    state = layer.state_dict()
    for key, value in part(tensors, "state_after_train.").items():
        assert_close(state[key], value, **close)


def test_recorded_training():
    meta, tensors = read_golden("odconv_trajectory_a")
    layer = official_layer(meta, tensors).train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    close = {"rtol": 1e-4, "atol": meta["atol"]}
    steps = len(tensors["losses"])
    for step in range(steps):
        assert set_temperature(layer, linear_temperature(step + 1, steps)) == 1
        assert_close(layer.temperature.double(), tensors["temperatures"][step], rtol=1e-6, atol=0)
        loss = functional.mse_loss(layer(tensors[f"step{step}.x"]), tensors[f"step{step}.target"])
        assert_close(loss.double(), tensors["losses"][step], **close)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = layer.state_dict()
    for key, value in part(tensors, "state_final.").items():
        assert_close(state[key], value, **close)
    assert_close(layer.eval()(tensors[f"step{steps - 1}.x"]), tensors["output.final_eval"], **close)


def test_recorded_schedule():
    meta, tensors = read_golden("odconv_temperature_schedule")
    for number, schedule in enumerate(meta["schedules"]):
        length, epochs = schedule["iter_per_epoch"], schedule["temp_epoch"]
        for epoch, row in enumerate(tensors[f"schedule{number}"].tolist()):
            got = [linear_temperature(epoch * length + s, epochs * length) for s in range(len(row))]
            assert got == pytest.approx(row, abs=1e-9)
    assert linear_temperature(5, 10, start=1.0, end=3.0) == 2.0


def test_official_initialisation():
    torch.manual_seed(0)
    layer = ODConv2d(128, 128, 3, padding=1).eval()
    for weight, fan_out in ((layer.weight[1], 128 * 9), (layer.attention.channel_fc.weight, 128)):
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert layer.bias is None and not layer.attention.channel_fc.bias.any()
    x = torch.randn(4, 128, 8, 8)
    plain = functional.conv2d(x, layer.weight.mean(0), padding=1)
    # The authors' code measured 0.128 and 0.1251.
    assert (layer(x).std() / plain.std()).item() == pytest.approx(0.128, abs=0.006)
    layer.set_temperature(30)
    assert (layer(x).std() / plain.std()).item() == pytest.approx(0.1251, abs=0.001)


def resnet_convs(bottleneck):
    """Dynamic convolutions (I, O, k, groups) of ResNet18 or ResNet50 and its static parameters."""
    static, channels = 64 * 3 * 49 + 2 * 64, 64
    for width, blocks in zip(
        (64, 128, 256, 512), (3, 4, 6, 3) if bottleneck else (2,) * 4, strict=True
    ):
        out_channels = width * (4 if bottleneck else 1)
        for block in range(blocks):
            if bottleneck:
                convs = [(channels, width, 1, 1), (width, width, 3, 1), (width, out_channels, 1, 1)]
            else:
                convs = [(channels, width, 3, 1), (width, width, 3, 1)]
            yield from convs
            static += sum(2 * conv[1] for conv in convs)
            if block == 0 and channels != out_channels:
                static += channels * out_channels + 2 * out_channels
            channels = out_channels
    yield static + (channels + 1) * 1000


def mobilenet_convs(multiplier):
    """The same of MobileNetV2, whose every convolution but the first is dynamic."""

    def scaled(width):
        # Multiples of 8, and no more than a tenth is lost.
        rounded = max(8, int(width * multiplier + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * width * multiplier else rounded

    channels, last = scaled(32), max(1280, int(1280 * multiplier))
    static = channels * 27 + 2 * channels
    settings = [
        (1, 16, 1),
        (6, 24, 2),
        (6, 32, 3),
        (6, 64, 4),
        (6, 96, 3),
        (6, 160, 3),
        (6, 320, 1),
    ]
    for expand, width, blocks in settings:
        out_channels = scaled(width)
        for _ in range(blocks):
            hidden = channels * expand
            convs = [(channels, hidden, 1, 1)] if expand > 1 else []
            convs += [(hidden, hidden, 3, hidden), (hidden, out_channels, 1, 1)]
            yield from convs
            static += sum(2 * conv[1] for conv in convs)
            channels = out_channels
    yield channels, last, 1, 1
    yield static + 2 * last + (last + 1) * 1000


@pytest.mark.parametrize(
    "build, argument, kernel_num, total",
    [
        (resnet_convs, False, 1, 11_943_944),
        (resnet_convs, False, 4, 44_901_640),
        (resnet_convs, True, 1, 28_635_112),
        (resnet_convs, True, 4, 90_670_888),
        (mobilenet_convs, 1.0, 1, 4_940_185),
        (mobilenet_convs, 1.0, 4, 11_512_149),
        (mobilenet_convs, 0.5, 1, 2_425_537),
        (mobilenet_convs, 0.5, 4, 4_435_501),
    ],
)
def test_networks_have_the_authors_size(build, argument, kernel_num, total):
    *convs, static = build(argument)
    with torch.device("meta"):
        layers = [ODConv2d(i, o, k, groups=g, kernel_num=kernel_num) for i, o, k, g in convs]
    assert static + sum(p.numel() for layer in layers for p in layer.parameters()) == total
