"""Video pipelines: a denoiser of 5-D samples, separate guidance, two experts that take turns."""

import diffusers
import pytest
import torch
from pipeline_checks import check, counted, latents, own_dot
from tiny_pipelines import TEXT_CHANNELS, text_inputs, text_unet, tiny_vae

from morse import MorseDot, disable_morse, enable_morse


def tiny_wan(seed=0):
    torch.manual_seed(seed)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_CHANNELS,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
    ).eval()


def wan(experts=1, **options):
    transformers = {"transformer": tiny_wan(0)}
    if experts == 2:
        transformers |= {"transformer_2": tiny_wan(1), "boundary_ratio": 0.5}
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **transformers,
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_inputs(**options):
    return {**text_inputs(), "height": 32, "width": 32, "num_frames": 5, **options}


class CheckingDot:
    """A Dot that insists on Dash's latest estimate for the very same expert and text."""

    def __init__(self, pipe):
        self.pipe, self.calls = pipe, []

    def __call__(self, sample, timestep, jump, encoder_hidden_states, **conditions):
        pipe, boundary = self.pipe, 1000 * (self.pipe.config.boundary_ratio or 0)
        name = "transformer" if timestep[0] >= boundary else "transformer_2"
        plain = getattr(pipe, name)._call_impl
        dash = plain(jump.sample, jump.timestep, encoder_hidden_states, return_dict=False)[0]
        assert torch.equal(jump.model_output, dash)
        self.calls.append(name)
        return own_dot(sample, timestep, jump)


@pytest.mark.supports("pipeline, own Dot", "WanPipeline (2.1)")
class TestOneExpert:
    @pytest.mark.parametrize(("scale", "branches"), [(5.0, 2), (1.0, 1)])
    @pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscrete", "UniPCMultistep"])
    def test_attached(self, scheduler, scale, branches):
        pipe = wan()
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        options = flow if scheduler == "UniPCMultistep" else {}
        pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler")(**options)
        inputs = wan_inputs(guidance_scale=scale)
        check(pipe, own_dot, 6, 6, **inputs, branches=branches)

    def test_timesteps_for_each_patch(self):
        check(wan(expand_timesteps=True), own_dot, 4, 4, **wan_inputs(), branches=2)

    def test_with_and_without_text_are_never_mixed_up(self):
        pipe = wan()
        dot = CheckingDot(pipe)
        latents(enable_morse(pipe, dot), plan="DooDo", **wan_inputs())
        assert len(dot.calls) == 6 and pipe.last_run.fallbacks == {}

    def test_a_step_costs_one_lsd_however_many_calls_it_makes(self):
        pipe = enable_morse(wan(), own_dot)
        pipe.speed_ratio = 4.0
        latents(pipe, lsd=5, **wan_inputs())
        run = pipe.last_run
        assert run.num_dot > 0 and run.lsd == run.plan.cost(4.0) == 5
        assert (run.num_dash, run.num_dot) == (2 * run.plan.num_dash, 2 * run.plan.num_dot)

    def test_guidance_that_ends_midway_changes_no_branch(self):
        """Text alone goes on, for which Dash's latest estimate stays the same."""
        pipe = wan()
        dot = CheckingDot(pipe)

        def stop(pipe, step, timestep, tensors):
            if step == 2:
                pipe._guidance_scale = 1.0
            return tensors

        latents(enable_morse(pipe, dot), plan="Dooooo", **wan_inputs(), callback_on_step_end=stop)
        assert (pipe.last_run.num_dash, len(dot.calls)) == (2, 2 * 2 + 3)
        assert pipe.last_run.fallbacks == {}

    def test_a_text_that_changes_midway_is_evaluated_by_dash_first(self):
        pipe = wan()
        dot = CheckingDot(pipe)

        def change(pipe, step, timestep, tensors):
            return {"prompt_embeds": 1 - tensors["prompt_embeds"]} if step == 2 else {}

        changes = {
            "callback_on_step_end": change,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        }
        latents(enable_morse(pipe, dot), plan="Dooooo", **wan_inputs(), **changes)
        reason = "no earlier Dash evaluation with these conditions"
        assert pipe.last_run.fallbacks == {reason: 1}
        assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (3, 9)


