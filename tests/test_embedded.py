"""The pipeline that comes with the package does what README says."""

import pytest
import torch

from morse import MorsePipeline, disable_morse
from morse.evaluation.metrics import psnr
from morse.plan import MorsePlan


def sample(pipe, count=1, **kwargs):
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipe(batch_size=count, generator=generators, output_type="pt", **kwargs).images


def load(scheduler):
    pipe = MorsePipeline.from_pretrained("fashion-mnist", scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)  # faster on a CPU
    return pipe


@pytest.fixture(scope="module", params=["ddim", "dpmsolver++"])
def pipe(request):
    return load(request.param)


def test_plans_come_from_the_config(pipe):
    sample(pipe, count=1, lsd=5)
    is_ddim = type(pipe.scheduler).__name__ == "DDIMScheduler"
    ratio = 2.0 if is_ddim else 1.75
    assert str(pipe.last_run.plan) == f"ggg{MorsePlan.from_budget(5, 6.0, ratio)}"
    assert pipe.last_run.fallbacks == {} and pipe.last_run.lsd <= 5
    assert pipe.plan_ratio(30) == (1.0 if is_ddim else 1.5)


def test_searched_plans_come_with_the_leapfrog_solver():
    pipe = load("leapfrog")
    plans = pipe.dot.config.plans["LeapfrogScheduler"]
    saved, _ = (entry for entry in plans if entry["lsd"] == 5)  # the second is for slow Dots
    sample(pipe, count=1, lsd=5)
    assert str(pipe.last_run.plan) == saved["plan"] and pipe.last_run.lsd <= 5
    sample(pipe, count=1, lsd=5, plan="uniform")
    assert pipe.last_run.plan == MorsePlan.from_budget(5, 6.0, 1.5)
    # Beyond the searched plans Dot does harm.
    assert pipe.plan_for(100).plan == "D" * 100


@pytest.fixture(scope="module")
def reference():
    """Several images of many steps, for a single one may end in another mode."""
    return sample(load("dpmsolver++"), count=4, num_inference_steps=25)


@pytest.mark.slow
def test_morse_is_nearer_to_many_steps_than_the_bare_solver(pipe, reference):
    bare, with_dot = (
        psnr(sample(pipe, count=4, **budget), reference).mean()
        for budget in ({"num_inference_steps": 8}, {"lsd": 8})
    )
    assert with_dot > bare + 3


def test_disabling_gives_the_bare_pipeline_back(pipe):
    expected = sample(pipe, count=1, num_inference_steps=3)
    dot = pipe.dot
    disable_morse(pipe)
    assert torch.equal(sample(pipe, count=1, num_inference_steps=3), expected)
    MorsePipeline.from_pipe(pipe, dot)
