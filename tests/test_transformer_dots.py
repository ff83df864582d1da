"""A weight-shared Dot for transformer denoisers, on tiny random models."""

import copy
import functools

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny_pipelines import TEXT_CHANNELS, text_unet
from tiny_transformers import (
    BUILDERS,
    conditions,
    grid_ids,
    sample_shapes,
    tiny_dit,
    tiny_flux,
    tiny_pixart,
    tiny_sd3,
)
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from morse import MorseDot
from morse.dot.body import run_body
from morse.dot.grid import Grid, find_grid
from morse.dot.ports import find_ports, time_embeddings
from morse.dot.tokens import pool_conditions
from morse.sampling import JumpPoint

NAMES = list(BUILDERS)
every = pytest.mark.parametrize("name", NAMES)


@functools.cache
def dash_of(name):
    return BUILDERS[name]()


@pytest.fixture
def dash(name):
    return dash_of(name)


def inputs(name, size=(16, 16), batch_size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape, out_shape = sample_shapes(name, size, batch_size)
    sample, before = torch.randn(2, *shape, generator=generator)
    output = torch.randn(out_shape, generator=generator)
    times = torch.tensor([[600.0], [700.0]]).repeat(1, batch_size)
    here, then = times / 1000 if name == "flux" else times
    return sample, here, JumpPoint(before, then, output)


def grid_of(size):
    return size[0] // 2, size[1] // 2


@every
@pytest.mark.parametrize("num_down_blocks", [1, 2, 3])
@pytest.mark.supports(
    "denoiser",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)
def test_an_untrained_dot_is_exactly_reuse(name, dash, num_down_blocks):
    dot = MorseDot.from_dash(dash, num_down_blocks, lora_rank=2)
    sample, timestep, jump = inputs(name)
    residual = dot(sample, timestep, jump, **conditions(name))
    assert residual.shape == jump.model_output.shape and (residual == 0).all()


@every
@pytest.mark.parametrize("num_down_blocks", [1, 2, 3])
def test_blocks_see_4_to_the_m_times_fewer_tokens(name, dash, make_dot, num_down_blocks):
    dot, seen = make_dot(dash, num_down_blocks=num_down_blocks), []
    block = dash.transformer_blocks[-1]
    hook = block.register_forward_pre_hook(
        lambda block, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0].shape[1]),
        with_kwargs=True,
    )
    dot.bind(dash)(*inputs(name), **conditions(name))
    hook.remove()
    assert seen == [(8 // 2**num_down_blocks) ** 2]


@every
def test_dot_depends_on_every_input_and_condition(name, dash, make_dot):
    dot = make_dot(dash, scale=0.2)
    (sample, timestep, jump), given = inputs(name), conditions(name)
    unit = 1 / 1000 if name == "flux" else 1
    base = dot(sample, timestep, jump, **given)
    changed = [
        (sample + 1, timestep, jump),
        (sample, timestep - 300 * unit, jump),
        (sample, timestep, JumpPoint(jump.sample + 1, jump.timestep, jump.model_output)),
        (sample, timestep, JumpPoint(jump.sample, jump.timestep + 200 * unit, jump.model_output)),
        (sample, timestep, JumpPoint(jump.sample, jump.timestep, jump.model_output + 1)),
    ]
    for arguments in changed:
        assert (dot(*arguments, **given) - base).abs().max() > 1e-4
    for key in given.keys() - {"img_ids", "txt_ids"}:
        more = {**given, key: given[key] + 1}
        assert (dot(sample, timestep, jump, **more) - base).abs().max() > 1e-4, key


@every
def test_a_batch_equals_its_samples_one_by_one(name, dash, make_dot):
    dot = make_dot(dash)
    (sample, timestep, jump), given = inputs(name), conditions(name)
    both = dot(sample, timestep, jump, **given)
    first = JumpPoint(jump.sample[:1], jump.timestep[:1], jump.model_output[:1])
    alone = {key: value if "ids" in key else value[:1] for key, value in given.items()}
    found = dot(sample[:1], timestep[0], first, **alone)
    assert_close(found, both[:1], rtol=1e-4, atol=1e-5)


@every
def test_dash_is_untouched(name, make_dot):
    dash = BUILDERS[name]()
    before = {key: value.clone() for key, value in dash.state_dict().items()}
    modules = list(dash.modules())
    (sample, timestep, jump), given = inputs(name), conditions(name)
    expected = dash(sample, timestep=timestep, **given).sample
    dot = make_dot(dash).train()
    optimizer = torch.optim.AdamW(dot.parameters(), lr=1e-2)
    loss = (dot(sample, timestep, jump, **given) - 1).square().mean()
    loss.backward()
    optimizer.step()
    assert [key for key, p in dot.named_parameters() if p.grad is None] == []
    assert all(torch.equal(value, before[key]) for key, value in dash.state_dict().items())
    assert all(one is other for one, other in zip(modules, dash.modules(), strict=True))
    assert torch.equal(dash(sample, timestep=timestep, **given).sample, expected)


@every
def test_lora_sits_on_every_linear_and_conv_but_entry_and_exit(name, dash):
    ends = {
        "dit": ("pos_embed.proj", "proj_out_2"),
        "pixart": ("pos_embed.proj", "proj_out"),
        "sd3": ("pos_embed.proj", "proj_out"),
        "flux": ("x_embedder", "proj_out"),
    }[name]
    leaves = {key for key, m in dash.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert leaves > set(ends)
    assert set(MorseDot.from_dash(dash, lora_rank=2).adapters) == leaves - set(ends)


@every
def test_merged_lora_gives_the_same_output(name, dash, make_dot):
    dot, given = make_dot(dash, scale=0.2), conditions(name)
    unmerged = dot(*inputs(name), **given)
    without = make_dot(dash, scale=0.2)
    for adapter in without.adapters.values():
        nn.init.zeros_(adapter.lora_B.weight)
    assert (without(*inputs(name), **given) - unmerged).abs().max() > 1e-3  # it matters
    assert_close(dot.merge_lora()(*inputs(name), **given), unmerged, rtol=1e-3, atol=1e-4)
    assert torch.equal(dot.unmerge_lora()(*inputs(name), **given), unmerged)


@every
def test_round_trip_to_disk(name, dash, make_dot, tmp_path):
    dot = make_dot(dash)
    dot.save_pretrained(tmp_path)
    loaded = MorseDot.from_pretrained(tmp_path).bind(dash)
    given = conditions(name)
    assert torch.equal(loaded(*inputs(name), **given), dot(*inputs(name), **given))
    other = copy.deepcopy(dash)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    with pytest.raises(ValueError, match="another Dash"):
        loaded.bind(other)


@every
def test_half_precision(name, make_dot):
    dash = BUILDERS[name]().bfloat16()
    dot = make_dot(dash)
    sample, timestep, jump = inputs(name)
    jump = JumpPoint(jump.sample.bfloat16(), jump.timestep, jump.model_output.bfloat16())
    given = {
        key: value if key in ("img_ids", "class_labels") else value.bfloat16()
        for key, value in conditions(name).items()
    }
    residual = dot(sample.bfloat16(), timestep, jump, **given)
    assert residual.dtype == torch.bfloat16 and residual.isfinite().all()


class TestTime:
    """Dot's own blocks and the shared ones hear t_i and t_s."""

    @pytest.fixture
    def heard(self, name, dash):
        """What goes into each layer that turns the conditioning into shifts and scales."""
        blocks = dash.transformer_blocks
        if name == "pixart":
            layers = [dash.adaln_single.linear]
        else:
            layers = [block.norm1.linear for block in blocks]
        seen = []
        hooks = [
            layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
            for layer in layers
        ]
        yield seen
        for hook in hooks:
            hook.remove()

    def conditioning(self, name, dash, timestep, given):
        """What Dash makes of a timestep, by its own layers."""
        if name == "dit":
            labels = given["class_labels"]
            return [
                block.norm1.emb(timestep, labels, hidden_dtype=torch.float32)
                for block in dash.transformer_blocks
            ]
        if name == "pixart":
            return [dash.adaln_single(timestep, None, 2, torch.float32)[1]]
        times = timestep * 1000 if name == "flux" else timestep
        together = dash.time_text_embed(times, given["pooled_projections"])
        return [together] * len(dash.transformer_blocks)

    @every
    def test_closed_form(self, name, dash, heard, make_dot):
        dot = make_dot(dash, scale=0.3, lora_rank=0)
        (sample, timestep, jump), given = inputs(name), conditions(name)
        owner = dash.get_submodule(time_embeddings(dash)[0].rpartition(".")[0])
        since = jump.timestep * 1000 if name == "flux" else jump.timestep
        shift = dot.jump_time(owner.timestep_embedder(owner.time_proj(since)))
        assert shift.abs().min() > 1e-5
        expected = self.conditioning(name, dash, timestep, given)
        heard.clear()
        own = []
        dot.down_blocks[0].resnets[0].register_forward_pre_hook(
            lambda block, args: own.append(args[1])
        )
        dot.bind(dash)(sample, timestep, jump, **given)
        assert len(heard) == len(expected)
        for found, each in zip(heard, expected, strict=True):
            assert_close(found, functional.silu(each + shift), rtol=1e-4, atol=1e-5)
        here = timestep * 1000 if name == "flux" else timestep
        assert_close(own[0], owner.timestep_embedder(owner.time_proj(here)) + shift)


class TestPositions:
    """A token that stands for a square of tokens has their mean position."""

    def sincos(self, rows, columns, channels=12):
        """Dosovitskiy et al. 2021's embedding as diffusers lays it out: columns first."""
        frequencies = 10000 ** (-torch.arange(channels // 4) / (channels / 4)).double()

        def embed(positions):
            angles = positions[:, None] * frequencies
            return torch.cat([angles.sin(), angles.cos()], dim=-1)

        by_row = embed(rows)[:, None].expand(-1, len(columns), -1)
        by_column = embed(columns)[None].expand(len(rows), -1, -1)
        return torch.cat([by_column, by_row], dim=-1).float()

    def squares(self, table, factor):
        """Means over squares, at the border over what is there."""
        return torch.stack([
            table[i : i + factor, j : j + factor].flatten(0, 1).mean(0)
            for i in range(0, table.shape[0], factor)
            for j in range(0, table.shape[1], factor)
        ])  # fmt: skip

    def first_block(self, name, dash, size, m, given):
        """What the first block gets where Dot's features are zero."""
        seen = []
        hook = dash.transformer_blocks[0].register_forward_pre_hook(
            lambda block, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        dot = MorseDot.from_dash(dash, m, lora_rank=0)
        (sample, timestep, _), tree = inputs(name, size), dot._tree[0]
        hook.remove()
        grid = find_grid(find_ports(tree), sample, given.get("img_ids"), dot.config)
        width = dot.config.feature_channels
        features = torch.zeros_like(grid.spread(sample))[:, :1].repeat(1, width, 1, 1)
        features = functional.avg_pool2d(features, dot.config.patch_size * 2**m)
        times = {key: torch.zeros(2, dot.config.time_embed_dim) for key in time_embeddings(tree)}
        hook = tree.transformer_blocks[0].register_forward_pre_hook(
            lambda block, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        run_body(tree, features, timestep, times, grid, 2**m, given)
        hook.remove()
        args, kwargs = seen[-1]
        return args[0] if args else kwargs["hidden_states"], kwargs

    @pytest.mark.parametrize("m", [1, 2])
    @pytest.mark.parametrize(
        ("name", "size"),
        [
            ("dit", (16, 16)),
            ("dit", (24, 24)),
            ("pixart", (16, 16)),
            ("pixart", (12, 20)),
            ("sd3", (16, 16)),
            ("sd3", (12, 20)),
        ],
    )
    def test_patches(self, name, dash, size, m):
        tokens, _ = self.first_block(name, dash, size, m, conditions(name))
        rows, columns = (torch.arange(side).double() for side in grid_of(size))
        if name == "sd3":  # a table of 12x12 for 8x8 patches, of which the middle is taken
            rows, columns = (
                (places + (12 - len(places)) // 2) / (12 / 8) for places in (rows, columns)
            )
        else:  # stretched to the 8x8 patches of the training size
            rows, columns = (places / (len(places) / 8) for places in (rows, columns))
        expected = self.squares(self.sincos(rows, columns), 2**m)
        assert_close(tokens, expected.expand(2, -1, -1), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("m", [1, 2])
    @pytest.mark.parametrize("size", [(16, 16), (8, 24), (12, 20)])
    def test_packed(self, size, m):
        name, dash = "flux", dash_of("flux")
        given = conditions(name, grid=grid_of(size))
        tokens, kwargs = self.first_block(name, dash, size, m, given)
        assert (tokens == 0).all()
        height, width = grid_of(size)
        means = self.squares(grid_ids(height, width).unflatten(0, (height, width)), 2**m)
        places = torch.cat([given["txt_ids"], means])
        angles = []
        for axis, channels in enumerate((2, 2, 4)):
            frequencies = 10000 ** (-torch.arange(0, channels, 2).double() / channels)
            angle = places[:, axis, None].double() * frequencies
            angles.append(angle.repeat_interleave(2, dim=-1))
        angles = torch.cat(angles, dim=-1).float()
        cosines, sines = kwargs["image_rotary_emb"]
        assert_close(cosines, angles.cos())
        assert_close(sines, angles.sin())


class TestSizes:
    @pytest.mark.parametrize("height", [1, 3, 8])
    @pytest.mark.parametrize("width", [2, 5])
    @pytest.mark.parametrize("packed", [True, False])
    def test_laying_out_is_undone(self, height, width, packed):
        sample = torch.randn(2, 3, height, width)
        given = sample.flatten(2).transpose(1, 2) if packed else sample
        grid = Grid(height, width, packed, multiple=4)
        picture = grid.spread(given)
        assert picture.shape == (2, 3, -(-height // 4) * 4, -(-width // 4) * 4)
        assert torch.equal(picture[..., :height, :width], sample)
        assert torch.equal(picture[..., -1, -1], sample[..., -1, -1])
        assert torch.equal(grid.gather(picture), given)

    @pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
    def test_sizes_that_dot_does_not_halve(self, name, dash, make_dot):
        dot, size = make_dot(dash, num_down_blocks=2), (12, 20)
        sample, timestep, jump = inputs(name, size)
        residual = dot(sample, timestep, jump, **conditions(name, grid=grid_of(size)))
        assert residual.shape == jump.model_output.shape and residual.abs().max() > 1e-3
        # Changing the size leaves nothing behind.
        again = dot(*inputs(name), **conditions(name))
        assert torch.equal(again, make_dot(dash)(*inputs(name), **conditions(name)))

    def test_squares_of_dit_that_dot_does_not_halve(self, make_dot):
        residual = make_dot(tiny_dit())(*inputs("dit", (12, 12)), **conditions("dit"))
        assert residual.shape == (2, 8, 12, 12)

    def test_what_dash_refuses_too(self):
        dot = MorseDot.from_dash(dash_of("sd3"), lora_rank=0)
        with pytest.raises(ValueError, match=r"15x16.*multiples of 2"):
            dot(*inputs("sd3", (15, 16)), **conditions("sd3"))

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (None, "img_ids is None"),
            (grid_ids(4, 8), "a 4x8 picture"),
            (torch.cat([grid_ids(4, 8), grid_ids(4, 8) + torch.tensor([1.0, 0, 0])]), "not the"),
            (grid_ids(8, 8).flip(0)[torch.randperm(64)], "not the"),
            (grid_ids(8, 9)[:64], "not the"),
        ],
    )
    def test_packed_samples_that_are_not_one_picture(self, ids, message):
        dot = MorseDot.from_dash(dash_of("flux"), lora_rank=0)
        given = {**conditions("flux"), "img_ids": ids}
        with pytest.raises(ValueError, match=message):
            dot(*inputs("flux"), **given)

    def test_a_packed_picture_lies_as_the_pipeline_packs_it(self):
        from diffusers import FluxPipeline

        latents = torch.randn(2, 4, 8, 20)
        packed = FluxPipeline._pack_latents(latents, 2, 4, 8, 20)
        ids = FluxPipeline._prepare_latent_image_ids(2, 4, 10, "cpu", torch.float32)
        grid = find_grid(
            find_ports(dash_of("flux")),
            packed,
            ids,
            {"size_multiple": 1, "num_down_blocks": 1, "patch_size": 1},
        )
        assert (grid.height, grid.width) == (4, 10)
        assert torch.equal(grid.spread(packed), functional.pixel_unshuffle(latents, 2))


class TestConditions:
    """What Dash's own forward method handles, inside Dot."""

    def residual(self, name, dot, **more):
        return dot(*inputs(name), **conditions(name), **more)

    def test_learned_variance(self, make_dot):
        dot = make_dot(dash_of("dit"))
        assert (dot.conv_in.in_channels, dot.config.output_channels) == (4 + 4 + 8, 8)
        assert self.residual("dit", dot)[:, 4:].abs().max() > 1e-3

    def test_pixart_masks_text(self, make_dot):
        dot = make_dot(dash_of("pixart"))
        (sample, timestep, jump), given = inputs("pixart"), conditions("pixart")
        mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
        found = dot(sample, timestep, jump, **given, encoder_attention_mask=mask)
        given["encoder_hidden_states"][:, 3:] += 1
        again = dot(sample, timestep, jump, **given, encoder_attention_mask=mask)
        assert torch.equal(found, again)
        assert not torch.equal(found, self.residual("pixart", dot))

    def test_pixart_masks_positions(self, make_dot):
        dot = make_dot(dash_of("pixart"), num_down_blocks=1)
        plain = self.residual("pixart", dot)
        mask = torch.ones(2, 8, 8)
        mask[:, :3] = 0  # the second row of squares is half there
        kept = self.residual("pixart", dot, attention_mask=torch.ones(2, 64))
        assert_close(kept, plain)
        found = self.residual("pixart", dot, attention_mask=mask.flatten(1))
        assert (found - plain).abs().max() > 1e-4
        mask[:, 2] = 1
        assert torch.equal(found, self.residual("pixart", dot, attention_mask=mask.flatten(1)))

    def test_pixart_size_conditions(self, make_dot):
        dot = make_dot(tiny_pixart(use_additional_conditions=True), scale=0.2)
        one, other = (
            {"resolution": torch.full((2, 2), size), "aspect_ratio": torch.ones(2, 1)}
            for size in (512.0, 900.0)
        )
        found = self.residual("pixart", dot, added_cond_kwargs=one)
        assert not torch.equal(found, self.residual("pixart", dot, added_cond_kwargs=other))

    def test_sd3_skipped_layers(self, make_dot):
        dash = dash_of("sd3")
        dot, seen = make_dot(dash), []
        hooks = [
            block.register_forward_pre_hook(lambda block, args, n=number: seen.append(n))
            for number, block in enumerate(dot.bind(dash)._tree[0].transformer_blocks)
        ]
        self.residual("sd3", dot, skip_layers=[0])
        for hook in hooks:
            hook.remove()
        assert seen == [1]

    @pytest.mark.parametrize(
        ("name", "feature"),
        [
            ("sd3", "block_controlnet_hidden_states"),
            ("flux", "controlnet_block_samples"),
            ("flux", "controlnet_single_block_samples"),
        ],
    )
    def test_controlnets_features_are_averaged(self, name, feature, make_dot):
        dot = make_dot(dash_of(name), num_down_blocks=1)
        width = dot.config.feature_channels
        small = torch.randn(2, 4, 4, width)
        large = small.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
        large = large + torch.tensor([1.0, -1.0]).repeat(32)[:, None]  # averages out
        pooled = pool_conditions({feature: [large], "other": 1}, (8, 8), 2)
        assert_close(pooled[feature][0], small.flatten(1, 2), rtol=1e-4, atol=1e-5)
        assert pooled["other"] == 1
        found = self.residual(name, dot, **{feature: [large]})
        assert (found - self.residual(name, dot)).abs().max() > 1e-4

    def test_flux_guidance(self, make_dot):
        dot = make_dot(tiny_flux(guidance_embeds=True), scale=0.2)
        found = [self.residual("flux", dot, guidance=torch.full((2,), g)) for g in (1.0, 9.0)]
        assert (found[0] - found[1]).abs().max() > 1e-4

    def test_flux_takes_old_three_dimensional_ids(self, make_dot):
        dot, given = make_dot(dash_of("flux")), conditions("flux")
        found = dot(*inputs("flux"), **given)
        given["img_ids"] = given["img_ids"].expand(2, -1, -1)
        assert torch.equal(dot(*inputs("flux"), **given), found)


class TestFusedProjections:
    @pytest.fixture(params=["unet", "pixart", "sd3", "flux"])
    def case(self, request):
        name = request.param
        if name == "unet":
            text = {"encoder_hidden_states": torch.ones(2, 3, TEXT_CHANNELS)}
            return text_unet(), inputs("sd3"), text
        return BUILDERS[name](), inputs(name), conditions(name)

    def test_fused_before(self, case):
        dash, _, _ = case
        dash.fuse_qkv_projections()
        with pytest.raises(ValueError, match=r"fused projections.*unfuse_qkv_projections"):
            MorseDot.from_dash(dash)

    def test_fused_after(self, case, make_dot):
        dash, arguments, given = case
        dot = make_dot(dash)
        expected = dot(*arguments, **given)
        dash.fuse_qkv_projections()
        with pytest.raises(ValueError, match="fused projections"):
            dot.bind(dash)
        dash.unfuse_qkv_projections()
        assert torch.equal(dot.bind(dash)(*arguments, **given), expected)


# DiT embeds the timestep in every block: reentrant checkpoints would free what they share.
@pytest.mark.parametrize(
    ("name", "reentrant"),
    [(name, False) for name in ("unet", "text unet", *NAMES)]
    + [(name, True) for name in ("unet", "pixart", "sd3", "flux")],
)
def test_gradient_checkpointing_changes_no_gradient(name, reentrant, build_unet, make_dot):
    if "unet" in name:
        dash, given = build_unet(), {}
        if name == "text unet":
            dash, given = text_unet(), conditions("pixart")
        shape = (2, dash.config.in_channels, 16, 16)
        sample = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        before = JumpPoint(sample, torch.tensor([700, 700]), sample.flip(2))
        arguments = sample, torch.tensor([600, 600]), before
    else:
        dash, given, arguments = BUILDERS[name](), conditions(name), inputs(name)
    dash.requires_grad_(False)
    dot, calls = make_dot(dash).train(), []

    def gradients():
        dot.zero_grad()
        dot.bind(dash)(*arguments, **given).square().mean().backward()
        return {key: parameter.grad.clone() for key, parameter in dot.named_parameters()}

    def again(block, *args):
        calls.append(block)
        return checkpoint(block, *args, use_reentrant=reentrant)

    expected = gradients()
    dash.enable_gradient_checkpointing(again)
    found = gradients()
    assert calls
    for key, gradient in found.items():
        assert_close(gradient, expected[key], rtol=1e-4, atol=1e-7, msg=key)


def test_an_unsupported_class_lists_what_is_supported():
    class Odd(nn.Module):
        pass

    with pytest.raises(ValueError, match="for Odd; supported: ") as error:
        MorseDot.from_dash(Odd())
    for dash in (tiny_dit(), tiny_pixart(), tiny_sd3(), tiny_flux()):
        assert type(dash).__name__ in str(error.value)


@every
@torch.no_grad()
def test_hooks_see_dashs_own_modules(name, make_dot):
    """diffusers' group offloading moves weights only when it is given the module that it knows."""
    seen = set()

    class Noting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.add(module)
            return args, kwargs

    dash, given = BUILDERS[name](), inputs(name)
    dot = make_dot(dash)
    expected = dot(*given, **conditions(name))
    for module in dash.modules():
        add_hook_to_module(module, Noting())
    assert torch.equal(dot.bind(dash)(*given, **conditions(name)), expected)
    ports = find_ports(dash)
    assert seen < set(dash.modules()) and dash.transformer_blocks[0] in seen
    assert (dash.get_submodule(ports.entry) in seen) == (ports.features == "patches")
