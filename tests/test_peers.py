from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from evaluation_fixtures import tiny_folder  # noqa: F401

from morse.evaluation.bench import deepcache as module
from morse.evaluation.bench.deepcache import (
    deepcache,
    deepcache_cost,
    deepcache_obstacle,
    deepcache_steps,
    measure_deepcache,
)
from morse.evaluation.bench.engagement import timed, why_not_engaged
from morse.evaluation.bench.loading import load_pipelines, make_pipeline
from morse.evaluation.bench.runs import sample_images

CONFIG = DDPMScheduler(clip_sample=False, timestep_spacing="trailing").config


class PromptedPipeline:
    """What DeepCache asks of a Stable Diffusion pipeline, around a tiny network."""

    def __init__(self):
        torch.manual_seed(0)
        self.scheduler = DDIMScheduler()
        self.unet = UNet2DConditionModel(
            sample_size=16,
            layers_per_block=2,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=8,
        ).eval()

    @torch.no_grad()
    def __call__(self):
        sample, prompt = torch.ones(1, 4, 16, 16), torch.ones(1, 3, 8)
        self.scheduler.set_timesteps(4)
        for timestep in self.scheduler.timesteps:
            output = self.unet(sample, timestep, prompt).sample
            sample = self.scheduler.step(output, timestep, sample).prev_sample
        return sample


class BarePipeline:
    """The benchmark's pipeline around a small UNet2DModel."""

    def __init__(self, dash):
        self.pipe = make_pipeline(dash, "dpmsolver++", CONFIG)
        self.unet, self.scheduler = self.pipe.unet, self.pipe.scheduler

    def __call__(self):
        return sample_images(self.pipe, 4, range(2), 2).images


@pytest.fixture(params=["unconditional", "prompted"])
def pipe(request, dash):
    pytest.importorskip("DeepCache")
    return BarePipeline(dash) if request.param == "unconditional" else PromptedPipeline()


def test_deepcache_engages_and_leaves_no_trace(pipe):
    attributes = {name: set(vars(module)) for name, module in pipe.unet.named_modules()}
    before = pipe()
    for interval in (2, 4):
        with deepcache(pipe, interval):
            assert not torch.equal(pipe(), before)
        assert torch.equal(pipe(), before)
    assert attributes == {name: set(vars(module)) for name, module in pipe.unet.named_modules()}


def test_deepcache_of_interval_one_is_the_bare_pipeline(pipe):
    before = pipe()
    with deepcache(pipe, 1):
        assert torch.equal(pipe(), before)


def test_a_failing_run_is_cleaned_up_too(pipe):
    before = pipe()
    with pytest.raises(RuntimeError, match="stop"), deepcache(pipe, 2):
        raise RuntimeError("stop")
    assert torch.equal(pipe(), before)


def test_a_peers_cost_is_measured(dash):
    pytest.importorskip("DeepCache")
    pipe = make_pipeline(dash, "ddim", CONFIG)
    measured = measure_deepcache(pipe, 2, batch_size=2, repeats=1)
    assert measured["cached_lsd"] > 0 and measured["interval"] == 2


def test_an_unengaged_peer_never_looks_engaged(dash, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(module, "deepcache", lambda pipe, interval: nullcontext())
    measured = measure_deepcache(make_pipeline(dash, "ddim", CONFIG), 2, batch_size=1, repeats=1)
    assert not measured["engaged"] and "bit for bit" in measured["note"]


def test_why_not_engaged():
    assert "bit for bit" in why_not_engaged(True, 0.4)
    assert "97%" in why_not_engaged(False, 0.97)
    assert why_not_engaged(False, 0.9) == ""


def test_costs_count_full_steps_as_one():
    assert deepcache_cost(7, 3, 0.25) == (3, 4.0)
    for budget in (1, 4, 5.5, 20):
        for interval, cached in ((2, 0.3), (3, 0.25), (5, 0.9), (3, 1.4)):
            steps = deepcache_steps(budget, interval, cached)
            assert deepcache_cost(steps, interval, cached)[1] <= budget + 1e-9
            assert deepcache_cost(steps + 1, interval, cached)[1] > budget


def test_every_call_is_timed(dash):
    with timed(dash) as seconds:
        sample_images(make_pipeline(dash, "heun", CONFIG), 5, range(1), 1)
    assert len(seconds) == 5 and min(seconds) > 0
    assert not dash._forward_hooks and not dash._forward_pre_hooks


def test_obstacles_are_told(dash, monkeypatch, tiny_folder):  # noqa: F811
    pipe = make_pipeline(dash, "ddim", CONFIG)
    monkeypatch.setattr(module, "find_spec", lambda name: "found")
    assert deepcache_obstacle(pipe) is None
    assert "uses some twice" in deepcache_obstacle(make_pipeline(dash, "heun", CONFIG))
    other = SimpleNamespace(transformer=torch.nn.Linear(2, 2), scheduler=pipe.scheduler)
    assert "no down_blocks" in deepcache_obstacle(other)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "pip install" in deepcache_obstacle(pipe)
    assert load_pipelines(str(tiny_folder), None, ("ddim",), "cpu")  # needs no peer
