"""A Dot of guided estimates is evaluated once a step, on the rows of the prompt alone."""

import dataclasses

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from idx_files import write_parts
from pipeline_checks import check, counted, latents, make_dot
from test_controlnets import controlnet
from test_guidance import SeparateGuidance
from tiny_pipelines import picture, stable_diffusion, text_inputs, text_unet, xl_unet
from tiny_text import dit_pipeline, text_pipeline
from torch.testing import assert_close
from train_runs import dot_arguments, seeded, weights

from morse import MorseDot, MorsePipeline, enable_morse, morse_sample
from morse.cli import parse_config
from morse.denoisers import Call
from morse.dot.guidance import GuidanceEmbedding
from morse.one_pass import needs_dash, view_call
from morse.plan import MorsePlan
from morse.sampling import JumpPoint
from morse.spaces import ddim_step, signal_and_noise
from morse.training.conditions import ConditionTable
from morse.training.frozen import freeze_pipeline
from morse.training.graphs import _OnPairs, _tensors
from morse.training.guidance import guide
from morse.training.loop import TrainDotConfig, build_dot, train_dot
from morse.training.pairs import dot_outputs, weighted_loss
from morse.training.sequences import sequence_pairs, sequence_residuals
from morse.training.validation import residual_ratios, sample_rows
from morse.training.windows import draw_timesteps, fresh_window, make_window, pick_pairs

SCALE = 5.0
PROMPTS = ["cat", "dog"]
MASK = picture(channels=1).round()
OPTIONS = """--train_batch_size 3 --max_train_steps 3 --lr_warmup_steps 1 --learning_rate 1e-2
    --validation_steps 0 --validation_images 4 --num_down_blocks 1 --block_out_channels 4
    --lora_rank 2 --window_steps 3 --timestep_sampling plans --pairs_per_window 2
    --class_names cat dog"""


@pytest.fixture(scope="module")
def unet():
    return text_unet()


@pytest.fixture
def pipe(unet):
    return stable_diffusion(diffusers.StableDiffusionPipeline, unet)


class ExactDot:
    """Gives the residual of the guided estimate, from Dash itself, and notes what it is given."""

    guidance = "guided"

    def __init__(self, unet, negative=None):
        self.unet, self.negative, self.calls = unet, negative, []

    def __call__(self, sample, timestep, jump, encoder_hidden_states, **conditions):
        self.calls.append((sample, jump, encoder_hidden_states, conditions))
        both = torch.cat([self.negative.expand_as(encoder_hidden_states), encoder_hidden_states])
        plain = self.unet._call_impl
        if conditions:
            both_added = {
                name: torch.cat([self.added[name].expand_as(value), value])
                for name, value in conditions["added_cond_kwargs"].items()
            }
            conditions = {"added_cond_kwargs": both_added}
        outputs = plain(sample.repeat(2, 1, 1, 1), timestep, both, **conditions).sample
        without, with_text = outputs.chunk(2)
        return without + jump.guidance_scale * (with_text - without) - jump.model_output


def exact_dot(pipe, inputs):
    return ExactDot(pipe.unet, inputs["negative_prompt_embeds"])


