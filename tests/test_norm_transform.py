import copy

import pytest
import torch
from draws import draw
from torch import nn

from morse.distillation import NORMLoss
from morse.distillation.norm_transform import NORMTransform
from morse.sampling import JumpPoint


def make_transform(norm="batch", dtype=torch.float64, seed=0, **options):
    """A transform in eval mode whose batch statistics and affine parameters are not trivial."""
    torch.manual_seed(seed)
    ft = NORMTransform(6, 5, 3, norm=norm, **options).eval()
    for module in ft.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_()
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2)
    return ft.to(dtype)


def test_transform_is_its_formula():
    ft, x = make_transform(norm="none"), draw(2, 6, 4, 4)
    first, second = ft.expand.weight[..., 0, 0], ft.contract.weight[..., 0, 0]
    out, expanded = ft(x)
    torch.testing.assert_close(expanded, torch.einsum("oc,bchw->bohw", first, x))
    torch.testing.assert_close(out, torch.einsum("oc,bchw->bohw", second, expanded) + x)
    plain = make_transform(norm="none", residual=False)
    torch.testing.assert_close(plain(x)[0], out - x)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_transform_is_affine_in_eval(norm, residual):
    ft = make_transform(norm, residual=residual)
    x, y = draw(2, 6, 4, 4), draw(2, 6, 4, 4, seed=2)
    matrix, shift = ft.as_affine()
    c = shift[:, None, None]
    torch.testing.assert_close(ft(x)[0], torch.einsum("oc,bchw->bohw", matrix, x) + c)
    joint = 2 * (ft(x)[0] - c) - 3 * (ft(y)[0] - c)
    torch.testing.assert_close(ft(2 * x - 3 * y)[0] - c, joint)
    assert (norm == "none") == (not shift.any())
    assert make_transform(norm, torch.float32).as_affine()[0].dtype == torch.float32


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_identity_at_start_is_bitwise(norm):
    ft, x = NORMTransform(6, 5, 3, norm=norm, init="identity"), draw(2, 6, 4, 4).float()
    for mode in (True, False):
        assert torch.equal(ft.train(mode)(x)[0], x)
    ft.train()(x)[0].square().sum().backward()
    assert ft.contract.weight.grad.abs().max() > 0  # it can leave the identity
    assert not torch.equal(NORMTransform(6, 5, 3, norm=norm)(x)[0], x)


def test_official_initialisation():
    torch.manual_seed(0)
    ft = NORMTransform(64, 32, 8)
    for conv in (ft.expand, ft.contract):
        expected = (2 / conv.out_channels) ** 0.5
        # The standard deviation of 16384 draws is known to about 0.6 %.
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.03)
        assert conv.bias is None
    for norm in (ft.expand_norm, ft.contract_norm):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_tokens_are_pixels(norm):
    ft, x = make_transform(norm), draw(2, 6, 3, 4)
    tokens = ft(x.flatten(2).transpose(1, 2), channels_last=True)
    for of_tokens, of_pixels in zip(tokens, ft(x), strict=True):
        torch.testing.assert_close(of_tokens, of_pixels.flatten(2).transpose(1, 2))
    # As the docstring says what the loss takes.
    loss, teacher, wide = NORMLoss(3), draw(2, 5, 3, 4, seed=2), tokens[1].transpose(1, 2)
    torch.testing.assert_close(loss(wide.unflatten(2, (3, 4)), teacher), loss(ft(x)[1], teacher))
    with pytest.raises(ValueError, match="must be"):
        loss(wide, teacher.flatten(2))


# Folding


