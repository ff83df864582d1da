"""The example with a loop of its own makes the pipeline's images."""

import pytest
import torch
from torch.testing import assert_close

from morse import MorseDot, MorsePlan, enable_morse
from morse.schedulers import make_scheduler
from pipelines.own_loop import sample


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++", "leapfrog"])
def test_its_images_are_the_pipelines(make_pipe, scheduler):
    pipe = make_pipe("ddim")
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler.config)
    dot = MorseDot.from_dash(pipe.unet, num_down_blocks=1, block_out_channels=(8,), lora_rank=2)
    torch.nn.init.normal_(dot.conv_out.weight, std=0.1)
    enable_morse(pipe, dot)
    plan = "DooDoD"
    seeded = torch.Generator().manual_seed(0)
    expected = pipe(batch_size=2, plan=plan, output_type="pt", generator=seeded).images
    size = pipe.unet.config.sample_size
    noise = torch.randn(
        2, pipe.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0)
    )
    images = sample(pipe.unet, dot, pipe.scheduler, MorsePlan.from_string(plan), noise)
    found = (images / 2 + 0.5).clamp(0, 1)
    assert_close(found, torch.as_tensor(expected), rtol=0, atol=1e-5)
    assert pipe.last_run.num_dot == 3
