import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from idx_files import write_idx
from safetensors.torch import load_file
from train_runs import assert_same_run

from morse.cli import parse_config
from morse.training import run
from morse.training.batches import StepBatches
from morse.training.common import (
    RunConfig,
    derive_seed,
    learning_rate_at,
    make_optimizer,
    step_generator,
)
from morse.training.dash import TrainDashConfig, train_dash
from morse.training.output import begin_run
from morse.training.run import TrainingRun

OPTIONS = """--resolution 8 --block_out_channels 8 8 --train_batch_size 3 --max_train_steps 5
    --lr_warmup_steps 2 --learning_rate 1e-2 --checkpointing_steps 2 --logging_steps 2
    --save_images_steps 0 --seed 3 --horizontal_flip --gradient_accumulation_steps 2"""


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    return write_idx(tmp_path_factory.mktemp("data") / "images-idx3-ubyte", images)


def make_config(data_file, output_dir, *options):
    arguments = ["--train_data_dir", str(data_file), "--output_dir", str(output_dir)]
    return parse_config(TrainDashConfig, [*arguments, *OPTIONS.split(), *options])


@pytest.fixture(scope="module")
def whole_run(data_file, tmp_path_factory):
    return train_dash(make_config(data_file, tmp_path_factory.mktemp("runs") / "whole"))


