"""ScaleKD's two views of features, and the cosine transform behind the second."""

import math

import pytest
import torch
from draws import draw
from torch.nn import functional
from torch.testing import assert_close

from morse.distillation import DualViewMimicking
from morse.distillation.functional import dct2, dct_matrix, idct2, remove_low_frequencies

# The cosine transform


@pytest.mark.parametrize("size", [(4, 4), (7, 5), (1, 3)])
def test_cosine_transform(size):
    x = draw(2, 3, *size)
    height, width = size
    expected = torch.zeros_like(x)
    for k in range(height):
        for m in range(width):
            rows = [2 * math.cos(math.pi * (2 * i + 1) * k / (2 * height)) for i in range(height)]
            columns = [2 * math.cos(math.pi * (2 * j + 1) * m / (2 * width)) for j in range(width)]
            weights = torch.tensor([[a * b for b in columns] for a in rows], dtype=x.dtype)
            expected[..., k, m] = (x * weights).sum((-2, -1))
    assert_close(dct2(x), expected, rtol=0, atol=1e-12)
    assert_close(idct2(dct2(x)), x, rtol=0, atol=1e-12)
    assert_close(dct2(idct2(x)), x, rtol=0, atol=1e-12)
    assert_close(dct2(x)[..., 0, 0], 4 * x.sum((-2, -1)))


def test_matrix():
    n, j = 6, torch.arange(6, dtype=torch.float64)
    expected = 2 * torch.cos(math.pi * (2 * j + 1) * j[:, None] / (2 * n))
    assert_close(dct_matrix(n, dtype=torch.float64), expected, rtol=0, atol=1e-12)
    assert dct_matrix(n).dtype == torch.float32
    with pytest.raises(ValueError, match="n must be 1 or more, got 0"):
        dct_matrix(0)


def test_the_default_device_is_not_that_of_maps():
    x = draw(1, 2, 4, 3)
    expected = remove_low_frequencies(x, (2, 1))
    with torch.device("meta"):
        actual = remove_low_frequencies(x, (2, 1))
        assert dct_matrix(3).is_meta and not dct_matrix(3, device="cpu").is_meta
    assert_close(actual, expected, rtol=0, atol=0)


def test_removed_frequencies():
    x = draw(2, 3, 6, 5)
    assert torch.equal(remove_low_frequencies(x, (1, 1)), x - x.mean((-2, -1), keepdim=True))
    for cutoff in ((1, 1), (2, 3), (6, 2), (0, 4), (6, 5)):
        coefficients = dct2(x)
        coefficients[..., : cutoff[0], : cutoff[1]] = 0
        cut = remove_low_frequencies(x, cutoff)
        assert_close(dct2(cut), coefficients, rtol=0, atol=1e-12)
        assert_close(remove_low_frequencies(cut, cutoff), cut, rtol=0, atol=1e-12)
    assert torch.count_nonzero(remove_low_frequencies(x, (6, 5))) == 0
    # An upsampled map loses all that its coarse grid can hold.
    coarse = functional.pad(dct2(draw(1, 1, 3, 2)), (0, 3, 0, 3))
    assert remove_low_frequencies(idct2(coarse), (3, 2)).abs().max() < 1e-12
    with torch.autocast("cpu", torch.bfloat16):
        single = remove_low_frequencies(x.float(), (2, 2))
    assert_close(single, remove_low_frequencies(x, (2, 2)).float())
    for cutoff in ((7, 1), (1, 6)):
        with pytest.raises(ValueError, match="exceeds the map, 6 x 5 positions"):
            remove_low_frequencies(x, cutoff)
    for cutoff in ((-1, 1), (1,), (0.5, 1)):
        with pytest.raises(ValueError, match="two whole numbers"):
            remove_low_frequencies(x, cutoff)


# The two views


def test_views_are_one_minus_cosine():
    tokens, other, teacher = draw(2, 20, 3), draw(2, 20, 3, seed=1), draw(2, 3, 4, 5, seed=2)
    losses = DualViewMimicking(0.5, 2.0)(tokens, other, teacher)
    maps = [x.transpose(1, 2).unflatten(2, (4, 5)) for x in (tokens, other)]
    cosine = functional.cosine_similarity(maps[0], teacher, dim=1)
    assert_close(losses["spatial"], 0.5 * 2 * (1 - cosine).sum() / 2)
    centred = [x - x.mean((2, 3), keepdim=True) for x in (maps[1], teacher)]
    cosine = functional.cosine_similarity(*centred, dim=1)
    assert_close(losses["frequency"], 2.0 * 2 * (1 - cosine).sum() / 2)
    mean = DualViewMimicking(0.5, 2.0, reduction="mean")(tokens, other, teacher)
    for name, loss in losses.items():
        assert_close(mean[name], loss / 20)


