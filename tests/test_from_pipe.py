"""Pipelines made of another's parts, and saved and loaded ones, keep the Dot."""

import gc
import json
import sys
import weakref

import diffusers
import pytest
import torch
from attached import latents, planned, text_pipe, trained_dot
from tiny_pipelines import picture

from morse import MorseDot, MorsePipeline, disable_morse, enable_morse

NO_TEXT_MODELS = {"text_encoder": None, "tokenizer": None}


@pytest.fixture
def pipe():
    pipe = text_pipe()
    enable_morse(pipe, trained_dot(pipe.unet))
    pipe.speed_ratio = 4.0
    return pipe


def image_to_image(make):
    """A way from a text-to-image pipeline to an image-to-image one."""
    bare = make(text_pipe())
    bare.set_progress_bar_config(disable=True)
    return bare


WAYS = pytest.mark.parametrize(
    "make",
    [
        diffusers.StableDiffusionImg2ImgPipeline.from_pipe,
        diffusers.AutoPipelineForImage2Image.from_pipe,
    ],
    ids=["class", "auto"],
)


@WAYS
@pytest.mark.supports("interplay", "`from_pipe`, `AutoPipeline`")
def test_another_pipeline_of_the_same_parts(pipe, make):
    inputs = {"image": picture(), "strength": 0.5}
    expected = image_latents(image_to_image(make), num_inference_steps=8, **inputs)
    before = planned(pipe)
    other = make(pipe)
    other.set_progress_bar_config(disable=True)
    assert type(other) is diffusers.StableDiffusionImg2ImgPipeline and other.unet is pipe.unet
    assert torch.equal(image_latents(other, num_inference_steps=8, **inputs), expected)
    other = MorsePipeline.from_pipe(other)
    assert other.dot is pipe.dot and other.speed_ratio == 4.0
    assert torch.equal(image_latents(other, plan="DDDD", **inputs), expected)
    found = image_latents(other, plan="DooD", **inputs)
    assert (other.last_run.num_dash, other.last_run.num_dot) == (2, 2)
    assert other.last_run.fallbacks == {} and not torch.equal(found, expected)
    image_latents(other, lsd=3, **inputs)
    assert other.last_run.speed_ratio == 4.0
    assert torch.equal(planned(pipe), before)


def image_latents(pipe, **kwargs):
    from tiny_pipelines import text_inputs

    generator = torch.Generator().manual_seed(0)
    return pipe(**text_inputs(), generator=generator, output_type="latent", **kwargs)[0]


def test_the_dot_outlives_the_pipeline_that_it_came_with(pipe):
    dot, other = pipe.dot, diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    del pipe
    assert MorsePipeline.from_pipe(other).dot is dot


@pytest.mark.parametrize("first", [0, 1])
def test_a_disabled_pipeline_leaves_the_dot_of_others(pipe, first):
    pipes = [
        pipe,
        MorsePipeline.from_pipe(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)),
    ]
    dot = pipe.dot
    disable_morse(pipes[first])
    other = diffusers.StableDiffusionPipeline.from_pipe(pipes[1 - first])
    assert MorsePipeline.from_pipe(other).dot is dot
    del other
    disable_morse(pipes[1 - first])
    assert vars(pipe.unet)["_compiled_call_impl"] is None


def test_what_is_compiled_keeps_the_dot(pipe):
    dash = pipe.unet
    pipe.unet = torch.compile(dash, backend="eager")
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet and MorsePipeline.from_pipe(other).dot is pipe.dot
    disable_morse(other)
    disable_morse(pipe)
    for module in (dash, pipe.unet):
        assert vars(module).get("_compiled_call_impl") is None


def test_the_class_of_an_enabled_pipeline_makes_enabled_ones(pipe):
    other = type(pipe).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other is not pipe and other.dot is pipe.dot and other.speed_ratio == 4.0
    assert torch.equal(planned(other), planned(pipe))
    plain = type(pipe).from_pipe(text_pipe())
    assert type(plain) is diffusers.StableDiffusionPipeline


def test_a_pipeline_in_use_keeps_its_dot_and_settings(pipe):
    assert MorsePipeline.from_pipe(pipe) is pipe
    assert pipe.dot is not None and pipe.speed_ratio == 4.0
    assert MorsePipeline.from_pipe(pipe, scheduler="dpmsolver++").dot is pipe.dot
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"