def test_result_is_a_diffusers_pipeline(whole_run):
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(whole_run)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert not pipeline.scheduler.config.clip_sample
    images = pipeline(2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    ema = load_file(whole_run / "checkpoint-5" / "ema.safetensors")
    for index, parameter in enumerate(pipeline.unet.parameters()):
        torch.testing.assert_close(parameter.data, ema[str(index)], rtol=0, atol=0)
    names = {path.name for path in whole_run.iterdir()}
    assert {"checkpoint-4", "checkpoint-5", "train_config.json"} <= names
    assert "checkpoint-2" not in names


def test_a_full_output_dir_is_refused(data_file, whole_run):
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        train_dash(make_config(data_file, whole_run))


def test_time_limit_saves_and_resumes(data_file, tmp_path, whole_run, monkeypatch):
    config = make_config(data_file, tmp_path / "run", "--max_train_seconds", "10")
    with monkeypatch.context() as patch:
        clock = iter([0.0, 1.0, 9.0, 9.5, 10.5])  # construction, then before each step
        patch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        train_dash(config)
    assert (tmp_path / "run" / "model_index.json").is_file()
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    train_dash(replace(config, max_train_seconds=None, resume_from_checkpoint="latest"))
    assert_same_run(tmp_path / "run", whole_run, 5, "unet")


def test_settings_that_a_checkpoint_keeps_are_told(data_file, tmp_path, capsys):
    steps = ("--max_train_steps", "2", "--lr_warmup_steps", "1")
    config = make_config(data_file, tmp_path / "run", *steps)
    train_dash(config)
    changes = {"adam_beta2": 0.99, "adam_weight_decay": 0.1, "ema_max_decay": 0.5, "seed": 4,
               "learning_rate": 0.02, "logging_steps": 1,
               "train_data_dir": Path(os.path.relpath(data_file))}  # fmt: skip
    train_dash(replace(config, resume_from_checkpoint="latest", **changes))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert told == [
        "warning: learning_rate was 0.01 and is now 0.02; the result may differ from that of an "
        "uninterrupted run",
        "warning: seed was 3 and is now 4; the result may differ from that of an uninterrupted run",
        "warning: adam_beta2 is 0.99, but stays 0.999, as in the checkpoint",
        "warning: adam_weight_decay is 0.1, but stays 1e-06, as in the checkpoint",
        "warning: ema_max_decay is 0.5, but stays 0.9999, as in the checkpoint",
    ]


def test_a_result_without_checkpoints_is_not_overwritten(data_file, tmp_path):
    config = make_config(data_file, tmp_path / "run", "--max_train_steps", "1")
    folder = train_dash(config)
    shutil.rmtree(folder / "checkpoint-1")
    with pytest.raises(FileExistsError, match="no checkpoint to go on from"):
        train_dash(replace(config, resume_from_checkpoint="latest"))


def test_another_path_through_the_options(data_file, tmp_path):
    from PIL import Image

    config = make_config(
        data_file, tmp_path / "run", "--no-use_ema", "--save_images_steps", "2",
        "--prediction_type", "v_prediction", "--channels", "3", "--report_to", "tensorboard",
        "--max_train_steps", "2", "--block_out_channels", "8", "--lr_scheduler", "constant",
    )  # fmt: skip
    folder = train_dash(config)
    samples = folder / "samples" / "step-0000002.png"
    assert Image.open(samples).size == (32, 32)
    drawn = samples.read_bytes()
    samples.unlink()  # as if the run had been killed while it drew
    train_dash(replace(config, resume_from_checkpoint="latest"))
    assert samples.read_bytes() == drawn
    assert any((folder / "logs").rglob("events.out.tfevents.*"))
    assert not (folder / "checkpoint-2" / "ema.safetensors").exists()


def test_killed_in_a_step_and_resumed_gives_the_same_bits(
    data_file, tmp_path, whole_run, monkeypatch
):
    config = make_config(data_file, tmp_path / "run")

    class KilledError(Exception):
        pass

    one_pass = TrainingRun._forward_backward

    def die_in_the_fourth_step(run, images, micro_step):
        loss = one_pass(run, images, micro_step)
        if (run.step, micro_step) == (3, 0):
            raise KilledError
        return loss

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(TrainingRun, "_forward_backward", die_in_the_fourth_step)
        train_dash(config)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert not (tmp_path / "run" / "model_index.json").exists()

    train_dash(replace(config, resume_from_checkpoint="latest"))

    assert_same_run(tmp_path / "run", whole_run, 5, "unet")


class Rows:
    """Vectors in the place of images."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitems__(self, rows):
        return self.values[rows]


def mean_square(model, batch, generator=None):
    return model(batch).square().mean()


def train_plainly(model, values, batches, max_grad_norm):
    """Whole batches, clipped; returns AdamW, diffusers' average, and each gradient's norm."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.2)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=len(batches))
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    norms = []
    for rows in batches:
        optimizer.zero_grad()
        mean_square(model, values[rows]).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
        optimizer.step()
        rates.step()
        average.step(model.parameters())
    return optimizer, average, torch.stack(norms)


@pytest.mark.parametrize("max_grad_norm", [0.1, 100.0])
def test_a_run_does_what_a_plain_loop_does(tmp_path, max_grad_norm):
    """Two passes of half a batch are one update, clipped once they are summed, and averaged."""
    config = RunConfig(
        output_dir=tmp_path, train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=4,
        learning_rate=0.1, lr_warmup_steps=1, adam_weight_decay=0.2, max_grad_norm=max_grad_norm,
    )  # fmt: skip
    accelerator = begin_run(config)
    values, linear = 3 * torch.randn(10, 3), torch.nn.Linear(3, 2)
    expected = copy.deepcopy(linear).to(accelerator.device)
    training = TrainingRun(config, accelerator, linear, Rows(values), mean_square)
    assert training.train() == 4
    batches = StepBatches(10, 4, config.seed, 0, 4)
    optimizer, average, norms = train_plainly(
        expected, values.to(accelerator.device), batches, max_grad_norm
    )
    assert ((norms > max_grad_norm) == (max_grad_norm < 1)).all()
    for found, wanted in (
        (training.model.state_dict(), expected.state_dict()),
        (training.ema.shadow_params, average.shadow_params),
        # AdamW's moves alone would be those of gradients of any size.
        (training.optimizer.state_dict()["state"], optimizer.state_dict()["state"]),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_learning_rate_is_that_of_diffusers(tmp_path, name):
    from diffusers.optimization import get_scheduler

    config = TrainDashConfig(
        output_dir=tmp_path, train_data_dir=tmp_path, lr_scheduler=name, lr_warmup_steps=3,
        max_train_steps=9, learning_rate=0.5,
    )  # fmt: skip
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], config)
    theirs = get_scheduler(
        name if name == "cosine" else "constant_with_warmup",
        optimizer,
        num_warmup_steps=3,
        num_training_steps=9,
    )
    for step in range(9):
        torch.testing.assert_close(learning_rate_at(config, step), theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_each_pass_has_its_own_random_numbers():
    draws = {
        torch.rand((), generator=step_generator(seed, step, rank, "cpu", micro_step)).item()
        for seed in (0, 1) for step in (0, 1) for rank in (0, 1) for micro_step in (0, 1)
    }  # fmt: skip
    assert len(draws) == 16
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert 0 <= derive_seed(0) < 2**63


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 30, "block_out_channels": (8, 8, 8)}, "resolution is 30.*multiple of 4"),
        ({"block_out_channels": (8, 12)}, "multiple of 8"),
        ({"train_batch_size": 0}, "train_batch_size is 0.*more than 0"),
        ({"adam_beta2": 1.0}, r"adam_beta2 is 1.0.*\[0, 1\)"),
        ({"dataset_name": "someone/pictures"}, "exactly one"),
    ],
)
def test_wrong_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainDashConfig(output_dir=tmp_path, train_data_dir=tmp_path, **changes)
