"""A tiny random pipeline with a Dot, saved as `MorsePipeline` saves one, and a short reference."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from morse.dot import MorseDot
from morse.evaluation.bench import grid, measuring
from morse.pipeline import MorsePipeline

QUICK_PLAN = {  # settings of a short search
    "lsd": (3,),
    "num_images": 2,
    "num_quick_images": 1,
    "num_fit_images": 2,
    "fit_rounds": 1,
    "refine_rounds": 1,
    "max_rounds": 1,
}
REFERENCE_STEPS = 10  # of the benchmarks that use `short_reference`, to be quick


@pytest.fixture(scope="module", autouse=True)
def short_reference():
    """Runs a module's benchmarks against fewer steps, in whichever module imports it."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (measuring, grid):
            patched.setattr(module, "REFERENCE_STEPS", REFERENCE_STEPS)
        yield


def save_tiny_pipeline(folder, **sizes):
    """Save a pipeline of random weights with its Dot; `sizes` are more of the UNet's arguments."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        **sizes,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe = DDPMPipeline(unet=unet, scheduler=DDPMScheduler(clip_sample=False))
    dot = MorseDot.from_dash(unet, num_down_blocks=1, block_out_channels=(8,), lora_rank=2)
    MorsePipeline.from_pipe(pipe, dot).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    return save_tiny_pipeline(folder, sample_size=32, in_channels=1, out_channels=1)


@pytest.fixture(scope="session")
def independent_folder(tiny_folder, tmp_path_factory):
    """A Dot that estimates alone, for the tiny pipeline."""
    dash = UNet2DModel.from_pretrained(tiny_folder, subfolder="unet")
    dot = MorseDot.from_dash(
        dash, num_down_blocks=1, block_out_channels=(8,), lora_rank=2, independent=True
    )
    folder = tmp_path_factory.mktemp("independent")
    dot.save_pretrained(folder)
    return folder
