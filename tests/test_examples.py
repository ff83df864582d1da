"""Every example of pipelines/ runs, on tiny random models."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_vae, xl_unet
from tiny_text import dit_pipeline, text_pipeline, xl_pipeline

from morse import MorseDot

BUDGET = ("--lsd", "3")


def save_with_dot(pipe, denoiser, folder):
    pipe.save_pretrained(folder / "model")
    dot = MorseDot.from_dash(denoiser, num_down_blocks=1, lora_rank=2)
    dot.register_to_config(speed_ratio=4.0)
    dot.save_pretrained(folder / "dot")
    return folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    pipe = text_pipeline()
    return save_with_dot(pipe, pipe.unet, tmp_path_factory.mktemp("text"))


@pytest.fixture
def run(tmp_path, capsys):
    """A function that runs an example and checks its picture and what it prints."""

    def run(name, *arguments, folder=None, size=(8, 8)):
        output = tmp_path / "picture.png"
        given = () if folder is None else ("--model", folder / "model", "--dot", folder / "dot")
        arguments = [*given, *arguments, "--output", output]
        importlib.import_module(f"pipelines.{name}").main([str(value) for value in arguments])
        with Image.open(output) as image:
            assert image.size == size
        summary = capsys.readouterr().out
        assert "o" in summary.split("plan", 1)[1].split()[0] and "fallbacks    none" in summary
        return summary

    return run


def write_picture(folder):
    Image.fromarray(np.full((8, 8, 3), 120, np.uint8)).save(folder / "input.png")
    return folder / "input.png"


@pytest.mark.slow
def test_unconditional(run):
    run("unconditional", "--lsd", "6", size=(256, 64))


def test_stable_diffusion(run, text_folder):
    run("stable_diffusion", "--prompt", "a boat", *BUDGET, folder=text_folder)


@pytest.mark.slow
def test_sdxl_lcm(run, tmp_path):
    torch.manual_seed(0)
    guided = xl_unet(time_cond_proj_dim=16)
    pipe = xl_pipeline(guided)
    save_with_dot(pipe, guided, tmp_path)
    unet = tmp_path / "model" / "unet"
    run("sdxl_lcm", "--unet", unet, "--prompt", "a boat", *BUDGET, folder=tmp_path)


def test_dit(run, tmp_path):
    pipe = dit_pipeline()
    save_with_dot(pipe, pipe.transformer, tmp_path)
    run("dit", "--class_label", "7", *BUDGET, folder=tmp_path)


def test_train_your_own(tmp_path, capsys, make_pipe, monkeypatch):
    """A model with the scheduler of a `DDPMPipeline`, which adds noise, is sampled with its Dot."""
    from pipelines.train_your_own import main

    def know(pipe):  # of tiny models Dot is hardly faster
        pipe.speed_ratio = 4.0

    monkeypatch.setattr("morse.calls.MorseCalls.measure_speed_ratio", know)
    make_pipe("ddpm").save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number in range(3):
        picture = Image.fromarray(np.full((16, 16), 60 * number, np.uint8))
        picture.save(tmp_path / "images" / f"{number}.png")
    options = {"model": "model", "images": "images", "output_dir": "dot"}
    arguments = [part for name, at in options.items() for part in (f"--{name}", tmp_path / at)]
    main([*map(str, arguments), "--steps", "2"])
    assert (tmp_path / "dot" / "sample.png").is_file()
    plan = capsys.readouterr().out.rsplit("plan", 1)[1].split()[0]
    assert "D" in plan and "o" in plan


class TestImages:
    """The pipelines that take a picture work in three colours."""

    @pytest.fixture(scope="class")
    def colour_folder(self, tmp_path_factory):
        pipe = text_pipeline()
        pipe.register_modules(vae=tiny_vae())
        return save_with_dot(pipe, pipe.unet, tmp_path_factory.mktemp("colour"))

    def test_image_to_image(self, run, colour_folder, tmp_path):
        image = write_picture(tmp_path)
        arguments = ("--image", image, "--prompt", "a boat", *BUDGET)
        run("image_to_image", *arguments, folder=colour_folder)

    def test_controlnet(self, run, colour_folder, tmp_path):
        from diffusers import ControlNetModel, UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(colour_folder / "model" / "unet")
        controlnet = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(4, 4), load_weights_from_unet=False
        )
        controlnet.save_pretrained(tmp_path / "controlnet")
        options = {"--image": write_picture(tmp_path), "--controlnet": tmp_path / "controlnet"}
        arguments = [part for pair in options.items() for part in pair]
        run("controlnet", *arguments, "--prompt", "a boat", *BUDGET, folder=colour_folder)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_custom_pipeline(tmp_path, sparse):
    from diffusers import DiffusionPipeline

    from morse import MorsePipeline

    text = text_pipeline()
    dot = MorseDot.from_dash(text.unet, num_down_blocks=1, lora_rank=2)
    dot.register_to_config(speed_ratio=4.0, sparse=sparse)
    expected = MorsePipeline.from_pipe(text, dot)
    expected.save_pretrained(tmp_path)
    place = Path(__file__).parents[1] / "pipelines" / "morse_pipeline.py"
    found = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(place), trust_remote_code=True
    )
    images = [
        pipe("a boat", lsd=3, generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipe in (expected, found)
    ]
    assert found.last_run.num_dot == expected.last_run.num_dot > 0
    np.testing.assert_allclose(images[0], images[1], atol=1e-5)  # one has its LoRA merged
