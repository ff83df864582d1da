"""A tiny pipeline with a weight-shared Dot, put through what users do with pipelines."""

import threading
from functools import cache

import diffusers
import torch
from tiny_pipelines import stable_diffusion, text_inputs, text_unet

from morse import MorseDot, disable_morse, enable_morse

PLAN = "DoD"


def text_pipe(**options):
    """A StableDiffusionPipeline with its own copy of the same denoiser each time."""
    return stable_diffusion(diffusers.StableDiffusionPipeline, text_unet(), **options)


def trained_dot(unet, lora_scale=0.15):
    """A Dot with weights as after some training; its LoRA alone changes the image visibly."""
    torch.manual_seed(1)
    dot = MorseDot.from_dash(unet, 1, lora_rank=2)
    with torch.no_grad():
        for name, parameter in dot.named_parameters():
            scale = lora_scale if "lora_B" in name else 0.02
            parameter.add_(scale * torch.randn_like(parameter))
    return dot.eval()


def latents(pipe, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    usual = {"generator": generator, "output_type": "latent", "height": 16, "width": 16}
    return pipe(**{**text_inputs(), **usual, **kwargs})[0]


def planned(pipe, plan=PLAN, **kwargs):
    """Latents of a planned call, whose counts are checked."""
    found = latents(pipe, plan=plan, **kwargs)
    assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (plan.count("D"), plan.count("o"))
    assert pipe.last_run.fallbacks == {}
    assert found.isfinite().all()
    return found


def in_two_threads(work):
    """Call `work(0)` and `work(1)` at the same time, and wait for both."""
    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def difference(one, other):
    return float((one.double() - other.double()).abs().max())


def check_treated(treat, merge_lora=True, before=True, after=True, make_pipe=text_pipe, **kwargs):
    """Treat a pipeline before and after Morse is attached; returns what it draws with Dot.

    All-Dash equals the bare treated pipeline bit for bit, calls repeat, the order changes nothing,
    and the bare pipeline is back after `disable_morse`.
    """
    bare = make_pipe()
    dot = trained_dot(bare.unet)
    treat(bare)
    expected = latents(bare, num_inference_steps=len(PLAN), **kwargs)
    images = []
    for treat_first in [True] * before + [False] * after:
        pipe = make_pipe()
        own = MorseDot.from_config(dot.config)
        own.load_state_dict(dot.state_dict())
        if treat_first:
            treat(pipe)
        enable_morse(pipe, own, merge_lora)
        if not treat_first:
            planned(pipe, **kwargs)  # so that nothing is set up for the first time afterwards
            treat(pipe)
        assert torch.equal(planned(pipe, "D" * len(PLAN), **kwargs), expected)
        images.append(planned(pipe, **kwargs))
        assert torch.equal(planned(pipe, **kwargs), images[-1])
        assert difference(images[-1], expected) > 1e-3
        disable_morse(pipe)
        assert torch.equal(latents(pipe, num_inference_steps=len(PLAN), **kwargs), expected)
    assert all(torch.equal(images[0], image) for image in images)
    return images[0]


@cache
def untreated(merge_lora=True, make_pipe=text_pipe):
    return check_treated(lambda pipe: None, merge_lora, after=False, make_pipe=make_pipe)
