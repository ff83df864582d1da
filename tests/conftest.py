import gc
import os
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from idx_files import write_parts

_HAS_CUDA = torch.cuda.is_available()


def pytest_configure(config):
    # pytest-xdist would begin with the files of most tests; see below for what takes long.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_finish():
    # What was imported stays: looking through it in every collection is a tenth of the tests' time.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    # What takes long begins first, so that no process waits at the end for another's last file.
    slow = Counter(item.path for item in items if "slow" in item.keywords)
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path], item.path))
    if _HAS_CUDA:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture(autouse=True)
def _same_draws_in_any_order():
    """What a test draws without a generator of its own does not depend on the tests before it."""
    # `torch.manual_seed` asks every kind of device first, which takes longer than many a test.
    torch.random.default_generator.manual_seed(0)
    if _HAS_CUDA:
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="module", autouse=True)
def _precision_of_its_own():
    """accelerate has one precision for a process: that of a file's trainings must not stay."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks():
    """Files of tests need not outlive a power failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _small_validation_pictures():
    """Each training ends with a picture, which takes as long as its updates on tiny models."""
    from morse.training import validation

    with pytest.MonkeyPatch.context() as patch:
        small = partial(validation.sample_rows, num_dash=1, num_dot=2)
        patch.setattr(validation, "sample_rows", small)
        patch.setattr(validation, "_PICTURES", 2)
        yield


@pytest.fixture(scope="session")
def build_unet():
    """A function that builds small seeded UNet2DModels."""
    from diffusers import UNet2DModel

    def build(seed=0, channels=(32, 32), in_channels=1, sample_size=16, **options):
        torch.manual_seed(seed)
        levels = len(channels)
        return UNet2DModel(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=in_channels,
            layers_per_block=1,
            block_out_channels=channels,
            norm_num_groups=8,
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
            **options,
        ).eval()

    return build


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder of random images of 8x8 pixels, with labels of three classes."""
    folder = tmp_path_factory.mktemp("data")
    write_parts(folder, num_classes=3)
    return folder


@pytest.fixture
def dash(build_unet):
    return build_unet()


@pytest.fixture
def make_pipe(build_unet):
    """A function that builds a small DDPMPipeline with a named scheduler."""
    from diffusers import DDPMPipeline, DDPMScheduler

    from morse.schedulers import make_scheduler

    def make(scheduler="ddim", unet=None):
        config = DDPMScheduler(clip_sample=False, timestep_spacing="trailing").config
        pipe = DDPMPipeline(unet or build_unet(), make_scheduler(scheduler, config))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def make_dot():
    """A function that makes a Dot whose output is not zero, as after some training."""
    from morse.dot import MorseDot

    def make(dash, scale=0.05, **options):
        torch.manual_seed(1)
        dot = MorseDot.from_dash(dash, **{"block_out_channels": None, "lora_rank": 4, **options})
        with torch.no_grad():
            for name, parameter in dot.named_parameters():
                if "lora_B" in name or name.startswith(("conv_out", "jump_time")):
                    parameter.normal_(0, scale)
        return dot.eval()

    return make
