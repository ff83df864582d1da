import diffusers
import pytest
import torch

from morse.clock import scheduler_index
from morse.schedulers import SCHEDULERS, make_scheduler

CONFIG = diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="trailing").config


@pytest.mark.parametrize("name", SCHEDULERS)
def test_index_is_followed_through_a_run(name):
    scheduler = make_scheduler(name, CONFIG)
    scheduler.set_timesteps(7)
    sample, evaluations = torch.randn(1, 1, 4, 4), len(scheduler.timesteps)
    assert evaluations == {"heun": 13, "pndm": 16}.get(name, 7)
    for index, timestep in enumerate(scheduler.timesteps):
        assert scheduler_index(scheduler, timestep) == index
        assert scheduler_index(scheduler, timestep.expand(2)) == index
        model_input = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(model_input * 0.1, timestep, sample).prev_sample


def test_values_are_looked_up_where_the_timestep_is_a_copy():
    scheduler = make_scheduler("ddim", CONFIG)
    scheduler.set_timesteps(5)
    assert scheduler_index(scheduler, scheduler.timesteps[3].clone()) == 3
    assert scheduler_index(scheduler, int(scheduler.timesteps[2])) == 2
    assert scheduler_index(scheduler, scheduler.timesteps[2].repeat(4)) == 2
    assert scheduler_index(scheduler, 12345) is None


def test_repeated_values_are_told_apart_by_their_place():
    scheduler = make_scheduler("ddim", CONFIG)
    scheduler.set_timesteps(4)
    scheduler.timesteps = torch.tensor([900, 500, 500, 100])
    found = [scheduler_index(scheduler, timestep) for timestep in scheduler.timesteps]
    assert found == [0, 1, 2, 3]


def test_the_place_is_told_where_timesteps_are_part_of_a_finer_grid():
    scheduler = make_scheduler("leapfrog", CONFIG)
    scheduler.set_timesteps(6)
    assert scheduler.timesteps.stride() == (2,) and scheduler.step_index is None
    for first in (0, 2):
        scheduler.timesteps = scheduler.timesteps[first:]
        found = [scheduler_index(scheduler, timestep) for timestep in scheduler.timesteps]
        assert found == list(range(6 - first))


def test_a_scheduler_without_a_run_tells_nothing():
    assert scheduler_index(make_scheduler("ddim", CONFIG), torch.tensor(5)) is None


def test_the_first_step_is_known_where_the_pipeline_scales_the_timestep():
    """Flux's pipelines give the transformer timestep / 1000."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    sample = torch.randn(1, 1, 4, 4)
    for index, timestep in enumerate(scheduler.timesteps):
        assert scheduler_index(scheduler, timestep.repeat(2) / 1000) == index
        sample = scheduler.step(sample * 0.1, timestep, sample).prev_sample
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)  # image to image
    assert scheduler_index(scheduler, scheduler.timesteps[2].repeat(2) / 1000) == 2


def test_timesteps_that_were_rounded():
    scheduler = diffusers.DDPMWuerstchenScheduler()
    assert not hasattr(scheduler, "num_inference_steps")
    for dtype, count in ((torch.bfloat16, 60), (torch.float16, 500)):
        scheduler.set_timesteps(count)
        assert scheduler.timesteps[7].to(dtype) != scheduler.timesteps[7]
        found = [scheduler_index(scheduler, t.to(dtype).repeat(2)) for t in scheduler.timesteps]
        assert found == list(range(count + 1))
    scheduler.set_timesteps(500)  # closer to each other than the rounding
    assert scheduler_index(scheduler, scheduler.timesteps[7].bfloat16().repeat(2)) is None


def test_timesteps_that_a_call_chooses():
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert [scheduler_index(scheduler, each) for each in scheduler.timesteps] == [0, 1, 2]
