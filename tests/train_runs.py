"""Short trainings of tiny Dots: what they are given, and what two of them have in common."""

import shutil

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def save_pixels(folder, unet):
    """Save a pipeline that starts from noise alone; returns the folder."""
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def dot_arguments(options, base, data_dir, output_dir, *more):
    """Give the words of train_dot's command line; `options` are some of them in one text."""
    return ["--pretrained_model_name_or_path", str(base), "--train_data_dir", str(data_dir),
            "--output_dir", str(output_dir), *options.split(), *more]  # fmt: skip


def weights(folder):
    return load_file(folder / WEIGHTS)


def copy_unfinished(run, folder, step):
    """Copy a run as it was before the checkpoint after `step` updates, its last."""
    ignored = shutil.ignore_patterns(f"checkpoint-{step}", "config.json", WEIGHTS)
    return shutil.copytree(run, folder, ignore=ignored)


def assert_same_run(one, other, step, result="."):
    """Compare the folders `result` and the checkpoints after `step` updates, bit for bit."""
    parts = [f"checkpoint-{step}/{name}.safetensors" for name in ("model", "optimizer", "ema")]
    for file in (f"{result}/{WEIGHTS}", *parts):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
