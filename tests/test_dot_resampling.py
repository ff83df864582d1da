"""Dot's up-sampling with Ske2Grid's learned interpolation."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from test_transformer_dots import inputs
from tiny_pipelines import TEXT_CHANNELS, text_unet
from tiny_transformers import conditions, grid_ids, tiny_dit, tiny_flux
from torch.nn import functional
from torch.testing import assert_close

from morse import MorseDot
from morse.dot.resampling import GridUpsample, set_upsamplers
from morse.sampling import JumpPoint
from morse.training.progressive import start_from

DASHES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
every = pytest.mark.parametrize("kind", DASHES)


@functools.cache
def call(kind):
    """What a Dot of this kind is called with."""
    if kind == DASHES[2]:
        return *inputs("dit"), conditions("dit")
    channels = 1 if kind == DASHES[0] else 4
    generator = torch.Generator().manual_seed(0)
    sample, before, output = torch.randn(3, 2, channels, 16, 16, generator=generator)
    jump = JumpPoint(before, torch.tensor([700, 700]), output)
    text = {"encoder_hidden_states": torch.randn(2, 5, TEXT_CHANNELS, generator=generator)}
    return sample, torch.tensor([600, 600]), jump, {} if kind == DASHES[0] else text


def run(dot, kind, dtype=torch.float32):
    sample, timestep, jump, further = call(kind)
    jump = JumpPoint(jump.sample.to(dtype), jump.timestep, jump.model_output.to(dtype))
    further = {k: v.to(dtype) if v.is_floating_point() else v for k, v in further.items()}
    with torch.no_grad():
        return dot(sample.to(dtype), timestep, jump, **further)


@pytest.fixture
def model(kind, build_unet):
    return {DASHES[0]: build_unet, DASHES[1]: text_unet, DASHES[2]: tiny_dit}[kind]()


def stir(dot):
    """Give the up-samplers weights as after some training."""
    generator = torch.Generator().manual_seed(5)
    for block in dot.up_blocks:
        weight = block.upsample.upt.weight.data
        weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return dot


@pytest.fixture
def trained(make_dot, model):
    return stir(make_dot(model, resample="ske2grid"))


@pytest.mark.parametrize("size", [(3, 5), (4, 4), (1, 2)])
def test_it_starts_as_copying_to_the_bit(size):
    hidden = torch.randn(2, 3, *size)
    expected = functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
    assert torch.equal(GridUpsample(size)(hidden), expected)


def test_each_position_has_weights_for_all_channels():
    layer = GridUpsample((2, 3))
    row = int(layer.placement[2 * 6 + 5])  # of the fine cell in row 2, column 5
    layer.upt.weight.data[row] = torch.arange(6.0)
    hidden = torch.randn(2, 4, 2, 3)
    expected = functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
    expected[:, :, 2, 5] = hidden.flatten(2) @ torch.arange(6.0)
    assert_close(layer(hidden), expected)


@every
def test_a_dot_starts_as_one_that_copies(kind, model, make_dot):
    plain, dot = make_dot(model), make_dot(model, resample="ske2grid")
    assert (run(MorseDot.from_dash(model, resample="ske2grid"), kind) == 0).all()
    own = dot.state_dict()
    new = own.keys() - plain.state_dict().keys()
    assert new == {"up_blocks.0.upsample.upt.weight", "up_blocks.1.upsample.upt.weight"}
    for name, value in plain.state_dict().items():
        assert torch.equal(own[name], value), name  # the same seed gives the same weights
    # A matrix product may hand on other memory formats, for which kernels round otherwise.
    assert_close(run(dot, kind), run(plain, kind), rtol=1e-5, atol=1e-6)
    assert (run(stir(dot), kind) - run(plain, kind)).abs().max() > 1e-3


@every
def test_saved_copied_merged_and_cast(kind, model, trained, tmp_path):
    expected = run(trained, kind)
    trained.save_pretrained(tmp_path)
    loaded = MorseDot.from_pretrained(tmp_path).bind(model)
    assert (loaded.config.resample, tuple(loaded.config.sample_size)) == (
        "ske2grid", tuple(call(kind)[0].shape[2:]))  # fmt: skip
    assert torch.equal(run(loaded, kind), expected)
    assert torch.equal(run(copy.deepcopy(trained).bind(model), kind), expected)
    assert_close(run(trained.merge_lora(), kind), expected, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(trained).to(torch.bfloat16).bind(copy.deepcopy(model).to(torch.bfloat16))
    found = run(half, kind, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.1 * expected.norm()


@every
def test_every_matrix_learns(kind, trained):
    sample, timestep, jump, further = call(kind)
    trained(sample, timestep, jump, **further).square().mean().backward()
    for block in trained.up_blocks:
        gradient = block.upsample.upt.weight.grad
        assert gradient.isfinite().all() and (gradient.abs().amax(1) > 0).all()


def test_other_sizes_are_refused(dash, make_dot):
    dot = make_dot(dash, resample="ske2grid")
    sample = torch.zeros(1, 1, 24, 16)
    with pytest.raises(ValueError, match=r"sample is 24x16.*ske2grid.*made for 16x16 alone"):
        dot(sample, torch.tensor([600]), JumpPoint(sample, torch.tensor([700]), sample))


def test_tokens_that_do_not_fill_the_grid():
    dash = tiny_dit(sample_size=12)  # 6x6 tokens, filled up to 8x8
    dot = MorseDot.from_dash(dash, 2, resample="ske2grid", lora_rank=0)
    assert [block.upsample.fine_size for block in dot.up_blocks] == [(4, 4), (8, 8)]
    sample, timestep, jump = inputs("dit", (12, 12))
    assert (dot(sample, timestep, jump, **conditions("dit")) == 0).all()


def test_packed_samples_name_their_size():
    dash = tiny_flux()
    with pytest.raises(ValueError, match=r"give sample_size=\(height, width\)"):
        MorseDot.from_dash(dash, resample="ske2grid", sample_size=None)
    dot = MorseDot.from_dash(dash, 1, resample="ske2grid", sample_size=(6, 8), lora_rank=0)
    sample, timestep, jump = inputs("flux", (12, 16))
    further = conditions("flux", grid=(6, 8))
    assert (dot(sample, timestep, jump, **further) == 0).all()
    further["img_ids"] = grid_ids(8, 6)
    with pytest.raises(ValueError, match=r"sample is 8x6.*6x8 alone"):
        dot(sample, timestep, jump, **further)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resample": "cubic"}, r"one of \('nearest', 'ske2grid'\), got 'cubic'"),
        ({"sample_size": (16, 16)}, r"leave sample_size out"),
        ({"resample": "ske2grid", "sample_size": (16, 12)}, r"multiples of 8, got 16x12"),
        ({"resample": "ske2grid", "sample_size": (0, 16)}, r"multiples of 8, got 0x16"),
        (
            {"resample": "ske2grid", "sample_size": (64, 64)},
            r"4194304 weights from 32x32 to 64x64.*resample='nearest'",
        ),
    ],
)
def test_what_is_refused(dash, options, message):
    with pytest.raises(ValueError, match=message):
        MorseDot.from_dash(dash, **options)


def test_a_picture_of_32x32_fits():
    blocks = [torch.nn.Module(), torch.nn.Module()]
    set_upsamplers(blocks, "ske2grid", (32, 32), 8, 1)
    assert [tuple(block.upsample.upt.weight.shape) for block in blocks] == [(256, 64), (1024, 256)]


def test_only_the_new_weights_may_be_missing(dash, make_dot):
    plain, dot = make_dot(dash), stir(make_dot(dash, resample="ske2grid"))
    given = plain.state_dict()
    matrix = dot.up_blocks[1].upsample.upt.weight.clone()

    def of(weights):
        return SimpleNamespace(config=plain.config, state_dict=lambda: weights)

    start_from(dot, of(given))
    assert torch.equal(dot.up_blocks[1].upsample.upt.weight, matrix)
    for broken in (
        given | {"more": matrix},
        {k: v for k, v in given.items() if "conv_out" not in k},
    ):
        with pytest.raises(ValueError, match=r"another network, in '(more|conv_out)"):
            start_from(dot, of(broken))
    half = given | {"up_blocks.1.upsample.upt.weight": matrix}
    with pytest.raises(ValueError, match=r"another network, in 'up_blocks\.0\.upsample"):
        start_from(dot, of(half))