@pytest.mark.supports("pipeline, own Dot", "WanPipeline (2.2)")
class TestTwoExperts:
    """Of six steps, from timestep 1000 to 1, the first three are the first expert's."""

    def test_attached(self):
        pipe = wan(experts=2)
        inputs = wan_inputs()
        expected = latents(pipe, num_inference_steps=6, **inputs)
        enable_morse(pipe, own_dot)
        assert torch.equal(latents(pipe, plan="D" * 6, **inputs), expected)
        found = latents(pipe, plan="DooDoo", **inputs)
        assert counted(pipe, branches=2) == (2, 4) and pipe.last_run.fallbacks == {}
        assert found.isfinite().all() and not torch.equal(found, expected)
        assert torch.equal(latents(pipe, plan="DooDoo", **inputs), found)

    def test_the_second_one_starts_with_dash_whatever_the_plan(self):
        pipe = wan(experts=2)
        dot = CheckingDot(pipe)
        latents(enable_morse(pipe, dot), plan="DDoooo", **wan_inputs())
        assert pipe.last_run.fallbacks == {"transformer_2: no earlier Dash evaluation": 2}
        assert dot.calls == ["transformer"] * 2 + ["transformer_2"] * 4
        assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (6, 6)
        assert "transformer_2: no earlier Dash evaluation (2x)" in pipe.morse_summary()

    def test_the_second_one_alone(self):
        pipe = wan(experts=2)
        pipe.transformer = None
        pipe.register_to_config(boundary_ratio=2.0)
        check(pipe, own_dot, 4, 4, **wan_inputs(), branches=2)

    def test_disabling_frees_both(self):
        pipe = wan(experts=2)
        expected = latents(pipe, num_inference_steps=4, **wan_inputs())
        enable_morse(pipe, own_dot)
        latents(pipe, plan="DoDo", **wan_inputs())
        disable_morse(pipe)
        for expert in (pipe.transformer, pipe.transformer_2):
            assert vars(expert)["_compiled_call_impl"] is None
        assert torch.equal(latents(pipe, num_inference_steps=4, **wan_inputs()), expected)


@pytest.mark.supports("pipeline, own Dot", "AnimateDiffPipeline")
class TestAnimateDiff:
    @pytest.fixture(scope="class")
    def motion_unet(self):
        torch.manual_seed(0)
        adapter = diffusers.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=4,
            motion_max_seq_length=4,
        )
        return diffusers.UNetMotionModel.from_unet2d(text_unet(), adapter).eval()

    @pytest.fixture
    def pipe(self, motion_unet):
        pipe = diffusers.AnimateDiffPipeline(
            vae=tiny_vae(),
            text_encoder=None,
            tokenizer=None,
            unet=motion_unet,
            motion_adapter=None,
            scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @pytest.fixture
    def inputs(self):
        return {**text_inputs(batch_size=1), "height": 32, "width": 32, "num_frames": 3}

    def test_own_dot(self, pipe, inputs):
        check(pipe, own_dot, 6, 6, **inputs)

    def test_repeated_passes_over_the_timesteps(self, pipe, inputs):
        """FreeInit goes over the timesteps several times; the plan holds for each."""
        pipe.enable_free_init(num_iters=2)
        latents(enable_morse(pipe, own_dot), plan="DoDo", **inputs)
        assert counted(pipe) == (4, 4) and pipe.last_run.fallbacks == {}

    def test_a_weight_shared_dot_is_refused_by_name(self, motion_unet):
        with pytest.raises(ValueError, match=r"not supported for UNetMotionModel.*Your own Dot"):
            MorseDot.from_dash(motion_unet)