def test_the_dot_that_was_assigned_last_comes_along_and_others_are_let_go(pipe):
    planned(pipe)
    before = weakref.ref(pipe.dot)
    pipe.dot = trained_dot(pipe.unet)
    pipe.last_run = None
    gc.collect()
    assert before() is None  # and with it the copy of Dash's weights
    assert type(pipe).from_pipe(pipe).dot is pipe.dot
    other = type(pipe).from_pipe(pipe)
    other.dot = None
    assert type(pipe).from_pipe(pipe).dot is pipe.dot is not None
    pipe.dot = None
    assert type(type(pipe).from_pipe(pipe)) is diffusers.StableDiffusionPipeline


def test_a_callable_dot_is_kept_too():
    def dot(sample, timestep, jump, **conditions):
        return torch.zeros_like(sample)

    pipe = enable_morse(text_pipe(), dot)
    other = MorsePipeline.from_pipe(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    assert other.dot is dot


def test_a_pipeline_without_any_dot(pipe):
    assert MorsePipeline.from_pipe(text_pipe()).dot is None


def test_from_pipe_converts_dash_and_the_dot_follows(pipe):
    """diffusers' `from_pipe` converts the shared parts to float32 unless told otherwise."""
    expected = planned(pipe)
    pipe.to(torch.float64)
    other = MorsePipeline.from_pipe(diffusers.StableDiffusionPipeline.from_pipe(pipe))
    other.set_progress_bar_config(disable=True)
    assert other.dot.dtype == torch.float32
    assert torch.equal(planned(other), expected)


class TestSaved:
    def test_a_pipeline_of_anothers_parts(self, pipe, tmp_path):
        other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        other = MorsePipeline.from_pipe(other)
        other.dot, dot = None, other.dot
        other.dot = dot  # away for a while, and saved all the same
        other.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["_class_name"] == "StableDiffusionImg2ImgPipeline"
        assert index["dot"] == [None, "MorseDot"] and "_dot" not in index
        loaded = MorsePipeline.from_pretrained(tmp_path, **NO_TEXT_MODELS)
        assert isinstance(loaded, diffusers.StableDiffusionImg2ImgPipeline)
        assert isinstance(loaded.dot, MorseDot)

    def test_variant(self, pipe, tmp_path):
        pipe.to(torch.float16)
        pipe.save_pretrained(tmp_path, variant="fp16")
        names = {path.name for path in (tmp_path / "dot").iterdir()}
        assert names == {
            "README.md",
            "config.json",
            "diffusion_pytorch_model.fp16.safetensors",
        }
        loaded = MorsePipeline.from_pretrained(
            tmp_path, variant="fp16", dtype=torch.float16, **NO_TEXT_MODELS
        )
        assert loaded.dot.dtype == loaded.unet.dtype == torch.float16
        for name, value in pipe.dot.state_dict().items():
            assert torch.equal(loaded.dot.state_dict()[name], value)
        with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors"):
            MorsePipeline.from_pretrained(tmp_path, **NO_TEXT_MODELS)

    def test_a_dot_saved_without_the_variant_is_loaded_without(self, pipe, tmp_path):
        pipe.dot.save_pretrained(tmp_path / "dot")
        bare = text_pipe()
        bare.save_pretrained(tmp_path / "pipe", variant="fp16")
        loaded = MorsePipeline.from_pretrained(
            tmp_path / "pipe", dot=tmp_path / "dot", variant="fp16", **NO_TEXT_MODELS
        )
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(planned(loaded), planned(pipe))

    def test_plain_diffusers_opens_it_and_draws_dashs_image(self, pipe, tmp_path, monkeypatch):
        pipe.save_pretrained(tmp_path)
        with monkeypatch.context() as without:
            for name in [*sys.modules]:
                if name.split(".")[0] == "morse":
                    without.setitem(sys.modules, name, None)  # importing it is an error now
            plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **NO_TEXT_MODELS)
            assert type(plain) is diffusers.StableDiffusionPipeline and not hasattr(plain, "dot")
            plain.set_progress_bar_config(disable=True)
            found = latents(plain, num_inference_steps=4)
        assert torch.equal(found, latents(pipe, num_inference_steps=4))
