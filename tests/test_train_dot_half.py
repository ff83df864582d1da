"""train_dot with frozen networks in half precision."""

import json
import re

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler
from tiny_pipelines import xl_unet
from tiny_text import dit_pipeline, sd3_pipeline, text_pipeline, xl_pipeline
from train_runs import dot_arguments, weights

from morse import MorseDot, enable_morse
from morse.cli import parse_config
from morse.training.frozen import load_frozen_pipeline
from morse.training.loop import TrainDotConfig, train_dot

OPTIONS = """--train_batch_size 3 --max_train_steps 6 --lr_warmup_steps 2 --learning_rate 1e-3
    --checkpointing_steps 8 --validation_steps 0 --validation_images 4 --seed 3
    --num_down_blocks 1 --block_out_channels 4 --lora_rank 2"""
WINDOWS = ("--window_steps", "3", "--timestep_sampling", "plans")
CACHE = (*WINDOWS, "--cache_pairs", "40", "--pairs_per_window", "2")
BFLOAT16 = ("--dtype", "bfloat16", "--mixed_precision", "bf16")
FLOAT16 = ("--dtype", "float16", "--mixed_precision", "fp16")


@pytest.fixture
def arguments(data_dir, tmp_path):
    """A function that gives the command line for a pipeline, and the folder of the result."""

    def give(pipe, *options):
        base = tmp_path / "base"
        if not base.exists():
            pipe.save_pretrained(base)
        named = ("--class_names", "cat", "dog", "emu") if hasattr(pipe, "tokenizer") else ()
        output_dir = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        return dot_arguments(OPTIONS, base, data_dir, output_dir, *named, *options)

    return give


def train(arguments):
    AcceleratorState._reset_state(reset_partial_state=True)  # else precisions can't differ
    folder = train_dot(parse_config(TrainDotConfig, arguments))
    assert {weight.dtype for weight in weights(folder).values()} == {torch.float32}
    ratios = json.loads(next((folder / "validation").glob("*.json")).read_text())
    return folder, ratios["residual_ratio"]


def pixels(build_unet):
    unet = build_unet(channels=(8, 8), sample_size=8, num_class_embeds=3)
    return DDPMPipeline(unet, DDPMScheduler(clip_sample=False))


MAKERS = {
    "DDPM": lambda build_unet: pixels(build_unet),
    "SDXL": lambda build_unet: xl_pipeline(xl_unet()),
    "DiT": lambda build_unet: dit_pipeline(),
    "SD3": lambda build_unet: sd3_pipeline(),
}


@pytest.mark.parametrize(
    "precision", [BFLOAT16, pytest.param(FLOAT16, marks=pytest.mark.gpu)], ids=lambda each: each[1]
)
@pytest.mark.parametrize("kind", MAKERS)
def test_it_learns_as_in_full_precision(arguments, build_unet, kind, precision):
    pipe = MAKERS[kind](build_unet)
    _, full = train(arguments(pipe, *CACHE))
    given = arguments(pipe, *CACHE, *precision)
    folder, half = train(given)
    assert abs(half - full) < 0.02
    device = torch.device("cuda" if precision is FLOAT16 else "cpu")
    frozen = load_frozen_pipeline(parse_config(TrainDotConfig, given), device)
    dtype = getattr(torch, precision[1])
    assert {module.dtype for module in (frozen.dash.model, *frozen.encoder.models)} == {dtype}
    assert frozen.codec is None or frozen.codec.vae.dtype == torch.float32
    enable_morse(pipe, MorseDot.from_pretrained(folder))  # the Dash on disk is its own


@pytest.mark.parametrize(
    "options",
    [
        (*WINDOWS, "--on_policy"),
        (*CACHE, "--history", "1", "--fit_gate"),
        (*CACHE, "--distill", "norm", "scale_kd"),
        (*WINDOWS, "--norm", "dnr"),
    ],
    ids=lambda options: options[-1],
)
def test_options_run(arguments, options):
    _, ratio = train(arguments(text_pipeline(), *options, *BFLOAT16))
    assert 0.5 < ratio < 2


@pytest.mark.parametrize("given", [("--dtype", "float16"), (*FLOAT16[:2], *BFLOAT16[2:])])
def test_autocast_has_to_be_of_the_same_precision(arguments, given, capsys):
    with pytest.raises(SystemExit):
        parse_config(TrainDotConfig, arguments(text_pipeline(), *given))
    assert re.search("dtype is float16 .*give --mixed_precision fp16 too", capsys.readouterr().err)


@pytest.mark.parametrize("more", [(), ("--dtype", "float16")])
def test_autocast_to_float16_needs_a_gpu(more, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    given = dot_arguments(OPTIONS, "b", "d", tmp_path / "run", "--mixed_precision", "fp16", *more)
    with pytest.raises(ValueError, match="mixed_precision is fp16, in which a CPU does not"):
        train_dot(parse_config(TrainDotConfig, given))
    assert not (tmp_path / "run").exists()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_float16_needs_a_gpu(arguments):
    with pytest.raises(ValueError, match="a CPU does not train; give --dtype bfloat16"):
        load_frozen_pipeline(
            parse_config(TrainDotConfig, arguments(text_pipeline(), *FLOAT16)), torch.device("cpu")
        )
