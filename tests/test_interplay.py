"""What users do with a pipeline does not break Morse, and Morse does not break it."""

import copy
import pickle
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from attached import (
    PLAN,
    check_treated,
    difference,
    in_two_threads,
    latents,
    planned,
    text_pipe,
    trained_dot,
    untreated,
)
from tiny_pipelines import text_inputs

from morse import MorsePipeline, disable_morse, enable_morse
from morse.dot.shell import run_hooked
from morse.prepare import prepare_dot
from morse.slot import CURRENT_RUN

BOTH = pytest.mark.parametrize("merge_lora", [True, False])


@pytest.fixture
def pipe():
    pipe = text_pipe()
    return enable_morse(pipe, trained_dot(pipe.unet))


def test_the_lora_of_the_dot_in_these_tests_is_visible(pipe):
    """Else a treatment that loses it would go unnoticed."""
    with_lora = planned(pipe)
    for adapter in pipe.dot.adapters.values():
        torch.nn.init.zeros_(adapter.lora_B.weight)
    pipe.dot.merge_lora()
    assert difference(planned(pipe), with_lora) > 0.02


@pytest.mark.supports("interplay", "`.to(dtype)`")
class TestPrecision:
    @pytest.mark.parametrize(
        ("merge_lora", "dtype"), [(True, torch.bfloat16), (False, torch.float16)]
    )
    def test_another_one(self, merge_lora, dtype):
        def treat(pipe):
            pipe.to(dtype)

        prompts = {name: value.to(dtype) for name, value in text_inputs().items()}
        assert check_treated(treat, merge_lora, **prompts).dtype == dtype

    @BOTH
    def test_there_and_back(self, merge_lora):
        """Rounds the weights of Dash and, where it is attached already, of Dot."""

        def treat(pipe):
            pipe.to(torch.bfloat16)
            pipe.to(torch.float32)

        treated = check_treated(treat, merge_lora, after=False)
        pipe = text_pipe()
        enable_morse(pipe, trained_dot(pipe.unet), merge_lora)
        planned(pipe)
        treat(pipe)
        merged_once_more = planned(pipe)
        assert torch.equal(planned(enable_morse(pipe, pipe.dot, merge_lora)), merged_once_more)
        assert 0 < difference(merged_once_more, treated) < 0.05  # Dot's own weights

    def test_the_dot_follows_the_denoiser(self, pipe):
        """Also where the pipeline is not told, as by `from_pipe` of another class."""
        pipe.unet.to(torch.float64)
        pipe.vae.to(torch.float64)
        prompts = {name: value.double() for name, value in text_inputs().items()}
        assert planned(pipe, **prompts).dtype == pipe.dot.dtype == torch.float64

    def test_a_dot_of_another_precision_is_converted(self):
        pipe = text_pipe()
        dot = trained_dot(pipe.unet).to(torch.float64)
        planned(enable_morse(pipe, dot))
        assert dot.dtype == torch.float32


