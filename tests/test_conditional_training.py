"""Training for guided pipelines evaluates Dash and Dot just as the pipelines do when sampling."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    VQModel,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from pipeline_checks import make_dot
from tiny_pipelines import text_unet, xl_unet
from tiny_text import dit_pipeline, grey_vae, sd3_pipeline, text_pipeline, xl_pipeline
from tiny_transformers import tiny_flux
from torch import nn
from torch.testing import assert_close
from train_runs import dot_arguments, seeded

from morse import enable_morse
from morse.cli import parse_config
from morse.plan import MorsePlan
from morse.spaces import signal_and_noise
from morse.training.cache import _conditions
from morse.training.conditions import ConditionEncoder, ConditionTable, _arrangement
from morse.training.frozen import freeze_pipeline
from morse.training.guidance import Conditions, draw_guidance_scale, guide
from morse.training.latents import LatentCodec
from morse.training.loop import TrainDotConfig, window_loss
from morse.training.pairs import dot_outputs, weighted_loss
from morse.training.schedule import NoiseSchedule
from morse.training.validation import sample_rows
from morse.training.windows import fresh_window, pick_pairs

PROMPTS = ["cat", "dog"]
TRAINING = dot_arguments("--window_steps 3 --pairs_per_window 4 --no-even_guidance", "", "", "")
random_dot = partial(make_dot, block_out_channels=(4,))


def plain_dot(sample, timestep, jump, class_labels=None, **conditions):
    """Depends on all that a Dot is given; for denoisers of any kind."""
    shape = (-1, 1, 1, 1)
    moved = 0.1 * torch.tanh(sample - jump.sample)
    moved = moved * (1 + 0.001 * (jump.timestep - timestep).reshape(shape))
    if class_labels is not None:
        moved = moved + 0.01 * torch.sin(class_labels.reshape(shape).float())
    for value in conditions.values():
        if isinstance(value, torch.Tensor):
            moved = moved + 0.01 * value.float().flatten(1).mean(1).reshape(shape)
    return moved.repeat(1, jump.model_output.shape[1] // moved.shape[1], 1, 1)


def conditions_of(frozen, values, scale):
    table = ConditionTable(frozen.encoder, values)
    return table.look_up(torch.arange(len(values)), None if scale is None else torch.tensor(scale))


class TestSamplingIsTheSame:
    """`sample_rows` runs on what training runs on: Dash's branches, their base, Dot's outputs."""

    def check(self, monkeypatch, pipe, dot, call, values, scale=3.0, base_space=None):
        frozen = freeze_pipeline(pipe, base_space=base_space)
        scales = None if scale == 1 else [scale] * 2
        shape = (2, 4, 4, 4)
        rows = sample_rows(
            frozen.dash, dot, shape, conditions_of(frozen, values, scales), num_dash=4, num_dot=6
        )
        dot.base_space = base_space
        enable_morse(pipe, dot)
        latents, step = [], type(pipe.scheduler).step

        def recorded(scheduler, *args, **kwargs):
            found = step(scheduler, *args, **kwargs)
            latents.append(found[0] if isinstance(found, tuple) else found.prev_sample)
            return found

        monkeypatch.setattr(type(pipe.scheduler), "step", recorded)
        for row, plan in enumerate((MorsePlan.uniform(10, 0), MorsePlan.uniform(4, 6))):
            images = pipe(**call, plan=plan, guidance_scale=scale, generator=seeded()).images
            # Conditions are kept in half precision.
            tolerance = {"rtol": 2e-3, "atol": 2e-3 * rows[row].std().item()}
            assert_close(rows[row], latents[-1][:2], **tolerance)
            assert_close(frozen.to_images(rows[row]), images, rtol=1e-2, atol=5e-3)
        assert pipe.last_run.num_dot == 6 and not pipe.last_run.fallbacks
        # Were Dot's part left out, or the guidance, the tolerances would show it.
        assert (rows[0] - rows[1]).abs().mean() > 0.02 * rows[0].abs().mean()
        other = sample_rows(
            frozen.dash, dot, shape, conditions_of(frozen, values, [1.0] * 2), num_dash=4, num_dot=6
        )
        assert scale == 1 or (other - rows).abs().amax() > 20 * tolerance["atol"]

    @pytest.mark.parametrize(
        ("prediction_type", "base_space", "scale"),
        [("epsilon", None, 3.0), ("v_prediction", "x0", 5.0), ("v_prediction", "raw", 1.0)],
    )
    def test_stable_diffusion(self, monkeypatch, prediction_type, base_space, scale):
        pipe = text_pipeline(prediction_type=prediction_type)
        dot = random_dot(pipe.unet)
        call = {"prompt": PROMPTS, "output_type": "pt"}
        self.check(monkeypatch, pipe, dot, call, PROMPTS, scale, base_space)

    def test_xl(self, monkeypatch):
        pipe = xl_pipeline(xl_unet())
        self.check(
            monkeypatch,
            pipe,
            random_dot(pipe.unet),
            {"prompt": PROMPTS, "output_type": "pt"},
            PROMPTS,
        )

    def test_dit(self, monkeypatch):
        call = {"class_labels": [3, 7], "num_inference_steps": 10, "output_type": "pt"}
        self.check(monkeypatch, dit_pipeline(), plain_dot, call, [3, 7])

    @pytest.mark.parametrize("base_space", [None, "x0"])
    def test_sd3(self, monkeypatch, base_space):
        sigmas = [1 - index / 10 for index in range(10)]
        call = {"prompt": PROMPTS, "output_type": "pt", "sigmas": sigmas}
        self.check(monkeypatch, sd3_pipeline(), plain_dot, call, PROMPTS, base_space=base_space)


class TestGuidance:
    def test_scale_one_is_the_positive_branch(self):
        outputs = torch.randn(3, 2, 4, 2, 2, generator=seeded())
        assert_close(guide(outputs, torch.ones(3)), outputs[:, 1])
        assert_close(guide(outputs, torch.zeros(3)), outputs[:, 0])
        assert_close(guide(outputs, torch.tensor([1.0, 3.0, 0.0]))[1],
                     3 * outputs[1, 1] - 2 * outputs[1, 0])  # fmt: skip
        assert torch.equal(guide(outputs[:, :1], None), outputs[:, 0])

    def test_draws_are_uniform_and_reproducible(self):
        drawn = draw_guidance_scale(10000, (2.0, 10.0), seeded())
        assert drawn.min() >= 2 and drawn.max() <= 10
        quartiles = drawn.quantile(torch.tensor([0.25, 0.5, 0.75]))
        assert_close(quartiles, torch.tensor([4.0, 6.0, 8.0]), rtol=0, atol=0.15)
        assert torch.equal(drawn, draw_guidance_scale(10000, (2.0, 10.0), seeded()))
        assert draw_guidance_scale(5, (1.0, 1.0), seeded()) is None

    def test_rows_of_both_branches(self):
        positive = torch.arange(3.0).reshape(3, 1, 1).half()
        negative = torch.full((1, 1, 1), -1.0).half()
        name = "added_cond_kwargs.text_embeds"
        both = Conditions({name: positive}, {name: negative}, torch.ones(3))
        with torch.autocast("cpu", torch.bfloat16):
            inputs = both.take(torch.tensor([2, 2, 0])).inputs()
        found = inputs["added_cond_kwargs"]["text_embeds"]
        assert found.dtype == torch.float32
        assert found.flatten().tolist() == [-1, 2, -1, 2, -1, 0]
        one = Conditions({name: positive}).inputs()
        assert one["added_cond_kwargs"]["text_embeds"].flatten().tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def frozen():
    return freeze_pipeline(text_pipeline())


def pairs_of(frozen, scale, count=6):
    clean = torch.randn(2, 4, 4, 4, generator=seeded(1))
    conditions = conditions_of(frozen, PROMPTS, scale)
    window = fresh_window(frozen.dash, clean, seeded(2), 4, "plans", conditions)
    return pick_pairs(frozen.dash, window, count, seeded(3), first=False)


def test_pictures_are_the_same_in_parts(frozen):
    dot, conditions = random_dot(frozen.dash.model), conditions_of(frozen, PROMPTS, [3.0, 5.0])
    given = {"conditions": conditions, "num_dash": 2, "num_dot": 3}
    together, parts = (
        sample_rows(frozen.dash, dot, (2, 4, 4, 4), **given, batch_size=size) for size in (None, 1)
    )
    assert together.shape == (3, 2, 4, 4, 4)
    assert_close(parts, together, rtol=1e-4, atol=1e-4)


def test_pairs_move_with_all_that_they_hold(frozen):
    pairs = pairs_of(frozen, [3.0, 5.0])
    moved = pairs.to("meta")
    jump = moved.jump
    held = [moved.sample, moved.timestep, moved.base, moved.reused, moved.gap, moved.target]
    held += [jump.sample, jump.timestep, jump.model_output, moved.guidance_scale]
    held += [*moved.conditions.positive.values(), *moved.conditions.negative.values()]
    assert {value.device.type for value in held} == {"meta"}
    # One copy of what has one here.
    assert moved.base is moved.reused and moved.base is jump.model_output
    assert moved.dash is pairs.dash and pairs.to("cpu").sample is pairs.sample


class TestLoss:
    def test_exact_residuals_have_none(self, frozen):
        """A Dot that evaluates Dash for each branch, whatever the guidance scales are."""

        def exact(sample, timestep, jump, **conditions):
            return frozen.dash.model(sample, timestep, **conditions).sample - jump.model_output

        for scale in (None, [2.0, 9.0]):
            pairs = pairs_of(frozen, scale)
            for even in (True, False):
                found = weighted_loss(pairs.guided(dot_outputs(exact, pairs)), pairs, "none", even)
                reuse = weighted_loss(
                    pairs.guided(pairs.outputs(torch.zeros_like(pairs.base))), pairs, "none", even
                )
                assert found < 1e-4 * reuse  # windows are rounded to half precision

    def test_at_scale_one_it_is_the_positive_branch_alone(self, frozen):
        guided, alone = pairs_of(frozen, [1.0, 1.0]), pairs_of(frozen, None)
        dot = random_dot(frozen.dash.model)
        estimates = [pairs.guided(dot_outputs(dot, pairs)) for pairs in (guided, alone)]
        assert_close(*estimates, rtol=1e-3, atol=1e-4)
        assert_close(guided.target, alone.target, rtol=1e-3, atol=1e-3)
        assert len(guided.sample) == 2 * len(alone.sample)

    def test_a_wrapped_dot_that_estimates_alone(self, frozen):
        class Wrapper(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, sample, *args, **kwargs):
                return torch.ones_like(sample)

        inner, pairs = nn.Identity(), pairs_of(frozen, None)
        inner.independent = True
        assert (dot_outputs(Wrapper(inner), pairs) == 1).all()

    def test_even_guidance(self, frozen):
        """An error of one in each branch, with opposite signs: (1 - w) - w in the guided one."""
        pairs = pairs_of(frozen, [2.0, 10.0])
        wrong = torch.ones_like(pairs.target) * (
            1 - 2 * pairs.conditions.guidance_scale.reshape(-1, 1, 1, 1)
        )
        assert_close(weighted_loss(pairs.target + wrong, pairs, "none"),
                     torch.tensor((3.0**2 + 19.0**2) / 2))  # fmt: skip
        assert_close(weighted_loss(pairs.target + wrong, pairs, "none", even_guidance=True),
                     torch.tensor((3.0**2 / 5 + 19.0**2 / 181) / 2))  # fmt: skip

    def test_settings_of_a_training_reach_it(self, frozen):
        clean, table = torch.randn(2, 4, 4, 4), ConditionTable(frozen.encoder, PROMPTS)
        source = SimpleNamespace(
            pipeline=frozen,
            clean=lambda batch: clean,
            conditions=lambda batch, scale: table.look_up(batch, scale),
        )
        config, firsts = parse_config(TrainDotConfig, TRAINING), []

        def dash_itself(sample, timestep, jump, **conditions):
            firsts.append(jump.timestep.reshape(2, -1))  # of the pairs of each window
            return frozen.dash.model(sample, timestep, **conditions).sample

        def loss(**changed):
            compute = window_loss(source, replace(config, **changed), None)
            return float(compute(dash_itself, torch.arange(2), seeded()))

        plain, alone = loss(), loss(independent=True)
        assert alone < 1e-4 * plain
        assert len({plain, loss(even_guidance=True), loss(loss_weighting="gap")}) == 3
        loss(on_policy=True)
        assert [bool((each == each[:, :1]).all()) for each in firsts[-2:]] == [True, True]
        assert (firsts[0] != firsts[0][:, :1]).any()

    def test_a_learned_variance_is_given_to_dot_and_not_compared(self):
        frozen = freeze_pipeline(dit_pipeline())
        clean = torch.randn(2, 4, 4, 4, generator=seeded(1))
        conditions = conditions_of(frozen, [3, 7], [2.0, 9.0])
        window = fresh_window(frozen.dash, clean, seeded(2), 3, "plans", conditions)
        assert window.outputs.shape == (2, 3, 2, 8, 4, 4)
        pairs = pick_pairs(frozen.dash, window, 4, seeded(3), first=False)
        assert pairs.jump.model_output.shape == (16, 8, 4, 4)
        residual = torch.zeros_like(pairs.base)
        first = weighted_loss(pairs.guided(pairs.outputs(residual)), pairs, "none")
        residual[:, 4:] = 1
        assert weighted_loss(pairs.guided(pairs.outputs(residual)), pairs, "none") == first
        residual[:, :4] = 1
        assert weighted_loss(pairs.guided(pairs.outputs(residual)), pairs, "none") != first


class TestConditions:
    @pytest.mark.parametrize("make", [text_pipeline, lambda: xl_pipeline(xl_unet()), sd3_pipeline])
    def test_captions_are_encoded_by_the_pipeline(self, make):
        pipe = make()
        encoder = freeze_pipeline(pipe).encoder
        more = {"prompt_2": None, "prompt_3": None} if "3" in type(pipe).__name__ else {}
        given = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        expected = [part.half() for part in pipe.encode_prompt(PROMPTS, **given, **more)]
        found = encoder.encode(PROMPTS)
        names = [name for name in found if not name.endswith("time_ids")]
        for name, positive, negative in zip(names, expected[::2], expected[1::2], strict=True):
            assert torch.equal(found[name], positive)
            assert torch.equal(encoder.negative[name], negative[:1])
        if "XL" in type(pipe).__name__:
            ids = found["added_cond_kwargs.time_ids"]
            assert ids.tolist() == [[8, 8, 0, 0, 8, 8]] * 2

    def test_many_captions_are_encoded_as_needed(self, frozen, monkeypatch):
        captions = ["cat", "dog", "emu", "fox"]
        few = ConditionTable(frozen.encoder, captions)
        monkeypatch.setattr("morse.training.conditions.MOST_KEPT", 3)
        many = ConditionTable(frozen.encoder, captions)
        numbers = torch.tensor([3, 1, 3])
        name = "encoder_hidden_states"
        assert_close(few.look_up(numbers).positive[name], many.look_up(numbers).positive[name])
        assert many._all is None and few._all is not None

    def test_a_shards_captions_are_encoded_a_few_at_a_time(self, monkeypatch):
        """More than fit on a GPU; what was encoded is on the CPU before the next."""
        sizes = []

        def encode(values):
            sizes.append(len(values))
            return {"pooled_projections": torch.tensor(values)[:, None]}

        monkeypatch.setattr("morse.training.conditions.MOST_KEPT", 3)
        table = ConditionTable(ConditionEncoder("text", encode, encode([7])), range(100))
        found = _conditions(table, torch.arange(10, 100))
        assert found["conditions/pooled_projections"].flatten().tolist() == list(range(10, 100))
        assert found["negative/pooled_projections"].tolist() == [[7]]
        assert max(sizes) <= 32

    def test_resting_text_encoders_come_back_to_encode(self, monkeypatch):
        pipe, went = text_pipeline(), []
        encoder = freeze_pipeline(pipe).encoder
        expected = encoder.encode(PROMPTS)["encoder_hidden_states"]
        monkeypatch.setattr(pipe.text_encoder, "to", lambda device: went.append(str(device)))
        encoder.rest()
        assert went == ["cpu"]
        assert torch.equal(encoder.encode(PROMPTS)["encoder_hidden_states"], expected)
        assert went == ["cpu", "cpu"]
        config = SimpleNamespace(quantization_config={"quant_method": "bitsandbytes"})
        monkeypatch.setattr(pipe.text_encoder, "is_quantized", True, raising=False)
        monkeypatch.setattr(pipe.text_encoder, "config", config)
        encoder.rest()  # which would refuse
        assert len(went) == 2

    def test_classes(self):
        encoder = freeze_pipeline(dit_pipeline()).encoder
        assert encoder.encode([3, 0])["class_labels"].tolist() == [3, 0]
        assert encoder.negative["class_labels"].tolist() == [1000]


class TestSchedule:
    def test_variance_preserving(self):
        alphas = DDIMScheduler().alphas_cumprod
        schedule = NoiseSchedule.variance_preserving(alphas)
        like, positions = torch.zeros(3, 1, 2, 2), torch.tensor([-1, 0, 999])
        expected = signal_and_noise(alphas, positions, like)
        assert all(map(torch.equal, schedule.rates(positions, like), expected))
        assert torch.equal(schedule.timesteps, torch.arange(1000))

    @pytest.mark.parametrize("options", [{"shift": 3.0}, {"use_dynamic_shifting": True}])
    def test_flow_matching_is_shifted_as_in_sampling(self, options):
        scheduler = FlowMatchEulerDiscreteScheduler(**options)
        schedule = NoiseSchedule.flow_matching(scheduler, 300)
        mu = calculate_shift(300) if "use_dynamic_shifting" in options else None
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
        positions = torch.tensor([999, 749, 499, 249])
        assert_close(schedule.sigmas[positions], scheduler.sigmas[:-1])
        assert_close(schedule.timesteps[positions], scheduler.timesteps)
        assert_close(schedule.alphas + schedule.sigmas, torch.ones(1000))

    def test_windows_of_flow_matching_are_finite_from_pure_noise_on(self):
        frozen = freeze_pipeline(sd3_pipeline())
        for sampling in ("plans", "uniform"):
            clean = torch.randn(64, 4, 4, 4, generator=seeded(1))
            window = fresh_window(frozen.dash, clean, seeded(2), 5, sampling,
                                  ConditionTable(frozen.encoder, ["a"]).look_up(
                                      torch.zeros(64).long(), torch.full((64,), 4.0)))  # fmt: skip
            assert window.samples.isfinite().all() and window.outputs.isfinite().all()
        assert window.timesteps.max() > 990


class TestLatents:
    def test_scale_and_shift_are_those_of_the_pipelines(self):
        vae = grey_vae()
        vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
        images = torch.rand(3, 1, 8, 8, generator=seeded()) * 2 - 1
        mode = vae.encode(images).latent_dist.mode()
        found = LatentCodec(vae).encode(images)
        assert_close(found, (mode - 0.25) * 0.5)
        assert_close(LatentCodec(vae).decode(found), vae.decode(mode).sample)
        vae.register_to_config(latents_mean=[1.0, 2, 3, 4], latents_std=[2.0, 2, 4, 4])
        found = LatentCodec(vae).encode(images)
        assert_close(found[:, 2], (mode[:, 2] - 3) * 0.5 / 4)
        assert_close(LatentCodec(vae).decode(found), vae.decode(mode).sample)

    @pytest.mark.parametrize(("side", "largest"), [(32, 32), (128, 32), (512, 2), (1024, 1)])
    def test_large_images_go_through_a_few_at_a_time(self, side, largest):
        sizes = []

        class Vae:
            config = grey_vae().config

            def encode(self, images):
                sizes.append(len(images))
                return SimpleNamespace(
                    latent_dist=SimpleNamespace(mode=lambda: images[..., ::2, ::2])
                )

            def decode(self, latents, return_dict):
                sizes.append(len(latents))
                return (latents.repeat_interleave(2, 2).repeat_interleave(2, 3),)

        images = torch.zeros(1, 1, 1, 1).expand(33, 1, side, side)
        codec = LatentCodec(Vae())
        latents = codec.encode(images)
        assert codec.decode(latents).shape == images.shape and len(latents) == 33
        assert sum(sizes) == 66 and max(sizes) == largest


def test_a_large_denoiser_gets_fewer_of_large_samples(frozen, monkeypatch):
    sizes = {side: replace(frozen, resolution=side) for side in (256, 512, 768, 1024)}
    assert {each.batch_size(128, 16) for each in sizes.values()} == {128}
    monkeypatch.setattr("morse.training.frozen._LARGE_DASH", 10)
    found = [each.batch_size(128, 16) for each in sizes.values()]
    assert found == [16, 16, 4, 4]  # divisors of a shard's windows


class TestRefusals:
    def test_an_unguided_pipeline(self, make_pipe):
        with pytest.raises(ValueError, match="no negative prompt or class"):
            freeze_pipeline(make_pipe(), guidance_scale=(2.0, 4.0))
        assert freeze_pipeline(make_pipe()).guidance_scale == (1.0, 1.0)

    def test_a_mask_as_input(self):
        with pytest.raises(ValueError, match=r"takes 9 channels.*latents have 4"):
            freeze_pipeline(text_pipeline(text_unet(in_channels=9)))

    def test_another_autoencoder(self, build_unet):
        vqvae = VQModel(block_out_channels=(4,), norm_num_groups=2, num_vq_embeddings=4)
        pipe = LDMPipeline(vqvae, build_unet(in_channels=3), DDIMScheduler())
        with pytest.raises(ValueError, match="LDMPipeline has a VQModel as vqvae, but"):
            freeze_pipeline(pipe)

    @pytest.mark.parametrize(
        "vae",
        [
            VQModel(block_out_channels=(4, 4), norm_num_groups=2, num_vq_embeddings=4,
                    down_block_types=("DownEncoderBlock2D",) * 2,
                    up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4),
            AutoencoderTiny(encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
                            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)),
            AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1,
                             temperal_downsample=[False]),
        ],
        ids=lambda vae: type(vae).__name__,
    )  # fmt: skip
    def test_an_autoencoder_of_another_kind(self, vae):
        pipe = text_pipeline()
        pipe.vae = vae
        with pytest.raises(ValueError, match=f"has a {type(vae).__name__} as vae, but .* Autoenc"):
            freeze_pipeline(pipe)

    def test_packed_latents(self):
        pipe = text_pipeline()
        pipe.unet = tiny_flux()
        with pytest.raises(ValueError, match=r"takes 16 channels.*have 4.*not handle packed"):
            freeze_pipeline(pipe)
        with pytest.raises(ValueError, match="text conditions of FluxTransformer2DModel"):
            _arrangement(pipe, pipe.unet)

    @pytest.mark.parametrize("size", [[4, 6], (4, 6), None])
    def test_no_size_of_squares(self, size):
        pipe = text_pipeline()
        pipe.unet.register_to_config(sample_size=size)
        with pytest.raises(ValueError, match=r"resolution is not given.*such as --resolution 512"):
            freeze_pipeline(pipe)
        assert freeze_pipeline(pipe, 8).sample_size == (4, 4)
        pipe.unet.register_to_config(sample_size=[4, 4])
        assert freeze_pipeline(pipe).resolution == 8

    def test_a_size_that_is_not_patches(self):
        with pytest.raises(ValueError, match=r"resolution is 10; .*multiple of 4.*--resolution 8"):
            freeze_pipeline(dit_pipeline(), 10)
        with pytest.raises(ValueError, match=r"resolution is 0; .*multiple of 2.*--resolution 2"):
            freeze_pipeline(text_pipeline(), 0)

    def test_guidance_as_input(self):
        with pytest.raises(ValueError, match="takes the guidance scale as an input"):
            freeze_pipeline(text_pipeline(text_unet(time_cond_proj_dim=8)))

    @pytest.mark.parametrize("kind", ["timestep", "identity"])
    def test_classes_that_are_no_numbers_are_refused(self, kind, build_unet, make_pipe):
        unet = build_unet(class_embed_type=kind)
        with pytest.raises(ValueError, match=f"has class_embed_type '{kind}', but train_dot"):
            freeze_pipeline(make_pipe(unet=unet))

    def test_no_text_encoder(self):
        pipe = text_pipeline()
        pipe.text_encoder = None
        with pytest.raises(ValueError, match="saved without its text_encoder"):
            freeze_pipeline(pipe)

    def test_another_noise_schedule(self):
        from diffusers import EDMEulerScheduler

        pipe = text_pipeline()
        pipe.scheduler = EDMEulerScheduler()
        with pytest.raises(ValueError, match="EDMEulerScheduler, whose noise schedule"):
            freeze_pipeline(pipe)