class TestExactness:
    @pytest.mark.parametrize("scale", [SCALE, 1.5])
    def test_exact_residuals_give_what_dash_gives(self, pipe, scale):
        inputs = text_inputs()
        expected = latents(pipe, num_inference_steps=7, guidance_scale=scale, **inputs)
        dot = exact_dot(pipe, inputs)
        enable_morse(pipe, dot)
        found = latents(pipe, plan="DooDDoo", guidance_scale=scale, **inputs)
        assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert counted(pipe) == (3, 4) and pipe.last_run.fallbacks == {}
        for sample, jump, text, _ in dot.calls:
            assert len(sample) == len(jump.sample) == len(jump.model_output) == 2
            assert torch.equal(text, inputs["prompt_embeds"])
            assert jump.guidance_scale.item() == scale

    def test_with_xl(self):
        inputs = text_inputs(pooled=True)
        pipe = stable_diffusion(diffusers.StableDiffusionXLPipeline, xl_unet(), xl=True)
        expected = latents(pipe, num_inference_steps=6, guidance_scale=SCALE, **inputs)
        dot = exact_dot(pipe, inputs)
        size = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
        dot.added = {"text_embeds": inputs["negative_pooled_prompt_embeds"], "time_ids": size}
        enable_morse(pipe, dot)
        found = latents(pipe, plan="DooDoo", guidance_scale=SCALE, **inputs)
        assert_close(found, expected, rtol=1e-4, atol=1e-4)
        conditions = dot.calls[0][3]["added_cond_kwargs"]
        assert torch.equal(conditions["text_embeds"], inputs["pooled_prompt_embeds"])
        assert torch.equal(conditions["time_ids"], size.expand(2, -1))

    def test_several_images_a_prompt(self, pipe):
        inputs = text_inputs()
        options = {"num_images_per_prompt": 2, "guidance_scale": SCALE, **inputs}
        expected = latents(pipe, num_inference_steps=4, **options)
        repeated = inputs["negative_prompt_embeds"].repeat_interleave(2, 0)
        enable_morse(pipe, ExactDot(pipe.unet, repeated))
        assert_close(latents(pipe, plan="DoDo", **options), expected, rtol=1e-4, atol=1e-4)


class ReusingDot:
    """Adds nothing; counts its rows."""

    def __init__(self, guidance):
        self.guidance, self.rows = guidance, []

    def __call__(self, sample, timestep, jump, **conditions):
        self.rows.append(len(sample))
        return torch.zeros_like(jump.model_output)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("StableDiffusionPipeline", {}),
        ("StableDiffusionImg2ImgPipeline", {"image": picture()}),
        ("StableDiffusionInpaintPipeline", {"image": picture(), "mask_image": MASK}),
        ("StableDiffusionControlNetPipeline", {"image": picture()}),
        ("StableDiffusionXLPipeline", {}),
        ("StableDiffusionXLImg2ImgPipeline", {"image": picture()}),
        ("StableDiffusionXLInpaintPipeline", {"image": picture(), "mask_image": MASK}),
    ],
)
def test_reuse_of_the_guided_estimate_is_reuse_of_both_branches(name, more):
    """In every pipeline where one pass is made."""
    xl = "XL" in name
    unet = xl_unet() if xl else text_unet()
    parts = {"controlnet": controlnet(unet)} if "ControlNet" in name else {}
    pipe = stable_diffusion(getattr(diffusers, name), unet, xl=xl, **parts)
    options = {"plan": "DoDoo", "guidance_scale": SCALE, **text_inputs(pooled=xl), **more}
    found = []
    for guidance, rows in (("branches", 4), ("guided", 2)):
        dot = ReusingDot(guidance)
        enable_morse(pipe, dot)
        found.append(latents(pipe, **options))
        assert dot.rows == [rows] * 3 and pipe.last_run.fallbacks == {}
    assert_close(*found, rtol=1e-3, atol=1e-4)


def guided_pieces(pipe, inputs, scale):
    """Dash's guided estimate, and solver steps of DDIM on the pipeline's grid."""
    both = torch.cat([inputs["negative_prompt_embeds"], inputs["prompt_embeds"]])

    def dash(sample, timestep):
        outputs = pipe.unet._call_impl(sample.repeat(2, 1, 1, 1), timestep, both).sample
        without, with_text = outputs.chunk(2)
        return without + scale * (with_text - without)

    def step(output, sample, timestep, prev):
        alphas = pipe.scheduler.alphas_cumprod
        start = signal_and_noise(alphas, torch.tensor(timestep), sample)
        end = signal_and_noise(alphas, torch.tensor(prev), sample)
        if prev < 0:
            end = signal_and_noise(
                torch.atleast_1d(pipe.scheduler.final_alpha_cumprod), torch.tensor(0), sample
            )
        return ddim_step(output, sample, start, end)

    return dash, step


