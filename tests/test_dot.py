import copy
import gc
import json
import weakref

import diffusers
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from morse import MorseDot
from morse.dot.fingerprint import _project, check_fingerprint, fingerprint
from morse.dot.lora import LowRank, describe_leaf
from morse.sampling import JumpPoint


def inputs(size=16, batch_size=2, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample, before, output = torch.randn(
        3, batch_size, channels, size, size, generator=generator
    ).unbind(0)
    jump = JumpPoint(before, torch.tensor([700] * batch_size), output)
    return sample, torch.tensor([600] * batch_size), jump


@pytest.mark.parametrize("num_down_blocks", [1, 2, 3])
@pytest.mark.supports("denoiser", "UNet2DModel")
def test_an_untrained_dot_is_exactly_reuse(dash, num_down_blocks):
    dot = MorseDot.from_dash(dash, num_down_blocks=num_down_blocks)
    assert (dot(*inputs()) == 0).all()


@pytest.mark.parametrize("num_down_blocks", [1, 2, 3])
def test_dash_layers_run_at_fewer_positions(dash, make_dot, num_down_blocks):
    dot = make_dot(dash, num_down_blocks=num_down_blocks)
    seen = []
    hook = (
        dash.down_blocks[0]
        .resnets[0]
        .conv1.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    )
    dot.bind(dash)(*inputs())
    hook.remove()
    assert seen == [16 // 2**num_down_blocks]


def test_a_trained_dot_depends_on_every_input(dash, make_dot):
    dot = make_dot(dash)
    sample, timestep, jump = inputs()
    base = dot(sample, timestep, jump)
    changed = [
        (sample + 1, timestep, jump),
        (sample, timestep - 300, jump),
        (sample, timestep, JumpPoint(jump.sample + 1, jump.timestep, jump.model_output)),
        (sample, timestep, JumpPoint(jump.sample, jump.timestep + 200, jump.model_output)),
        (sample, timestep, JumpPoint(jump.sample, jump.timestep, jump.model_output + 1)),
    ]
    for arguments in changed:
        assert (dot(*arguments) - base).abs().max() > 1e-4


def test_dash_is_untouched_before_and_after_training(dash):
    before = {name: value.clone() for name, value in dash.state_dict().items()}
    classes = [type(module) for module in dash.modules()]
    sample, timestep, jump = inputs()
    expected = dash(sample, timestep).sample
    dot = MorseDot.from_dash(dash, lora_rank=4).train()
    optimizer = torch.optim.AdamW(dot.parameters(), lr=1e-2)
    for _ in range(3):
        loss = (dot(sample, timestep, jump) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert dot(sample, timestep, jump).abs().max() > 1e-3
    assert dash.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in dash.state_dict().items())
    assert [type(module) for module in dash.modules()] == classes
    assert torch.equal(dash(sample, timestep).sample, expected)
    assert {id(p) for p in dot.parameters()}.isdisjoint(id(p) for p in dash.parameters())


def test_every_parameter_of_dot_gets_a_gradient(dash, make_dot):
    dot = make_dot(dash).train()
    dot(*inputs()).square().mean().backward()
    assert [name for name, p in dot.named_parameters() if p.grad is None] == []


def test_lora_sits_on_every_linear_and_conv_but_entry_and_exit(dash):
    dot = MorseDot.from_dash(dash)
    expected = {
        name
        for name, module in dash.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name not in ("conv_in", "conv_out")
    }
    assert set(dot.adapters) == expected and len(expected) > 20
    assert "lora.mid_block.resnets.0.conv1.lora_A.weight" in dot.state_dict()
    assert MorseDot.from_dash(dash, lora_rank=0).adapters == {}


def test_merged_lora_gives_the_same_output(dash, make_dot):
    dot = make_dot(dash)
    before = {name: value.clone() for name, value in dash.state_dict().items()}
    unmerged = dot(*inputs())
    merged = dot.merge_lora()(*inputs())
    assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in dash.state_dict().items())
    assert torch.equal(dot.unmerge_lora()(*inputs()), unmerged)


def test_changed_lora_is_merged_by_the_next_call(dash, make_dot):
    dot = make_dot(dash).merge_lora().bind(dash)
    before = dot(*inputs())
    with torch.no_grad():
        for adapter in dot.adapters.values():
            adapter.lora_B.weight.mul_(3)
    after = dot.merge_lora().bind(dash)(*inputs())
    assert not torch.allclose(after, before, atol=1e-2)
    assert_close(after, dot.unmerge_lora().bind(dash)(*inputs()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("merge", [False, True])
def test_attention_projects_all_tokens_as_one_matrix(dash, make_dot, merge):
    dot = make_dot(dash)
    if merge:
        dot.merge_lora()
    seen = []
    query = dash.mid_block.attentions[0].to_q
    hook = query.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    dot.bind(dash)(*inputs())
    hook.remove()
    assert seen[0].is_contiguous()
    assert type(dash.mid_block.attentions[0].group_norm) is nn.GroupNorm


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 10), nn.Conv2d(6, 10, 3, stride=2, padding=1), nn.Conv2d(6, 10, 1, bias=False)],
)
def test_low_rank_update_equals_a_change_of_the_weight(layer):
    update = LowRank(describe_leaf(layer), rank=3, alpha=6)
    nn.init.normal_(update.lora_B.weight)
    hidden = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 8, 8)
    expected = layer(hidden) + update(hidden)
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        changed.weight.copy_(update.merge(layer.weight))
    assert_close(changed(hidden), expected, rtol=1e-4, atol=1e-5)


