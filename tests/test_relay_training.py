"""Training a Dot whose norms relay (DNR): sequences from one jump point, and what they teach."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from torch.testing import assert_close
from train_runs import (
    assert_same_run,
    copy_unfinished,
    dot_arguments,
    save_pixels,
    seeded,
    weights,
)

from morse import MorseDot, MorsePlan, morse_sample
from morse.cli import parse_config
from morse.spaces import ddim_step, signal_and_noise
from morse.training.frozen import FrozenDash
from morse.training.guidance import Conditions
from morse.training.loop import TrainDotConfig, train_dot
from morse.training.pairs import dot_outputs, weighted_loss
from morse.training.schedule import NoiseSchedule
from morse.training.sequences import (
    sequence_loss,
    sequence_pairs,
    sequence_ratios,
    sequence_residuals,
)
from morse.training.validation import residual_ratios, sample_rows
from morse.training.windows import fresh_window, make_window, pick_pairs

ALPHAS = DDPMScheduler().alphas_cumprod
OPTIONS = """--train_batch_size 3 --max_train_steps 4 --lr_warmup_steps 2 --learning_rate 1e-2
    --checkpointing_steps 2 --logging_steps 2 --validation_steps 0 --validation_images 4 --seed 3
    --num_down_blocks 1 --block_out_channels 4 --lora_rank 2 --norm dnr --window_steps 2"""


def data(batch_size=4, seed=0):
    return torch.randn(batch_size, 1, 8, 8, generator=seeded(seed)) / 2


@pytest.fixture(scope="module")
def unet(build_unet):
    return build_unet(channels=(8, 8), sample_size=8)


@pytest.fixture(scope="module")
def frozen(unet):
    return FrozenDash(unet, NoiseSchedule.variance_preserving(ALPHAS), "epsilon")


@pytest.fixture(scope="module")
def dot(unet):
    torch.manual_seed(1)
    dot = MorseDot.from_dash(unet, 1, (8,), lora_rank=2, norm="dnr")
    with torch.no_grad():
        for name, parameter in dot.named_parameters():
            opens = name.startswith("relay") or name.endswith(".a")
            parameter.add_((0.5 if opens else 0.05) * torch.randn_like(parameter))
        dot.conv_out.weight *= 10  # so that the states make a visible difference
    return dot.eval()


def fake_dash(sample, timestep, return_dict, class_labels):
    shape = (-1, 1, 1, 1)
    moved = torch.tanh(sample.roll(1, -1) + timestep.reshape(shape) / 1000)
    return (moved + 0.1 * class_labels.reshape(shape),)


GUIDED = FrozenDash(fake_dash, NoiseSchedule.variance_preserving(ALPHAS), "epsilon")


def guided_window(num_points=4):
    labels = torch.tensor([0, 1, 2, 3])
    scale = torch.tensor([2.0, 3.0, 4.0, 5.0])
    negative = {"class_labels": torch.tensor([9])}
    conditions = Conditions({"class_labels": labels}, negative, scale)
    return fresh_window(GUIDED, data(), seeded(), num_points, "plans", conditions)


class Counting:
    """Exact but for what its jump point's memory says: how many steps it has made from there."""

    def __init__(self):
        self.seen = []

    def __call__(self, sample, timestep, jump, class_labels):
        count = jump.memory["steps"] = jump.memory.get("steps", 0) + 1
        self.seen.append((count, timestep[0].item(), class_labels.tolist()))
        exact = fake_dash(sample, timestep, False, class_labels)[0]
        return exact - jump.model_output + 0.1 * count