@pytest.mark.supports("interplay", "one Dot pass under guidance")
class TestWeightShared:
    @pytest.mark.parametrize("options", [{}, {"base_space": "x0"}, {"history": 1}])
    def test_attached(self, pipe, unet, options):
        dot = make_dot(unet, guidance="guided", **options)
        check(pipe, dot, 6, 6, **text_inputs(), guidance_scale=SCALE)
        check(pipe, dot, 6, 6, **text_inputs(), guidance_scale=1.0)

    def test_pipeline_and_reference_loop_agree(self, pipe, unet):
        inputs, steps = text_inputs(), 10  # of which the grid's neighbours are the scheduler's
        dot = make_dot(unet, guidance="guided")
        enable_morse(pipe, dot, merge_lora=False)
        plan = MorsePlan.uniform(4, 6)
        expected = latents(pipe, plan=plan, guidance_scale=SCALE, **inputs)
        dash, step = guided_pieces(pipe, inputs, SCALE)

        def told(sample, timestep, jump):
            jump = dataclasses.replace(jump, guidance_scale=torch.tensor(SCALE))
            return dot(sample, timestep, jump, encoder_hidden_states=inputs["prompt_embeds"])

        pipe.scheduler.set_timesteps(steps)
        noise = torch.randn(expected.shape, generator=seeded())
        found = morse_sample(dash, told, step, noise, pipe.scheduler.timesteps.tolist(), plan)
        assert_close(found, expected, rtol=1e-3, atol=1e-3)

    def test_dot_has_half_of_the_rows(self, pipe, unet):
        enable_morse(pipe, make_dot(unet, guidance="guided"))
        rows = []
        pipe.dot.register_forward_hook(lambda dot, given, output: rows.append(len(output)))
        pipe.speed_ratio = 8.0
        for scale in (SCALE, 1.0):
            latents(pipe, plan="DooDo", guidance_scale=scale, **text_inputs())
            assert pipe.last_run.lsd == 2 + 3 / 8
        enable_morse(pipe, make_dot(unet))
        pipe.dot.register_forward_hook(lambda dot, given, output: rows.append(len(output)))
        latents(pipe, plan="Do", guidance_scale=SCALE, **text_inputs())
        assert rows == [2] * 6 + [4]

    def test_measured_it_is_faster(self, pipe, unet):
        """Dot's time, which N is measured with, is that of half of the rows."""
        enable_morse(pipe, make_dot(unet, guidance="guided"))
        rows = []
        pipe.dot.register_forward_hook(lambda dot, given, output: rows.append(len(output)))
        found = pipe.measure_speed_ratio(**text_inputs(), repeats=2, output_type="latent")
        assert found.speed_ratio == pipe.speed_ratio > 0 and set(rows) == {2}

    def test_the_jump_keeps_the_guided_estimate_alone(self, pipe, unet):
        dot, seen = make_dot(unet, guidance="guided", history=1), []
        dot.register_forward_pre_hook(lambda dot, given: seen.append(given[2]))
        enable_morse(pipe, dot)
        inputs = text_inputs()
        latents(pipe, plan="DoDo", guidance_scale=SCALE, **inputs)
        dash, _ = guided_pieces(pipe, inputs, SCALE)
        last = seen[-1]
        for point in (last, last.earlier):
            assert point.sample.shape == point.model_output.shape == (2, 4, 16, 16)
            assert_close(point.model_output, dash(point.sample, point.timestep),
                         rtol=1e-4, atol=1e-4)  # fmt: skip
        assert last.trend.shape == (2, 4, 16, 16) and last.trend.abs().max() > 0

    def test_the_scale_is_an_input(self, unet):
        dot = make_dot(unet, guidance="guided")
        jump = JumpPoint(*(torch.randn(2, 4, 16, 16, generator=seeded(1)), torch.tensor(700)),
                         torch.randn(2, 4, 16, 16, generator=seeded(2)))  # fmt: skip
        text = text_inputs()["prompt_embeds"]

        def residual(scale):
            told = dataclasses.replace(jump, guidance_scale=scale)
            return dot(jump.sample, torch.tensor(500), told, encoder_hidden_states=text)

        with torch.no_grad():
            three, seven = (residual(torch.tensor(scale)) for scale in (3.0, 7.0))
            assert (three - seven).abs().max() > 1e-4
            each = residual(torch.tensor([3.0, 7.0]))
            assert_close(each, torch.stack([three[0], seven[1]]), rtol=1e-4, atol=1e-5)
            assert torch.equal(residual(None), residual(torch.tensor(1.0)))

    def test_saved_and_loaded(self, pipe, unet, tmp_path):
        dot = make_dot(unet, guidance="guided")
        enable_morse(pipe, dot)
        expected = latents(pipe, plan="DooDo", **text_inputs())
        dot.save_pretrained(tmp_path)
        loaded = MorseDot.from_pretrained(tmp_path)
        assert loaded.config.guidance == loaded.guidance == "guided"
        enable_morse(pipe, loaded)
        assert torch.equal(latents(pipe, plan="DooDo", **text_inputs()), expected)
        assert "`guidance`) | guided |" in loaded.model_card()


