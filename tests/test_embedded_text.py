"""The text-to-image pipeline that comes with the package does what its card says."""

from functools import cache

import pytest
import torch

from morse import MorsePipeline
from morse.evaluation.features import load_features
from morse.evaluation.metrics import psnr
from morse.plan import MorsePlan

PROMPTS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
)  # fmt: skip
WITH_DOT = MorsePlan.from_budget(8, 4.0, ratio=1.5)


def load(scheduler=None):
    pipe = MorsePipeline.from_pretrained("fashion-mnist-text", scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return load()


def sample(pipe, count=1, guidance_scale=3.0, **kwargs):
    generators = [torch.Generator().manual_seed(seed) for seed in range(count * len(PROMPTS))]
    prompts = list(PROMPTS) * count
    options = {"guidance_scale": guidance_scale, "output_type": "pt", **kwargs}
    return pipe(prompts, generator=generators, **options).images


@cache
def reference(guidance_scale):
    """Images of many steps."""
    return sample(load("dpmsolver++"), guidance_scale=guidance_scale, num_inference_steps=25)


def test_a_budget_is_spent_on_dash_alone_where_dot_does_harm(pipe):
    plans = {lsd: pipe.plan_for(lsd).plan for lsd in (4, 5, 23, 24)}
    assert "o" in plans[5] and "o" in plans[23]
    assert all(plans[lsd] == lsd * "D" for lsd in (4, 24))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 7.5])
def test_dot_brings_images_nearer_than_the_bare_solver(pipe, guidance_scale):
    """It was tuned on other noise."""
    options = {"guidance_scale": guidance_scale}
    with_dot = sample(pipe, lsd=8, **options)
    assert pipe.last_run.num_dot > 0
    many = sample(load("leapfrog"), lsd=20, **options)  # near to the end, and of another solver
    bare = sample(pipe, num_inference_steps=8, **options)
    assert psnr(with_dot, many).mean() > psnr(bare, many).mean() + 1


def test_prompts_draw_their_classes(pipe):
    images = sample(pipe, count=3, plan=WITH_DOT)
    assert pipe.last_run.num_dot > 0 and pipe.last_run.fallbacks == {}
    found = load_features()(images).argmax(1)
    expected = torch.arange(len(PROMPTS)).repeat(3)
    assert (found == expected).float().mean() > 0.75


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 7.5])
def test_fitted_steps_carry_over_to_other_noise_and_guidance(guidance_scale):
    """They were fitted at guidance 3 on other seeds."""
    few = load("leapfrog")
    options, many = {"guidance_scale": guidance_scale}, reference(guidance_scale)
    fitted = sample(few, lsd=8, **options)
    assert few.last_run.num_dash == 8
    plain = sample(few, num_inference_steps=8, **options)
    assert psnr(fitted, many).mean() > psnr(plain, many).mean() + 2


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_dot_corrects_what_reuse_leaves(pipe, guidance_scale):
    """The same plan with a Dot that says nothing is reuse of Dash's latest estimate."""
    options, many = {"guidance_scale": guidance_scale}, reference(guidance_scale)
    with_dot, dot = sample(pipe, plan=WITH_DOT, **options), pipe.dot
    silent = MorsePipeline.from_pipe(pipe, lambda sample, *_, **__: torch.zeros_like(sample))
    reuse = sample(silent, plan=WITH_DOT, **options)
    MorsePipeline.from_pipe(pipe, dot)
    assert psnr(with_dot, many).mean() > psnr(reuse, many).mean() + 0.5