class TestSequences:
    def test_dot_takes_all_steps_of_a_window_in_order(self):
        window, counting = guided_window(), Counting()
        pairs = sequence_pairs(GUIDED, window)
        residuals = sequence_residuals(counting, pairs, 3)
        branches = [9, 0, 9, 1, 9, 2, 9, 3]
        times = window.timesteps[0, 1:].tolist()
        assert counting.seen == [(step, times[step - 1], branches) for step in (1, 2, 3)]
        wrong = pairs.guided(pairs.outputs(residuals)) - pairs.target
        expected = torch.tensor([0.1, 0.2, 0.3]).repeat_interleave(4)
        # Windows are kept in half precision.
        assert_close(wrong, expected[:, None, None, None].expand_as(wrong), rtol=0, atol=2e-2)
        assert torch.equal(pairs.gap, (window.timesteps[:, :1] - window.timesteps[:, 1:]).T.ravel())
        counting.seen.clear()
        sequence_residuals(counting, pairs, 3)
        assert [count for count, *_ in counting.seen] == [1, 2, 3]  # anew at every call

    def test_a_sequence_holds_the_pairs_of_single_steps(self):
        window = guided_window()
        pairs = sequence_pairs(GUIDED, window)
        two = sequence_pairs(GUIDED, replace(
            window, timesteps=window.timesteps[:, [0, 2]], samples=window.samples[:, [0, 2]],
            outputs=window.outputs[:, [0, 2]],
        ))  # fmt: skip
        rows = slice(4, 8)
        for name in ("target", "gap"):
            assert torch.equal(getattr(pairs, name)[rows], getattr(two, name))
        assert torch.equal(pairs.sample.unflatten(0, (-1, 2))[rows].flatten(0, 1), two.sample)

    def test_the_loss_is_over_all_steps_and_goes_back_through_the_states(self, frozen, dot):
        window = fresh_window(frozen, data(), seeded(), 3, "plans")
        pairs = sequence_pairs(frozen, window)
        config = {
            "pretrained_model_name_or_path": "-",
            "output_dir": Path("-"),
            "norm": "dnr",
            "dataset_name": "-",
        }
        config = TrainDotConfig(**config, window_steps=2, loss_weighting="gap", lora_rank=2)
        first = pairs.sample.detach().requires_grad_()
        residuals = sequence_residuals(dot, replace(pairs, sample=first), 2)
        expected = weighted_loss((pairs.base + residuals), pairs, "gap")
        assert torch.equal(sequence_loss(dot, pairs, config), expected)
        later = (residuals[4:] * torch.randn(residuals[4:].shape, generator=seeded(2))).sum()
        gradient = torch.autograd.grad(later, first)[0]
        assert gradient[:4].abs().max() > 0

    def test_ratios_by_step(self):
        batches = [sequence_pairs(GUIDED, guided_window())]

        def reuse(sample, timestep, jump, **conditions):
            return torch.zeros_like(sample)

        assert set(sequence_ratios(reuse, batches, 3).values()) == {1.0}
        found = [sequence_ratios(Counting(), batches, 3) for _ in range(2)]
        assert found[0] == found[1]
        wrong = batches[0].guided(batches[0].base.unflatten(0, (-1, 2))) - batches[0].target
        reused = wrong.square().mean((1, 2, 3)).unflatten(0, (3, 4)).mean(1)
        squared = torch.tensor([0.01, 0.04, 0.09])
        by_step = torch.tensor([found[0][f"sequence_ratio/{step}"] for step in (1, 2, 3)])
        assert_close(by_step, squared / reused, rtol=0.05, atol=1e-4)
        overall = torch.tensor(found[0]["sequence_ratio"])
        assert_close(overall, squared.sum() / reused.sum(), rtol=0.05, atol=1e-4)


def test_validation_starts_anew_for_every_pair(frozen, dot):
    window = fresh_window(frozen, data(), seeded(), 3, "plans")
    batches = [pick_pairs(frozen, window, 4, seeded(1), first=False)]
    assert residual_ratios(dot, batches, 1000) == residual_ratios(dot, batches, 1000)
    before = dot_outputs(dot, batches[0])
    assert (dot_outputs(dot, batches[0]) - before).abs().max() > 1e-3  # as a second step