def test_invariances_zero_and_bound():
    tokens, teacher = draw(2, 16, 3), draw(2, 3, 4, 4, seed=1).requires_grad_()
    views = DualViewMimicking()
    losses = views(tokens, tokens, teacher)
    shift, scale = draw(3, seed=2), draw(2, 16, 1, seed=3).exp()
    shifted = views(tokens + shift, tokens + shift, teacher)
    assert_close(shifted["frequency"], losses["frequency"])
    assert abs(shifted["spatial"] - losses["spatial"]) > 1e-3
    shifted = views(tokens, tokens, teacher + shift[:, None, None])
    assert_close(shifted["frequency"], losses["frequency"])
    assert abs(shifted["spatial"] - losses["spatial"]) > 1e-3
    assert_close(views(tokens * scale, tokens, teacher)["spatial"], losses["spatial"])
    same = teacher.detach().flatten(2).transpose(1, 2)
    assert all(loss == 0 for loss in views(same, same, teacher).values())
    opposite = views(-same, -same, teacher)
    assert_close(opposite["spatial"], torch.tensor(4 * 0.08 * 16).double())
    assert_close(opposite["frequency"], torch.tensor(4 * 0.06 * 16).double())
    assert not DualViewMimicking().state_dict()


def test_nothing_is_left_to_compare():
    for size, cutoff in (((1, 1), (1, 1)), ((2, 3), (2, 3))):
        tokens = draw(2, size[0] * size[1], 3).requires_grad_()
        teacher = draw(2, 3, *size, seed=1)
        losses = DualViewMimicking(low_cutoff=cutoff)(tokens, tokens, teacher)
        losses["frequency"].backward()
        assert losses["frequency"] == 0 and torch.count_nonzero(tokens.grad) == 0


def test_view_gradients_and_precision():
    tokens, teacher = draw(2, 6, 3).requires_grad_(), draw(2, 3, 2, 3, seed=1).requires_grad_()
    views = DualViewMimicking(low_cutoff=(1, 2))
    assert torch.autograd.gradcheck(lambda x: tuple(views(x, x, teacher).values()), tokens)
    sum(views(tokens, tokens, teacher).values()).backward()
    assert teacher.grad is None
    half = tokens.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses = views(half, half, teacher.bfloat16())
    for name, loss in views(tokens, tokens, teacher).items():
        assert losses[name].dtype == torch.float32
        # bfloat16 keeps 8 bits.
        assert_close(losses[name].double(), loss, rtol=0.05, atol=0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_views(backend):
    tokens, teacher = draw(2, 6, 3), draw(2, 3, 2, 3, seed=1)
    views = DualViewMimicking(low_cutoff=(1, 2))
    losses = torch.compile(views, backend=backend, fullgraph=True)(tokens, tokens, teacher)
    assert_close(losses, views(tokens, tokens, teacher))
    torch._dynamo.reset()


def test_views_refuse():
    views, tokens, teacher = DualViewMimicking(), draw(2, 16, 3), draw(2, 3, 4, 4)
    for bad, match in (
        ((tokens[:, :9], tokens, teacher), r"tokens_spatial must be \(2, 16, 3\).*got \(2, 9, 3\)"),
        ((tokens, tokens[..., :2], teacher), r"tokens_frequency must be \(2, 16, 3\)"),
        ((tokens[:1], tokens, teacher), "tokens_spatial"),
        ((tokens, tokens, teacher[:, :2]), "tokens_spatial"),
        ((tokens, tokens, teacher[0]), r"teacher_map must be \(B, Ct, H, W\)"),
    ):
        with pytest.raises(ValueError, match=match):
            views(*bad)
    with pytest.raises(ValueError, match="exceeds the map"):
        DualViewMimicking(low_cutoff=(1, 5))(tokens, tokens, teacher)
    for options, match in (
        ({"spatial_weight": -1.0}, "spatial_weight must be finite, 0 or more, got -1.0"),
        ({"frequency_weight": math.inf}, "frequency_weight"),
        ({"low_cutoff": (1, -1)}, "two whole numbers"),
        ({"reduction": "sum"}, "reduction must be one of"),
    ):
        with pytest.raises(ValueError, match=match):
            DualViewMimicking(**options)