def test_grouped_convolutions_carry_no_lora():
    assert describe_leaf(nn.Conv2d(8, 8, 3, groups=8)) is None


class TestSaving:
    def test_round_trip(self, dash, make_dot, tmp_path):
        dot = make_dot(dash, num_down_blocks=1, block_out_channels=(8,))
        dot.save_pretrained(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "README.md",
            "config.json",
            "diffusion_pytorch_model.safetensors",
        ]
        loaded = MorseDot.from_pretrained(tmp_path).bind(dash)
        assert torch.equal(loaded(*inputs()), dot(*inputs()))

    def test_only_dots_own_weights_are_saved(self, dash, make_dot, tmp_path):
        dot = make_dot(dash)
        shared = {value.data_ptr() for value in dash.state_dict().values()}
        assert shared.isdisjoint(value.data_ptr() for value in dot.state_dict().values())
        dot.save_pretrained(tmp_path)
        assert "lora_specs" in json.loads((tmp_path / "config.json").read_text())

    def test_the_default_device_does_not_matter(self, dash):
        expected = fingerprint(dash)
        with torch.device("meta"):
            assert fingerprint(dash) == expected

    @torch.no_grad()
    def test_merged_weights_leave_with_the_dot(self, dash, make_dot):
        dot, own = make_dot(dash).merge_lora().bind(dash), set(dash.parameters())
        merged = [weakref.ref(each) for each in dot._tree[0].parameters() if each not in own]
        assert merged
        expected = dot(*inputs())
        dot.to("cpu")
        gc.collect()
        assert all(each() is None for each in merged)
        assert torch.equal(dot.bind(dash)(*inputs()), expected)

    def test_another_dash_is_refused_with_both_fingerprints(self, dash, build_unet, tmp_path):
        MorseDot.from_dash(dash).save_pretrained(tmp_path)
        dot = MorseDot.from_pretrained(tmp_path)
        other = build_unet(seed=1)
        with pytest.raises(ValueError) as error:
            dot.bind(other)
        assert str(fingerprint(dash)) in str(error.value)
        assert str(fingerprint(other)) in str(error.value)
        with pytest.raises(ValueError, match="another Dash"):
            dot.bind(build_unet(channels=(32, 64)))

    def test_a_half_precision_copy_of_dash_is_accepted(self, dash):
        expected = fingerprint(dash)
        for dtype in (torch.float16, torch.bfloat16):
            check_fingerprint(copy.deepcopy(dash).to(dtype), expected)

    def test_a_fingerprint_is_computed_on_the_cpu(self):
        """MPS has no float64; "meta" stands in for a device."""
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            _project(torch.ones(2, 2, device="meta"))

    def test_an_unbound_dot_says_so(self, dash, tmp_path):
        MorseDot.from_dash(dash).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no Dash yet"):
            MorseDot.from_pretrained(tmp_path)(*inputs())

    def test_truncated_file(self, dash, tmp_path):
        MorseDot.from_dash(dash).save_pretrained(tmp_path)
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises((ValueError, OSError), match=r"diffusion_pytorch_model\.safetensors"):
            MorseDot.from_pretrained(tmp_path)

    def test_pickles_are_not_read(self, dash, tmp_path):
        dot = MorseDot.from_dash(dash)
        dot.save_pretrained(tmp_path, safe_serialization=False)
        with pytest.raises(OSError, match="safetensors"):
            MorseDot.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="use_safetensors"):
            MorseDot.from_pretrained(tmp_path, use_safetensors=False)

    def test_a_copy_leaves_dash_behind(self, dash, make_dot):
        dot = make_dot(dash)
        twin = copy.deepcopy(dot)
        with pytest.raises(ValueError, match="no Dash yet"):
            twin(*inputs())
        assert torch.equal(twin.bind(dash)(*inputs()), dot(*inputs()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_down_blocks": 4, "block_out_channels": (8,) * 4}, "num_down_blocks"),
        ({"num_down_blocks": 2, "block_out_channels": (8,)}, "block_out_channels"),
        ({"block_out_channels": (8, 6)}, "block_out_channels"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"lora_rank": -1}, "lora_rank"),
    ],
)
def test_options_are_checked(dash, options, message):
    with pytest.raises(ValueError, match=message):
        MorseDot.from_dash(dash, **options)