UNKNOWN = "it is not known how the pipeline combines guidance's branches"


class TestFallbacks:
    """Dash runs, with the reason counted."""

    def check(self, pipe, dot, reason, calls=4, **call):
        expected = latents(pipe, num_inference_steps=4, **call)
        enable_morse(pipe, dot)
        with pytest.warns(UserWarning, match="planned 2 Dot evaluations and made none"):
            found = latents(pipe, plan="DoDo", **call)
        assert torch.equal(found, expected) and counted(pipe) == (calls, 0)
        assert pipe.last_run.fallbacks == {reason: calls // 2}

    @pytest.fixture
    def dot(self, unet):
        return make_dot(unet, guidance="guided")

    def test_guidance_rescale(self, pipe, dot):
        reason = "guidance_rescale changes the guided estimate"
        self.check(pipe, dot, reason, **text_inputs(), guidance_rescale=0.7)

    def test_perturbed_attention(self, unet, dot):
        pipeline = diffusers.StableDiffusionPAGPipeline
        pipe = stable_diffusion(pipeline, unet, pag_applied_layers=["mid"])
        self.check(pipe, dot, UNKNOWN, **text_inputs())

    def test_separate_calls(self, unet, dot):
        pipe = SeparateGuidance(unet, diffusers.DDIMScheduler(clip_sample=False))
        self.check(pipe, dot, UNKNOWN, calls=8, **text_inputs())

    def test_a_loop_of_ones_own(self, pipe, dot):
        class Own(diffusers.StableDiffusionPipeline):
            def __call__(self, *args, **kwargs):
                return super().__call__(*args, **kwargs)

        pipe.__class__ = Own
        self.check(pipe, dot, UNKNOWN, **text_inputs())

    def test_embedded_guidance(self):
        unet = text_unet(time_cond_proj_dim=8)
        pipe = stable_diffusion(diffusers.StableDiffusionPipeline, unet)
        dot = make_dot(unet, guidance="guided")
        reason = "the denoiser takes the guidance scale as an input"
        self.check(pipe, dot, reason, **text_inputs())

    def test_no_dot_evaluation_to_measure(self, unet, dot):
        pipeline = diffusers.StableDiffusionPAGPipeline
        pipe = stable_diffusion(pipeline, unet, pag_applied_layers=["mid"])
        enable_morse(pipe, dot)
        with (
            pytest.raises(ValueError, match=UNKNOWN),
            pytest.warns(UserWarning, match="made none"),
        ):
            pipe.measure_speed_ratio(**text_inputs(), output_type="latent")

    @pytest.mark.parametrize(
        ("scale", "reason"),
        [(3.0, "the guidance scale changed"), (1.0, "the sample changed its shape")],
    )
    def test_a_scale_that_changes_midway(self, pipe, dot, scale, reason):
        enable_morse(pipe, dot)

        def change(pipe, step, timestep, tensors):
            if step == 1:
                pipe._guidance_scale = scale
                if scale == 1:
                    tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
            return tensors

        more = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        latents(pipe, plan="DoooDo", **text_inputs(), callback_on_step_end=change, **more)
        # That step's Dash serves the Dot after it.
        assert pipe.last_run.fallbacks == {reason: 1} and counted(pipe) == (3, 3)

    @pytest.mark.parametrize(
        ("conditions", "reason"),
        [
            ({"text": torch.ones(4, 2), "added": {"ids": [torch.ones(4)]}, "mode": "a"}, None),
            ({"text": torch.ones(3, 2)}, "text has no rows for guidance's branches"),
            ({"added": {"n": torch.ones(())}}, "added.n has no rows for guidance's branches"),
            ({"cross_attention_kwargs": {"scale": 0.5}}, None),
            (
                {"cross_attention_kwargs": {"mask": torch.ones(4)}},
                "cross_attention_kwargs.mask has no rows for guidance's branches",
            ),
        ],
    )
    def test_conditions(self, conditions, reason):
        call = Call(torch.arange(4.0), torch.arange(4), conditions)
        view = view_call(ExactDot(None), call, lambda: SCALE)
        assert view.problem == reason
        if reason is None:
            assert view.call.sample.tolist() == view.call.timestep.tolist() == [2, 3]
            assert all(len(value) == 2 for value in view.call.conditions.values()
                       if isinstance(value, torch.Tensor))  # fmt: skip
        alone = view_call(ExactDot(None), call, lambda: 1.0)
        assert alone.call is call and alone.scale == 1 and alone.problem is None

    def test_an_odd_number_of_rows(self):
        view = view_call(ExactDot(None), Call(torch.ones(3), 5, {}), lambda: SCALE)
        assert view.problem == "the rows of guidance's branches can't be told apart"


class TestWhereTheScaleIs:
    """On the sample's device, once for all Dot calls; "meta" stands for an accelerator."""

    def kept(self, scale):
        call = Call(torch.empty(4, 1, device="meta"), torch.tensor(5), {})
        view = view_call(ExactDot(None), call, lambda: scale)
        return view, view.keep((torch.empty(4, 1, device="meta"),), call.timestep, None, None)

    def test_there_and_compared_without_a_look_at_it(self):
        view, kept = self.kept(SCALE)
        assert kept.jump.guidance_scale.device.type == "meta"
        assert kept.jump.guidance_scale.dtype == torch.float32
        assert view.why_not(kept) is None and view.scale == SCALE
        other, _ = self.kept(SCALE + 0.1)
        assert other.why_not(kept) == "the guidance scale changed"

    def test_without_one_it_is_not_copied_there(self):
        embedding = GuidanceEmbedding(4).to("meta")
        assert embedding(None, torch.ones(2, 4, device="meta")).device.type == "meta"

    def test_a_controlnet_is_told_too(self):
        for latest, expected in ((None, True), (SCALE, False), (1.0, True)):
            assert needs_dash(ExactDot(None), lambda: SCALE, latest) == expected


class TestSettings:
    def test_unknown(self, unet):
        with pytest.raises(ValueError, match=r"guidance must be one of .*, got 'both'"):
            MorseDot.from_dash(unet, 1, guidance="both")
        with pytest.raises(ValueError, match=r"guided.* and independent is True"):
            MorseDot.from_dash(unet, 1, guidance="guided", independent=True)

    def test_the_embedding_starts_at_zero_and_tells_scales_apart(self):
        embedding = GuidanceEmbedding(7)
        scales = torch.tensor([1.0, 2.0, 7.5, 15.0])
        assert not embedding(scales, torch.ones(4, 7)).any()
        torch.nn.init.eye_(embedding.projection.weight)
        found = embedding(scales, torch.ones(4, 7))
        assert torch.pdist(found).min() > 0.3
        assert embedding(None, torch.ones(4, 7)).equal(found[:1].expand(4, -1))
        assert embedding(scales[1], torch.ones(4, 7).double().float())[3].equal(found[1])


@pytest.fixture(scope="module")
def frozen():
    return one_pass(freeze_pipeline(text_pipeline()))


def one_pass(frozen, **options):
    dash = dataclasses.replace(frozen.dash, guidance="guided", **options)
    return dataclasses.replace(frozen, dash=dash)


def conditions_of(frozen, scale):
    table = ConditionTable(frozen.encoder, PROMPTS)
    return table.look_up(torch.arange(2), torch.tensor(scale))


def pairs_of(frozen, scale, points=4):
    clean = torch.randn(2, 4, 4, 4, generator=seeded(1))
    conditions = conditions_of(frozen, scale)
    window = fresh_window(frozen.dash, clean, seeded(2), points, "plans", conditions)
    return pick_pairs(frozen.dash, window, 6, seeded(3), first=False)


class TestPairs:
    def test_one_row_each_with_the_guided_estimate(self, frozen):
        scale = [2.0, 9.0]
        pairs = pairs_of(frozen, scale)
        assert len(pairs.sample) == len(pairs.base) == len(pairs.jump.model_output) == 12
        assert pairs.conditions.branches == 1
        assert torch.equal(pairs.guidance_scale, torch.tensor(scale).repeat_interleave(6))
        each = pairs_of(branches(frozen), scale)
        assert torch.equal(pairs.target, each.target)
        outputs = each.jump.model_output.unflatten(0, (-1, 2))
        assert torch.equal(pairs.jump.model_output, guide(outputs, pairs.guidance_scale))
        text = pairs.conditions.inputs()["encoder_hidden_states"]
        assert torch.equal(text, each.conditions.inputs()["encoder_hidden_states"][1::2])

    @pytest.mark.parametrize("even", [True, False])
    @pytest.mark.parametrize("history", [0, 1])
    def test_reuse_and_exact_residuals(self, frozen, even, history):
        """Reuse is off by as much as with both branches; the exact residual by nothing."""
        frozen = one_pass(frozen, history=history)
        pairs, each = (pairs_of(one, [2.0, 9.0], 5) for one in (frozen, branches(frozen)))
        losses = [
            weighted_loss(p.guided(p.outputs(torch.zeros_like(p.base))), p, "gap", even)
            for p in (pairs, each)
        ]
        assert_close(*losses, rtol=1e-4, atol=1e-6)
        residual = (pairs.target - pairs.base).detach()
        found = pairs.guided(pairs.outputs(residual))
        assert weighted_loss(found, pairs, "gap", even) < 1e-6 * losses[0]
        if history:
            assert pairs.jump.trend.shape == pairs.base.shape

    def test_graphs_get_the_scale(self, frozen):
        pairs = pairs_of(frozen, [2.0, 9.0])
        dot = make_dot(frozen.dash.model, guidance="guided")
        residual = _OnPairs(dot, tuple(pairs.conditions.flat_inputs()))(*_tensors(pairs))
        assert_close(pairs.outputs(residual), dot_outputs(dot, pairs))

    def test_sequences_get_the_scale(self, frozen):
        clean = torch.randn(2, 4, 4, 4, generator=seeded(1))
        conditions = conditions_of(frozen, [2.0, 9.0])
        window = fresh_window(frozen.dash, clean, seeded(2), 4, "plans", conditions)
        pairs = sequence_pairs(frozen.dash, window)
        dot = make_dot(frozen.dash.model, guidance="guided")
        residuals = sequence_residuals(dot, pairs, 3)
        assert_close(pairs.outputs(residuals), dot_outputs(dot, pairs), rtol=1e-4, atol=1e-5)

    def test_validation(self, frozen):
        def exact(sample, timestep, jump, **conditions):
            return exact.target - jump.model_output

        pairs = pairs_of(frozen, [2.0, 9.0])
        exact.target = pairs.target
        assert residual_ratios(exact, [pairs], 1000)["residual_ratio"] < 1e-6
        dot = MorseDot.from_dash(frozen.dash.model, 1, guidance="guided", lora_rank=2)
        assert residual_ratios(dot, [pairs], 1000)["residual_ratio"] == 1.0

    def test_windows_made_with_dot(self, frozen):
        dot = make_dot(frozen.dash.model, guidance="guided")
        conditions = conditions_of(frozen, [2.0, 9.0])
        clean, noise = (torch.randn(2, 4, 4, 4, generator=seeded(n)) for n in (1, 2))
        timesteps = draw_timesteps(2, 4, "plans", 1000, seeded(3))
        options = (clean, noise, timesteps, torch.tensor([True, False]), conditions)
        window = make_window(frozen.dash, *options, dot)
        assert window.outputs.shape == (2, 4, 2, 4, 4, 4)  # Dash's, of both branches
        plain = make_window(frozen.dash, *options)
        assert torch.equal(window.samples[:, :2], plain.samples[:, :2])
        assert not torch.equal(window.samples[:, 2], plain.samples[:, 2])

    def test_sampling_in_training_is_that_of_the_pipeline(self):
        pipe = text_pipeline()
        frozen = one_pass(freeze_pipeline(pipe))
        dot = make_dot(pipe.unet, guidance="guided")
        conditions = conditions_of(frozen, [SCALE, SCALE])
        rows = sample_rows(frozen.dash, dot, (2, 4, 4, 4), conditions, num_dash=4, num_dot=6)
        enable_morse(pipe, dot)
        for row, plan in enumerate((MorsePlan.uniform(10, 0), MorsePlan.uniform(4, 6))):
            images = pipe(PROMPTS, plan=plan, guidance_scale=SCALE, generator=seeded(),
                          output_type="pt").images  # fmt: skip
            assert_close(frozen.to_images(rows[row]), images, rtol=1e-2, atol=5e-3)
        assert pipe.last_run.num_dot == 6 and not pipe.last_run.fallbacks


def branches(frozen):
    return dataclasses.replace(frozen, dash=dataclasses.replace(frozen.dash, guidance="branches"))


class TestTraining:
    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory):
        data, base = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("base")
        write_parts(data, num_classes=2)
        text_pipeline().save_pretrained(base)
        return data, base

    @pytest.fixture
    def config(self, folders, tmp_path):
        def make(*options):
            data, base = folders
            AcceleratorState._reset_state(reset_partial_state=True)
            return parse_config(
                TrainDotConfig, dot_arguments(OPTIONS, base, data, tmp_path / "run", *options)
            )

        return make

    @pytest.mark.parametrize("options", [("--on_policy",), ("--history", "1", "--distill", "norm")])
    def test_the_result_works_in_the_pipeline(self, config, folders, options):
        folder = train_dot(config("--guidance", "guided", *options))
        found = weights(folder)
        assert found["guidance_embedding.projection.weight"].abs().max() > 0
        pipe = MorsePipeline.from_pretrained(folders[1], dot=folder)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(PROMPTS, plan="DooDo", output_type="latent", generator=seeded()).images
        assert images.isfinite().all() and counted(pipe) == (2, 3)
        assert pipe.dot.guidance == "guided"

    def test_from_a_dot_of_branches(self, config, tmp_path):
        dash = text_pipeline().unet
        given = make_dot(dash, block_out_channels=(4,))
        given.save_pretrained(tmp_path / "given")
        options = ("--init_from", str(tmp_path / "given"))
        dot = build_dot(dash, config("--guidance", "guided", *options))
        state = dot.state_dict()
        assert all(torch.equal(state[name], value) for name, value in given.state_dict().items())
        assert not state["guidance_embedding.projection.weight"].any()
        assert not state["guidance_embedding.projection.bias"].any()
        # And on from there; but not back.
        dot.save_pretrained(tmp_path / "guided")
        options = ("--init_from", str(tmp_path / "guided"))
        build_dot(dash, config("--guidance", "guided", *options))
        with pytest.raises(ValueError, match="init_from is a Dot of guided estimates"):
            build_dot(dash, config(*options))

    def test_refusals(self, config, folders, monkeypatch):
        with pytest.raises(ValueError, match=r"guidance_scale is \(1.0, 1.0\), which is none"):
            train_dot(config("--guidance", "guided", "--guidance_scale", "1", "1"))
        monkeypatch.setattr(MorsePipeline, "from_pretrained", lambda *_, **__: dit_pipeline())
        with pytest.raises(ValueError, match="not known how DiTPipeline combines"):
            load = train_dot.__globals__["load_frozen_pipeline"]
            load(config("--guidance", "guided"), torch.device("cpu"))