@pytest.mark.supports("interplay", "offloading (models, layers, groups)")
class TestOffloading:
    @BOTH
    def test_whole_models(self, merge_lora):
        def treat(pipe):
            pipe.enable_model_cpu_offload(device="cpu")

        found = check_treated(treat, merge_lora)
        assert torch.equal(found, untreated(merge_lora=False))

    @BOTH
    def test_layers(self, merge_lora):
        """Weights are on "meta" but while their layer runs."""
        found = check_treated(offload_layers, merge_lora)
        assert torch.equal(found, untreated(merge_lora=False))

    @BOTH
    @pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
    def test_groups(self, merge_lora, kind):
        def treat(pipe):
            pipe.enable_group_offload(
                onload_device=torch.device("cpu"), offload_type=kind, num_blocks_per_group=1
            )

        found = check_treated(treat, merge_lora)
        assert torch.equal(found, untreated(merge_lora=False))

    def test_a_hook_on_a_block_does_not_take_the_place_of_its_shell(self):
        """A hooked block runs Dash's own block; Dot needs the one with LoRA, inside the hook."""

        class Counting(AlignDevicesHook):
            calls = 0

            def pre_forward(self, module, *args, **kwargs):
                Counting.calls += 1
                return super().pre_forward(module, *args, **kwargs)

        def treat(pipe):
            for block in (*pipe.unet.down_blocks, pipe.unet.mid_block, *pipe.unet.up_blocks):
                add_hook_to_module(block, Counting())

        assert torch.equal(check_treated(treat, False), untreated(False))
        Counting.calls = 0
        pipe = text_pipe()
        dot = trained_dot(pipe.unet)
        treat(pipe)
        planned(enable_morse(pipe, dot))
        assert Counting.calls == len(PLAN) * 5

    @BOTH
    def test_hooks_that_are_removed(self, merge_lora):
        """accelerate leaves a layer's own method in its instance."""

        def treat(pipe):
            for module in pipe.unet.modules():
                add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
            latents(pipe, num_inference_steps=2)
            remove_hook_from_module(pipe.unet, recurse=True)

        assert torch.equal(check_treated(treat, merge_lora), untreated(merge_lora))

    def test_hooks_that_only_place_inputs_do_not_prevent_merging(self):
        """What `device_map="balanced"` puts on every layer."""

        def treat(pipe):
            dispatch_model(pipe.unet, {"": "cpu"}, force_hooks=True)

        assert torch.equal(check_treated(treat), untreated())
        pipe = text_pipe()
        dot = trained_dot(pipe.unet)
        treat(pipe)
        assert pipe.unet.conv_in._hf_hook.offload is False
        assert enable_morse(pipe, dot).dot.is_merged

    def test_dot_goes_where_dash_runs(self):
        """Elsewhere than other models, with `device_map`; "meta" stands for another device."""
        pipe = text_pipe()
        dot = trained_dot(pipe.unet)
        pipe.unet._hf_hook = SimpleNamespace(execution_device="meta", offload=False)
        prepare_dot(pipe, dot, pipe.unet)
        assert dot.device.type == "meta" and pipe._execution_device.type == "cpu"

    def test_a_jump_point_goes_along(self):
        class Move(ModelHook):
            def pre_forward(self, module, sample, *args):
                return (sample.to("meta"), *args), {}

        layer = add_hook_to_module(torch.nn.Identity(), Move())
        jump = replace(make_jump(), earlier=make_jump())
        seen = run_hooked(layer, lambda sample, found: found, jump.sample, jump)
        for found in (seen, seen.earlier):
            tensors = (found.sample, found.timestep, found.model_output)
            assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert seen.memory is jump.memory and jump.sample.device.type == "cpu"

    def test_layerwise_casting(self):
        def treat(pipe):
            pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)

        check_treated(treat, after=False)

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        "treat",
        [
            lambda pipe: pipe.enable_model_cpu_offload(),
            lambda pipe: pipe.enable_sequential_cpu_offload(),
            lambda pipe: pipe.enable_group_offload(
                torch.device("cuda"), offload_type="leaf_level", use_stream=True
            ),
            lambda pipe: pipe.enable_group_offload(
                torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1
            ),
        ],
        ids=["model", "sequential", "leaves with a stream", "blocks"],
    )
    @BOTH
    def test_to_an_accelerator(self, treat, merge_lora):
        found = check_treated(treat, merge_lora)
        on_device = untreated(False, make_pipe=lambda: text_pipe().to("cuda"))
        assert difference(found, on_device) < 1e-3


def offload_layers(pipe):
    """What `enable_sequential_cpu_offload` does, which wants an accelerator."""
    from accelerate import cpu_offload

    for name, model in pipe.components.items():
        if isinstance(model, torch.nn.Module) and not (
            name == "dot" and hasattr(model, "_hf_hook")
        ):
            cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)