def test_windows_made_with_dot_are_runs_of_it(frozen, dot):
    timesteps = torch.tensor([[800, 600, 400, 200]]).expand(4, -1)
    first_order = torch.zeros(4).bool()
    window = make_window(frozen, data(), data(seed=1), timesteps, first_order, dot=dot)
    times, first = [800, 600, 400, 200], window.samples[:, 0]
    expected = run_dot(frozen, dot, first, times, "Dooo")
    forgetful = run_dot(frozen, forget(dot), first, times, "Dooo")
    # Windows are made of samples and outputs in half precision.
    difference = (window.samples.transpose(0, 1) - expected[:4]).abs().max()
    assert difference < 0.05 * (forgetful - expected)[:4].abs().max()


def forget(dot):
    return lambda sample, timestep, jump: dot(sample, timestep, replace(jump, memory={}))


def run_dot(frozen, dot, sample, timesteps, plan):
    """All samples of a run of the reference loop with DDIM, the last included."""
    samples = []

    def step(output, sample, timestep, prev_timestep):
        samples.append(sample)
        start, end = (
            signal_and_noise(ALPHAS, torch.tensor(time), sample) if time >= 0 else (1.0, 0.0)
            for time in (timestep, prev_timestep)
        )
        return ddim_step(output, sample, start, end)

    def dash(sample, timestep):
        return frozen.model(sample, timestep).sample

    last = morse_sample(dash, dot, step, sample, timesteps, MorsePlan.from_string(plan))
    return torch.stack([*samples, last])


def test_pictures_in_validation_are_runs_of_it(frozen, dot):
    rows = sample_rows(frozen, dot, (2, 1, 8, 8), num_dash=2, num_dot=4)
    noise = torch.randn(2, 1, 8, 8, generator=seeded())
    timesteps = [round(1000 - index * 1000 / 6) - 1 for index in range(6)]
    expected = run_dot(frozen, dot, noise, timesteps, "DooDoo")[-1]
    forgetful = run_dot(frozen, forget(dot), noise, timesteps, "DooDoo")[-1]
    assert (rows[1] - expected).abs().max() < 0.01 * (forgetful - expected).abs().max()


@pytest.fixture(scope="module")
def base(unet, tmp_path_factory):
    return save_pixels(tmp_path_factory.mktemp("base"), unet)


@pytest.fixture(scope="module")
def arguments(base, data_dir):
    return partial(dot_arguments, OPTIONS, base, data_dir)


@pytest.fixture
def run(arguments, tmp_path):
    def train(name, *options):
        AcceleratorState._reset_state(reset_partial_state=True)
        return train_dot(parse_config(TrainDotConfig, arguments(tmp_path / name, *options)))

    return train


class TestCommand:
    def test_training_opens_the_norms_and_resumes_with_the_same_bits(self, run, tmp_path):
        whole = run("whole")
        assert weights(whole)["down_blocks.0.resnets.0.norm1.a"].abs().max() > 0
        copy_unfinished(whole, tmp_path / "halves", 4)
        assert_same_run(run("halves", "--resume_from_checkpoint", "latest"), whole, 4)

    @pytest.mark.parametrize(
        "options",
        [
            ("--on_policy", "--prune", "0.5"),
            ("--cache_pairs", "7", "--timestep_sampling", "plans"),
        ],
    )
    def test_other_windows(self, run, options):
        folder = run("run", *options, "--validation_steps", "4")
        ratios = json.loads((folder / "validation" / "step-0000004.json").read_text())
        steps = {"sequence_ratio", *(f"sequence_ratio/{step}" for step in (1, 2, 3))}
        assert steps <= ratios.keys() and ratios["residual_ratio"] > 0
        assert MorseDot.from_pretrained(folder).config.norm == "dnr"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--window_steps", "1"), "window_steps is 1.*--window_steps 2 or more"),
            (("--pairs_per_window", "2"), "pairs_per_window is 2"),
            (("--cuda_graphs",), "cuda_graphs is True"),
            (("--history", "1"), "history is 1"),
            (("--distill", "norm"), r"distill is \('norm',\)"),
            (("--norm", "batch"), "invalid choice: 'batch'"),
        ],
    )
    def test_settings_are_checked(self, arguments, tmp_path, options, message, capsys):
        with pytest.raises(SystemExit):
            parse_config(TrainDotConfig, arguments(tmp_path, *options))
        assert re.search(message, capsys.readouterr().err, re.DOTALL)