def test_wrong_image_size_for_m(dash):
    dot = MorseDot.from_dash(dash, num_down_blocks=3)
    with pytest.raises(ValueError, match=r"12x12.*num_down_blocks=3.*multiples of 16"):
        dot(*inputs(size=12))


def test_unsupported_class_is_named():
    class Odd(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"not supported for Odd; supported: .*UNet2DModel"):
        MorseDot.from_dash(Odd())
    skipping = diffusers.UNet2DModel(
        block_out_channels=(8, 8),
        down_block_types=("SkipDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SkipUpBlock2D"),
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match=r"UNet2DModel with skip blocks .* enable_morse"):
        MorseDot.from_dash(skipping)


def test_follows_changes_of_dash(dash, make_dot):
    dot = make_dot(dash)
    before = dot.bind(dash)(*inputs())
    assert torch.equal(dot.bind(dash)(*inputs()), before)
    dash.mid_block.resnets[0] = copy.deepcopy(dash.mid_block.resnets[0])
    with torch.no_grad():
        dash.mid_block.resnets[0].conv1.weight.mul_(-1)
    assert not torch.equal(dot.bind(dash)(*inputs()), before)
    dash.double()
    dot.double().bind(dash)
    sample, timestep, jump = inputs()
    jump = JumpPoint(jump.sample.double(), jump.timestep, jump.model_output.double())
    assert dot(sample.double(), timestep, jump).dtype == torch.float64


def test_class_conditions_reach_the_shared_layers(build_unet, make_dot):
    dash = build_unet(num_class_embeds=4)
    dot = make_dot(dash)
    zero = dot(*inputs(), class_labels=torch.tensor([0, 0]))
    assert not torch.equal(zero, dot(*inputs(), class_labels=torch.tensor([1, 0])))


def test_gradients_are_right(dash, make_dot):
    dot = make_dot(dash.double(), num_down_blocks=1, block_out_channels=(4,), lora_rank=1)
    dot = dot.double().bind(dash)
    sample, timestep, jump = inputs(size=4, batch_size=1)
    jump = JumpPoint(jump.sample.double(), jump.timestep, jump.model_output.double())
    name, parameter = next((n, p) for n, p in dot.named_parameters() if "mid_block" in n)

    def loss(value):
        swapped = {name: value}
        return torch.func.functional_call(dot, swapped, (sample.double(), timestep, jump)).sum()

    # functional_call swaps Dot's own tensors, which the shared layers' adapters are.
    torch.autograd.gradcheck(loss, parameter.detach().clone().requires_grad_(), fast_mode=True)


@pytest.fixture
def text_dash():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def test_a_config_that_cannot_be_written_leaves_the_old_one(make_dot, dash, tmp_path, monkeypatch):
    dot = make_dot(dash)
    dot.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    dot.register_to_config(speed_ratio=5.0)
    with pytest.raises(OSError, match="No space left"):
        dot.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_dash_whose_forward_method_hands_on_what_it_gets(make_dot, build_unet):
    class Own(type(build_unet())):
        def forward(self, sample, timestep, *args, **kwargs):
            return super().forward(sample, timestep, *args, **kwargs)

    dash = build_unet()
    given = inputs(channels=dash.config.in_channels)
    expected = make_dot(dash)(*given)
    dash.__class__ = Own
    assert_close(make_dot(dash)(*given), expected)


@pytest.mark.supports("denoiser", "UNet2DConditionModel")
def test_a_text_conditional_dash_hands_its_text_to_the_shared_layers(text_dash, make_dot):
    sample, timestep, jump = inputs(channels=4)
    text = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
    untrained = MorseDot.from_dash(text_dash, num_down_blocks=2)
    assert (untrained(sample, timestep, jump, encoder_hidden_states=text) == 0).all()
    dot = make_dot(text_dash)
    output = dot(sample, timestep, jump, encoder_hidden_states=text)
    assert output.shape == sample.shape
    assert (dot(sample, timestep, jump, encoder_hidden_states=text + 1) - output).abs().max() > 1e-4
    alone = dot(*(part[:1] for part in (sample, timestep)), JumpPoint(
        jump.sample[:1], jump.timestep[:1], jump.model_output[:1]
    ), encoder_hidden_states=text[:1])  # fmt: skip
    assert_close(alone, output[:1], rtol=1e-4, atol=1e-5)