@pytest.mark.supports("interplay", "`torch.compile`")
class TestCompiling:
    """With the eager backend, which traces and guards but generates no code."""

    @pytest.fixture(autouse=True)
    def afresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_in_place(self):
        def treat(pipe):
            pipe.unet.compile(backend="eager")

        assert torch.equal(check_treated(treat), untreated())

    def test_repeated_blocks(self):
        def treat(pipe):
            pipe.unet.compile_repeated_blocks(backend="eager")

        assert torch.equal(check_treated(treat), untreated())

    def test_wrapped(self):
        def treat(pipe):
            pipe.unet = torch.compile(pipe.unet, backend="eager")

        assert torch.equal(check_treated(treat, after=False), untreated())

    def test_wrapped_in_one_graph(self, pipe):
        """The switch, which would break it, is out of the way, also before a planned call.

        It is not traced along, or each plan would be compiled.
        """
        options, counter = {"num_inference_steps": 2}, torch._dynamo.testing.CompileCounter()
        dash, expected, with_dot = pipe.unet, latents(pipe, **options), planned(pipe)
        pipe.unet = torch.compile(dash, backend=counter, fullgraph=True)
        assert torch.equal(latents(pipe, **options), expected)
        assert torch.equal(planned(pipe), with_dot)
        frames = counter.frame_count
        assert frames > 0
        planned(pipe, "DoooDo")
        assert counter.frame_count == frames
        disable_morse(pipe)
        assert torch.equal(latents(pipe, **options), expected)

    def test_wrapped_in_one_graph_by_another_pipeline(self, pipe):
        other = text_pipe_of(pipe)
        expected = latents(other, num_inference_steps=2)
        other.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
        assert torch.equal(latents(other, num_inference_steps=2), expected)
        planned(pipe)

    def test_one_block_wrapped(self):
        def treat(pipe):
            pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")

        assert torch.equal(check_treated(treat), untreated())

    def test_forward_methods(self):
        """Also that of the whole; a block's is bound to the block, without Dot's LoRA."""

        def treat(pipe):
            for module in (pipe.unet, pipe.unet.mid_block, *pipe.unet.up_blocks):
                module.forward = torch.compile(module.forward, backend="eager")

        assert torch.equal(check_treated(treat), untreated())

    def test_a_wrapped_denoiser_is_saved_without_its_wrapper(self, pipe, tmp_path):
        expected = planned(pipe)
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        pipe.save_pretrained(tmp_path)
        parts = {"text_encoder": None, "tokenizer": None}
        assert torch.equal(planned(MorsePipeline.from_pretrained(tmp_path, **parts)), expected)


def test_a_function_in_place_of_a_blocks_forward_method_is_told(pipe):
    """Dot can't run its shell of the block inside."""
    with_lora = planned(pipe)
    block = pipe.unet.mid_block
    forward = block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.warns(UserWarning, match="Dash's 'mid_block' has another forward method, <func"):
        assert difference(planned(pipe), with_lora) > 1e-3
    block.forward = forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(planned(pipe), with_lora)


def chunk_feed_forward(pipe):
    for module in pipe.unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(1, dim=1)


@pytest.mark.supports(
    "interplay", "attention processors and slicing, FreeU, gradient checkpointing"
)
class TestSettings:
    @pytest.mark.parametrize(
        ("treat", "changes"),
        [
            (lambda pipe: pipe.enable_attention_slicing(1), False),
            (lambda pipe: pipe.unet.set_attn_processor(other_processor()), False),
            (chunk_feed_forward, False),
            (lambda pipe: pipe.unet.enable_gradient_checkpointing(), False),
            (lambda pipe: pipe.unet.to(memory_format=torch.channels_last), False),
            (lambda pipe: pipe.unet.train(), False),
            (lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.5, 1.6), True),
        ],
        ids=[
            "sliced attention",
            "attention processor",
            "chunks",
            "checkpointing",
            "channels last",
            "training mode",
            "freeu",
        ],
    )
    def test_of_the_models(self, treat, changes):
        found, bare = check_treated(treat), untreated()
        assert (difference(found, bare) > 0.01) == changes  # of values up to 200

    def test_an_attention_processor_runs_in_dot_too(self, pipe):
        seen = []

        class Spying(type(other_processor())):
            def __call__(self, attn, hidden_states, *args, **kwargs):
                seen.append(hidden_states.shape[1])
                return super().__call__(attn, hidden_states, *args, **kwargs)

        planned(pipe)
        pipe.unet.set_attn_processor(Spying())
        planned(pipe, "Do")
        assert min(seen) == max(seen) // 4


def other_processor():
    from diffusers.models.attention_processor import AttnProcessor

    return AttnProcessor()


def make_jump():
    from morse.sampling import JumpPoint

    sample, output = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return JumpPoint(sample, torch.tensor(700), output)


