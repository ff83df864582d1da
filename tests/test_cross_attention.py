"""ScaleKD's cross attention projector against its formula."""

import copy

import pytest
import torch
from draws import draw
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from morse.distillation import CrossAttentionProjector


def make_projector(*arguments, **options):
    torch.manual_seed(0)
    arguments = arguments or (6, 8, (3, 4), (4, 2))
    return CrossAttentionProjector(*arguments, **{"num_heads": 2, **options}).double()


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
def test_projector_is_its_formula(norm):
    projector = make_projector(norm=norm, softmax_scale=3.0).eval()
    x = draw(2, 6, 4, 2)
    features = projector.input_conv(x)
    if norm == "layer":
        channels_last = features.movedim(1, -1)
        module = projector.input_norm
        features = functional.layer_norm(channels_last, (6,), module.weight, module.bias).movedim(
            -1, 1
        )
    else:
        features = projector.input_norm(features)
    keys = (features.relu() + projector.pos_embed).flatten(2).transpose(1, 2)
    queries = functional.linear(
        projector.query, projector.query_proj.weight[..., 0, 0], projector.query_proj.bias
    ).relu()
    attention, heads = projector.attention, []
    q, k, v = attention.q(queries), attention.k(keys), attention.v(keys)
    for head in (slice(0, 4), slice(4, 8)):
        logits = 3.0 * q[:, head] @ k[..., head].transpose(1, 2) / 4**0.5
        heads.append(logits.softmax(-1) @ v[..., head])
    z = projector.norm(attention.out(torch.cat(heads, 2)))
    hidden = projector.ffn[0](z).relu()
    assert hidden.shape[-1] == 32
    assert_close(projector(x), z + projector.ffn[2](hidden))
    assert projector(x).shape == (2, 12, 8)


def test_queries():
    projector = make_projector().eval()
    x, query = draw(2, 6, 4, 2), draw(2, 12, 8, seed=1).requires_grad_()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    out = projector(x, query)
    assert_close(projector(x, query[:, order]), out[:, order])
    out.sum().backward()
    assert projector.query.grad is None and query.grad is not None
    assert_close(projector(x, projector.query.expand(2, -1, -1)), projector(x))
    without = make_projector(learned_query=False).eval()
    assert "query" not in without.state_dict()
    without.load_state_dict({k: v for k, v in projector.state_dict().items() if k != "query"})
    assert_close(without(x, query), out)


def test_one_key_leaves_nothing_to_ask():
    x = draw(2, 6, 1, 1)
    projector = make_projector(6, 8, (3, 4), (1, 1), softmax_scale=5.0).eval()
    other = copy.deepcopy(projector)
    other.attention.scale *= 7
    queries = [draw(2, 12, 8, seed=seed) for seed in (1, 2)]
    out = projector(x, queries[0])
    assert torch.equal(projector(x, queries[1]), out)
    assert torch.equal(other(x, queries[0]), out)
    assert_close(out, out[:, :1].expand(2, 12, 8))


def test_tokens_are_maps_in_row_major_order():
    projector = make_projector().eval()
    x = draw(2, 6, 4, 2)
    assert_close(projector(x.flatten(2).transpose(1, 2)), projector(x))


def test_initialisation_and_shapes():
    torch.manual_seed(0)
    projector = CrossAttentionProjector(64, 128, (32, 32))
    assert projector.pos_embed.shape == (1, 64, 32, 32) and projector.query.shape == (1024, 128)
    assert_close(projector.pos_embed.std().item(), 0.02, rtol=0.05, atol=0)
    assert_close(projector.query.std().item(), 1.0, rtol=0.05, atol=0)
    assert isinstance(projector.input_norm, nn.BatchNorm2d)
    groups = {48: 4, 128: 32, 6: 1}
    for channels, expected in groups.items():
        made = CrossAttentionProjector(channels, 8, (2, 2), norm="group")
        assert made.input_norm.num_groups == expected
    assert projector.attention.scale == 5.0 / 4


def test_projector_gradients():
    projector = make_projector(3, 4, (1, 2), (2, 2), norm="layer")
    x, query = draw(1, 3, 2, 2).requires_grad_(), draw(1, 2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(projector, (x, query))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_projector(backend):
    projector = make_projector(3, 4, (1, 2), (2, 2), norm="group")
    x = draw(2, 3, 2, 2).requires_grad_()
    expected = projector(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    out = torch.compile(projector, backend=backend, fullgraph=True)(x)
    assert_close(out, expected)
    assert_close(torch.autograd.grad(out.square().sum(), x)[0], gradient)
    torch._dynamo.reset()


def test_projector_in_lower_precision():
    projector = make_projector(norm="layer").float()
    x = draw(2, 6, 4, 2).float()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = projector(x)
    # bfloat16 keeps 8 bits, and the tokens are of order 1.
    assert_close(tokens.float(), projector(x), rtol=0, atol=0.1)


def test_projector_refuses():
    projector = make_projector()
    x, query = draw(2, 6, 4, 2), draw(2, 12, 8)
    for bad, match in (
        ((x[:, :5],), r"x must be \(B, 6, 4, 2\) or \(B, 8, 6\) by input_hw, got \(2, 5, 4, 2\)"),
        ((x[..., :1],), "x must be"),
        ((x.flatten(2),), "x must be"),
        ((x[0],), "x must be"),
        ((x, query[:, :9]), r"query must be \(2, 12, 8\) by query_hw, got \(2, 9, 8\)"),
        ((x, query[:1]), "query must be"),
        ((x, query[..., :4]), "query must be"),
    ):
        with pytest.raises(ValueError, match=match):
            projector(*bad)
    with pytest.raises(ValueError, match=r"there is no learned one \(learned_query=False\)"):
        make_projector(learned_query=False)(x)
    for options, match in (
        ({"num_heads": 3}, "num_heads=3 must divide teacher_channels=8"),
        ({"num_heads": 0}, "num_heads must be 1 or more, got 0"),
        ({"student_channels": 0}, "student_channels"),
        ({"teacher_channels": 0}, "teacher_channels"),
        ({"ffn_ratio": 0}, "ffn_ratio"),
        ({"softmax_scale": 0.0}, "softmax_scale"),
        ({"query_hw": (0, 3)}, "query_hw must be a height and a width"),
        ({"input_hw": (3,)}, "input_hw must be"),
        ({"norm": "instance"}, "norm must be one of"),
    ):
        arguments = {"student_channels": 6, "teacher_channels": 8, "query_hw": (3, 3)}
        with pytest.raises(ValueError, match=match):
            CrossAttentionProjector(**{**arguments, "num_heads": 2, **options})