def next_layers():
    return {
        "linear": nn.Linear(6, 4),
        "1x1": nn.Conv2d(6, 4, 1),
        "replicate": nn.Conv2d(6, 4, 3, padding=1, padding_mode="replicate"),
        "reflect": nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", stride=2),
        "circular": nn.Conv2d(6, 4, 3, padding=2, padding_mode="circular", dilation=2),
        "valid": nn.Conv2d(6, 4, (3, 1), padding="valid"),
        "same 1x1": nn.Conv2d(6, 4, 1, padding="same"),
        "zeros": nn.Conv2d(6, 4, 3, padding=1),
        "no bias": nn.Conv2d(6, 4, 1, bias=False),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", next_layers())
def test_fold_is_exact(name, dtype):
    # The last two take no shift, and without normalisation there is none.
    norm = "none" if name in ("zeros", "no bias") else "batch"
    ft, layer = make_transform(norm, dtype), next_layers()[name].to(dtype)
    before = copy.deepcopy(layer.state_dict())
    folded = ft.fold(layer)
    x = draw(2, 6, 6, 6, dtype=dtype)
    if name == "linear":
        expected, actual = layer(ft(x)[0].mean((2, 3))), folded(x.mean((2, 3)))
    else:
        expected, actual = layer(ft(x)[0]), folded(x)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert (actual - (layer(x.mean((2, 3))) if name == "linear" else layer(x))).abs().max() > 0.1
    assert type(folded) is type(layer)
    after = folded.state_dict()
    assert {k: (t.shape, t.dtype) for k, t in after.items()} == {
        k: (t.shape, t.dtype) for k, t in before.items()
    }
    assert all(torch.equal(layer.state_dict()[key], tensor) for key, tensor in before.items())


def test_the_default_device_is_not_taken():
    ft, layer = make_transform(dtype=torch.float32), nn.Conv2d(6, 4, 1)
    expected = [*ft.as_affine(), ft.fold(layer).weight]
    with torch.device("meta"):
        actual = [*ft.as_affine(), ft.fold(layer).weight]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_fold_of_zero_shift_with_batch_norm():
    ft, layer = NORMTransform(6, 5, 3).double().eval(), nn.Conv2d(6, 4, 3, padding=1).double()
    x = draw(2, 6, 5, 5)
    torch.testing.assert_close(ft.fold(layer)(x), layer(ft(x)[0]), rtol=1e-10, atol=1e-10)


def test_fold_refuses():
    ft = make_transform(dtype=torch.float32)
    for layer, error, match in (
        (nn.Linear(5, 4), ValueError, "6 input channels, got 5"),
        (nn.Conv2d(6, 4, 1, groups=2), ValueError, "groups=1, got 2"),
        (nn.Conv2d(6, 4, 3, padding=1), ValueError, "pads with zeros"),
        (nn.Conv2d(6, 4, 3, padding="same"), ValueError, "pads with zeros"),
        (nn.Conv2d(6, 4, 1, padding=1), ValueError, "pads with zeros"),
        (nn.Linear(6, 4, bias=False), ValueError, "must have a bias"),
        (nn.ConvTranspose2d(6, 4, 1), TypeError, "got ConvTranspose2d"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), TypeError, "Parametrized"),
    ):
        with pytest.raises(error, match=match):
            ft.fold(layer)
    hooked = nn.Linear(6, 4)
    hooked.register_forward_pre_hook(lambda module, inputs: None)
    with pytest.raises(TypeError, match="has hooks"):
        ft.fold(hooked)
    for use in (ft.train().as_affine, lambda: ft.fold(nn.Linear(6, 4))):
        with pytest.raises(RuntimeError, match=r"eval\(\)"):
            use()
    make_transform("none").train().fold(nn.Linear(6, 4))  # no batch statistics, nothing to refuse


def test_a_dot_keeps_nothing_of_it(dash, make_dot):
    dot = make_dot(dash)
    sample = draw(2, 1, 16, 16, dtype=torch.float32)
    jump = JumpPoint(sample, torch.tensor(900), sample)
    first = dot.up_blocks[0].reduce
    torch.manual_seed(0)
    ft = NORMTransform(first.in_channels, 32, 4, norm="none").eval()
    names = {name: tensor.shape for name, tensor in dot.state_dict().items()}
    with torch.no_grad():
        plain = dot(sample, torch.tensor(700), jump)
        hook = first.register_forward_pre_hook(lambda _, args: ft(args[0])[0])
        trained = dot(sample, torch.tensor(700), jump)
        hook.remove()
        dot.up_blocks[0].reduce = ft.fold(first)
        exported = dot(sample, torch.tensor(700), jump)
    assert (trained - plain).abs().max() > 1e-3
    torch.testing.assert_close(exported, trained, rtol=1e-5, atol=1e-5)
    assert {name: tensor.shape for name, tensor in dot.state_dict().items()} == names


def test_bad_arguments():
    for options, match in (
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be"),
        ({"teacher_channels": -2}, "teacher_channels must be"),
        ({"norm": "layer"}, "norm must be"),
        ({"init": "zero"}, "init must be"),
        ({"eps": 0}, "eps must be"),
        ({"momentum": 2}, "momentum must be"),
        ({"init": "identity", "residual": False}, "needs residual=True"),
    ):
        with pytest.raises(ValueError, match=match):
            NORMTransform(**{"in_channels": 6, "teacher_channels": 5, **options})
    ft = NORMTransform(6, 5)
    for shape, channels_last in (((2, 6, 4), False), ((2, 5, 4, 4), False), ((2, 6, 4), True)):
        with pytest.raises(ValueError, match="x must be"):
            ft(torch.zeros(shape), channels_last=channels_last)
