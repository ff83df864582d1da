"""A scheduler's options for a while, also where threads share a pipeline."""

from threading import Event, Thread

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import loop_pipeline
from torch import nn

from morse import LeapfrogScheduler
from morse.saved_plans import chooses_timesteps, scheduler_options


def make_pipe():
    return loop_pipeline(nn.Identity(), LeapfrogScheduler())


def power(pipe):
    return pipe.scheduler.config.timestep_power


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"strength": 0.8}, True),
        ({"strength": 1.0, "num_inference_steps": None}, False),  # as inpainting has it
        ({"strength": None}, False),
        ({"inpaint_strength": 0.8}, True),
        ({"strength": 0.8, "denoise_strength": 1.0}, False),  # of LTX's conditions, and of the run
        ({"strength": 1.0, "num_inference_steps": 5}, True),
        ({"timesteps": [999]}, True),
        ({"sigmas": [1.0, 0.5]}, True),
        ({"denoising_start": 0.5}, True),
        ({"denoising_end": 0.5}, True),
    ],
)
def test_whole_runs_do_not_choose_timesteps(arguments, expected):
    assert chooses_timesteps(arguments) == expected


def test_options_within_others():
    pipe = make_pipe()
    before = pipe.scheduler
    with scheduler_options(pipe, {"timestep_power": 2.0}):
        with scheduler_options(pipe, {"timestep_power": 3.0}):
            assert power(pipe) == 3
        assert power(pipe) == 2
    assert pipe.scheduler is before
    with pytest.raises(KeyboardInterrupt), scheduler_options(pipe, {"timestep_power": 2.0}):
        raise KeyboardInterrupt
    assert pipe.scheduler is before


def test_a_shift_that_was_set_stays():
    pipe = make_pipe()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipe.scheduler.set_shift(5.0)
    pipe.scheduler.set_timesteps(4)
    expected = pipe.scheduler.sigmas
    with scheduler_options(pipe, {"use_karras_sigmas": False}):
        pipe.scheduler.set_timesteps(4)
        assert torch.equal(pipe.scheduler.sigmas, expected)
    with scheduler_options(pipe, {"shift": 3.0}):
        assert pipe.scheduler.shift == 3.0


def test_threads_take_turns():
    """Else the one that is done last would leave the scheduler that it found: the other's."""
    pipe, entered, found = make_pipe(), Event(), []
    before = pipe.scheduler

    def work():
        with scheduler_options(pipe, {"timestep_power": 2.0}):
            entered.set()
            found.append(power(pipe))

    thread = Thread(target=work)
    with scheduler_options(pipe, {"timestep_power": 3.0}):
        thread.start()
        assert not entered.wait(0.2) and power(pipe) == 3
    thread.join()
    assert found == [2] and pipe.scheduler is before


def test_pipelines_do_not_wait_for_each_other():
    first, second = make_pipe(), make_pipe()
    entered = Event()

    def work():
        with scheduler_options(second, {"timestep_power": 2.0}):
            entered.set()

    with scheduler_options(first, {"timestep_power": 3.0}):
        thread = Thread(target=work)
        thread.start()
        assert entered.wait(5)
    thread.join()