@pytest.mark.supports("interplay", "callbacks, interrupts, threads")
class TestCalls:
    @pytest.mark.parametrize(
        "other",
        [
            {"height": 32, "width": 48},
            {name: value[:1] for name, value in text_inputs().items()},
            {"num_images_per_prompt": 2},
            {"guidance_scale": 1.0},
            {"eta": 1.0},
        ],
        ids=["size", "batch", "images per prompt", "no guidance", "noise"],
    )
    def test_of_another_kind_in_between(self, pipe, other):
        first = planned(pipe)
        bare = latents(pipe, num_inference_steps=4, **other)
        assert torch.equal(planned(pipe, "DDDD", **other), bare)
        between = planned(pipe, "DoDo", **other)
        assert torch.equal(planned(pipe), first)
        assert torch.equal(planned(pipe, "DoDo", **other), between)

    def test_one_generator_an_image(self, pipe):
        def generators():
            return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

        both = planned(pipe, generator=generators())
        second = {name: value[1:] for name, value in text_inputs().items()}
        alone = planned(pipe, **second, generator=generators()[1:])
        torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-2)  # of values up to 200

    @pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
    def test_pictures(self, pipe, output_type):
        bare, all_dash, images = (
            latents(pipe, output_type=output_type, **how)
            for how in ({"num_inference_steps": 3}, {"plan": "DDD"}, {"plan": PLAN})
        )
        assert len(images) == 2 and type(pipe).__name__ == "StableDiffusionPipeline"
        for one, other, third in zip(bare, all_dash, images, strict=True):
            assert np.array_equal(one, other) and type(one) is type(other) is type(third)

    def test_a_callback_sees_every_step_and_may_change_the_sample(self):
        seen = []

        def double(pipe, step, timestep, tensors):
            seen.append(step)
            return {"latents": tensors["latents"] * 1.1 if step == 2 else tensors["latents"]}

        found = check_treated(lambda pipe: None, callback_on_step_end=double)
        assert seen[: len(PLAN)] == list(range(len(PLAN)))
        assert difference(found, untreated()) > 1e-3

    def test_a_callback_may_change_the_guidance(self):
        def guide(pipe, step, timestep, tensors):
            pipe._guidance_scale = 7.5 if step < 1 else 3.0
            return tensors

        found = check_treated(lambda pipe: None, callback_on_step_end=guide)
        assert difference(found, untreated()) > 1e-3

    def test_an_error_in_a_callback_leaves_nothing_behind(self, pipe):
        first = planned(pipe)

        def fail(pipe, step, timestep, tensors):
            if step == 2:
                raise RuntimeError("stop")
            return tensors

        with pytest.raises(RuntimeError, match="stop"):
            latents(pipe, plan=PLAN, callback_on_step_end=fail)
        assert CURRENT_RUN.get() is None and pipe.last_run.num_steps == 3
        assert torch.equal(planned(pipe), first)

    def test_an_interrupted_call_is_not_warned_about(self, pipe):
        first = planned(pipe)

        def interrupt(pipe, step, timestep, tensors):
            pipe._interrupt = step == 1
            return tensors

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            latents(pipe, plan=PLAN, callback_on_step_end=interrupt)
        assert pipe.last_run.num_steps == 2
        assert torch.equal(planned(pipe), first)

    def test_two_threads_on_one_pipeline(self, pipe):
        """As far as diffusers goes: they share the scheduler, so their step counts must agree."""
        expected = [planned(pipe, seed=seed) for seed in range(2)]
        found = [None, None]

        def work(seed):
            for _ in range(4):
                found[seed] = latents(pipe, seed=seed, plan=PLAN)

        in_two_threads(work)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

    def test_two_pipelines_on_one_denoiser_in_threads(self, pipe):
        other = MorsePipeline.from_pipe(text_pipe_of(pipe))
        pipes, plans = [pipe, other], ["DooDoo", "DoDo"]
        expected = [planned(each, plan) for each, plan in zip(pipes, plans, strict=True)]
        found = [None, None]

        def work(index):
            for _ in range(4):
                found[index] = planned(pipes[index], plans[index])

        in_two_threads(work)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def text_pipe_of(pipe):
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from tiny_pipelines import stable_diffusion

    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return stable_diffusion(StableDiffusionPipeline, pipe.unet, scheduler)


def test_copies(pipe):
    expected = planned(pipe)
    twin = copy.deepcopy(pipe)
    assert twin.unet is not pipe.unet and twin.dot is not pipe.dot
    assert torch.equal(planned(twin), expected)
    disable_morse(pipe)
    assert torch.equal(planned(twin), expected)
    assert not hasattr(pipe, "last_run")


def test_pickles(pipe):
    expected = planned(pipe)
    twin = pickle.loads(pickle.dumps(pipe))
    assert type(twin) is type(pipe) and twin.last_run is None
    assert torch.equal(planned(twin), expected)
    assert pickle.loads(pickle.dumps(disable_morse(pipe))).unet is not None
