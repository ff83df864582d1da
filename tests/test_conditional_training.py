"""Training for guided pipelines evaluates Dash and Dot just as the pipelines do when sampling."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from tiny_pipelines import text_unet, xl_unet
from tiny_text import dit_pipeline, grey_vae, sd3_pipeline, text_pipeline, xl_pipeline
from torch.testing import assert_close

from morse import MorseDot, enable_morse
from morse.plan import MorsePlan
from morse.spaces import signal_and_noise
from morse.training.conditions import ConditionTable
from morse.training.frozen import freeze_pipeline
from morse.training.guidance import Conditions, draw_guidance_scale, guide
from morse.training.latents import LatentCodec
from morse.training.pairs import dot_outputs, weighted_loss
from morse.training.schedule import NoiseSchedule
from morse.training.validation import sample_rows
from morse.training.windows import fresh_window, pick_pairs

PROMPTS = ["cat", "dog"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_dot(dash, **options):
    torch.manual_seed(1)
    dot = MorseDot.from_dash(dash, 1, (4,), lora_rank=2, **options)
    with torch.no_grad():
        for parameter in dot.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return dot.eval()


def plain_dot(sample, timestep, jump, class_labels=None, **conditions):
    """Depends on all that a Dot is given; for denoisers of any kind."""
    shape = (-1, 1, 1, 1)
    moved = 0.1 * torch.tanh(sample - jump.sample)
    moved = moved * (1 + 0.001 * (jump.timestep - timestep).reshape(shape))
    if class_labels is not None:
        moved = moved + 0.01 * torch.sin(class_labels.reshape(shape).float())
    for value in conditions.values():
        if isinstance(value, torch.Tensor):
            moved = moved + 0.01 * value.float().flatten(1).mean(1).reshape(shape)
    return moved.repeat(1, jump.model_output.shape[1] // moved.shape[1], 1, 1)


def conditions_of(frozen, values, scale):
    table = ConditionTable(frozen.encoder, values)
    return table.look_up(torch.arange(len(values)), None if scale is None else torch.tensor(scale))


class TestSamplingIsTheSame:
    """`sample_rows` runs on what training runs on: Dash's branches, their base, Dot's outputs."""

    def check(self, monkeypatch, pipe, dot, call, values, scale=3.0, base_space=None):
        frozen = freeze_pipeline(pipe, base_space=base_space)
        scales = None if scale == 1 else [scale] * 2
        shape = (2, 4, 4, 4)
        rows = sample_rows(
            frozen.dash, dot, shape, conditions_of(frozen, values, scales), num_dash=4, num_dot=6
        )
        dot.base_space = base_space
        enable_morse(pipe, dot)
        latents, step = [], type(pipe.scheduler).step

        def recorded(scheduler, *args, **kwargs):
            found = step(scheduler, *args, **kwargs)
            latents.append(found[0] if isinstance(found, tuple) else found.prev_sample)
            return found

        monkeypatch.setattr(type(pipe.scheduler), "step", recorded)
        for row, plan in enumerate((MorsePlan.uniform(10, 0), MorsePlan.uniform(4, 6))):
            images = pipe(**call, plan=plan, guidance_scale=scale, generator=seeded()).images
            # Conditions are kept in half precision.
            tolerance = {"rtol": 2e-3, "atol": 2e-3 * rows[row].std().item()}
            assert_close(rows[row], latents[-1][:2], **tolerance)
            assert_close(frozen.to_images(rows[row]), images, rtol=1e-2, atol=5e-3)
        assert pipe.last_run.num_dot == 6 and not pipe.last_run.fallbacks
        # Were Dot's part left out, or the guidance, the tolerances would show it.
        assert (rows[0] - rows[1]).abs().mean() > 0.02 * rows[0].abs().mean()
        other = sample_rows(
            frozen.dash, dot, shape, conditions_of(frozen, values, [1.0] * 2), num_dash=4, num_dot=6
        )
        assert scale == 1 or (other - rows).abs().amax() > 20 * tolerance["atol"]

    @pytest.mark.parametrize(
        ("prediction_type", "base_space", "scale"),
        [("epsilon", None, 3.0), ("v_prediction", "x0", 5.0), ("v_prediction", "raw", 1.0)],
    )
    def test_stable_diffusion(self, monkeypatch, prediction_type, base_space, scale):
        pipe = text_pipeline(prediction_type=prediction_type)
        dot = random_dot(pipe.unet)
        call = {"prompt": PROMPTS, "output_type": "pt"}
        self.check(monkeypatch, pipe, dot, call, PROMPTS, scale, base_space)

    def test_xl(self, monkeypatch):
        pipe = xl_pipeline(xl_unet())
        self.check(monkeypatch, pipe, random_dot(pipe.unet), {"prompt": PROMPTS, "output_type": "pt"}, PROMPTS)

    def test_dit(self, monkeypatch):
        call = {"class_labels": [3, 7], "num_inference_steps": 10, "output_type": "pt"}
        self.check(monkeypatch, dit_pipeline(), plain_dot, call, [3, 7])

    @pytest.mark.parametrize("base_space", [None, "x0"])
    def test_sd3(self, monkeypatch, base_space):
        sigmas = [1 - index / 10 for index in range(10)]
        call = {"prompt": PROMPTS, "output_type": "pt", "sigmas": sigmas}
        self.check(monkeypatch, sd3_pipeline(), plain_dot, call, PROMPTS, base_space=base_space)
