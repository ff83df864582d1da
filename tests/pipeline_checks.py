"""What every pipeline with Morse attached has to do."""

import torch

from morse import MorseDot, disable_morse, enable_morse


def make_dot(unet, num_down_blocks=1, **options):
    torch.manual_seed(1)
    dot = MorseDot.from_dash(unet, num_down_blocks, lora_rank=2, **options)
    with torch.no_grad():
        for parameter in dot.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return dot.eval()


def latents(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    options = {"output_type": "latent", "return_dict": False, **kwargs}
    return pipe(generator=generator, **options)[0]


def own_dot(sample, timestep, jump, **conditions):
    """A Dot for any denoiser."""
    return 0.05 * torch.tanh(sample - jump.sample)


def counted(pipe, branches=1):
    run = pipe.last_run
    return run.num_dash / branches, run.num_dot / branches


def check(pipe, dot, steps, length, state_steps=False, branches=1, **kwargs):
    """`steps` are num_inference_steps that make `length` evaluations of the bare pipeline.

    They are to be found by Morse, or stated where other numbers give the same length. `branches`
    says how many calls of the denoiser an evaluation is.
    """
    classes, config = type(pipe), dict(pipe.config)
    stated = {"num_inference_steps": steps} if state_steps else {}
    counts = {"num_dash_steps": 2, "num_dot_steps": length - 2, **stated}
    expected = latents(pipe, num_inference_steps=steps, **kwargs)
    enable_morse(pipe, dot)
    assert torch.equal(latents(pipe, plan="D" * length, **stated, **kwargs), expected)
    assert counted(pipe, branches) == (length, 0)
    assert pipe.last_run.fallbacks == {}
    found = latents(pipe, **counts, **kwargs)
    assert counted(pipe, branches) == (2, length - 2)
    assert pipe.last_run.fallbacks == {}
    assert found.isfinite().all() and not torch.equal(found, expected)
    assert torch.equal(latents(pipe, **counts, **kwargs), found)
    disable_morse(pipe)
    assert type(pipe) is classes and dict(pipe.config) == config
    assert torch.equal(latents(pipe, num_inference_steps=steps, **kwargs), expected)
