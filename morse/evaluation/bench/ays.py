"""Align Your Steps (Sabour et al. 2024, arXiv 2404.14507): timesteps tuned for one model.

The authors give eleven noise levels for each model: those of ten timesteps, which diffusers has in
`AysSchedules`, and the least of the model's schedule, .029 for Stable Diffusion 1.5 and XL. For
other numbers of steps they interpolate all eleven log-linearly to one level more than there are
steps, and put 0 in the place of the last, so that it is never evaluated.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.schedulers import AysSchedules
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# The name in `AysSchedules` of a pipeline class and the width of its prompts' embeddings.
TUNED = {
    ("StableDiffusionPipeline", 768): "StableDiffusion",
    ("StableDiffusionXLPipeline", 2048): "StableDiffusionXL",
}
# Settings that lay noise levels otherwise: with one of them diffusers refuses timesteps.
_OTHER_GRIDS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
)


def ays_name(pipe: "DiffusionPipeline") -> str | None:
    """Return the name that `AysSchedules` has for a pipeline's model; None for none.

    A model is known by its class and width: a fine-tuned one keeps its timesteps.
    """
    config = getattr(getattr(pipe, "unet", None), "config", {})
    return TUNED.get((type(pipe).__name__, config.get("cross_attention_dim")))


def ays_timesteps(name: str, steps: int, alphas_cumprod: Tensor) -> list[int]:
    """Return `steps` decreasing timesteps for a model, the authors' own for 10.

    Args:
        name: As from `ays_name`.
        steps: At least 1.
        alphas_cumprod: Of the noise schedule, (T,).
    """
    alphas = alphas_cumprod.double().numpy()
    log_sigmas = np.log((1 - alphas) / alphas) / 2  # increasing in the timestep
    tuned = log_sigmas[[*AysSchedules[f"{name}Timesteps"], 0]]
    places, wanted = np.linspace(0, 1, len(tuned)), np.linspace(0, 1, steps + 1)[:-1]
    logs = np.interp(wanted, places, tuned)
    found = np.interp(logs, log_sigmas, np.arange(len(alphas))).round().astype(int).tolist()
    for index in range(1, steps):  # rounding must not give two steps the same timestep
        found[index] = max(min(found[index], found[index - 1] - 1), steps - 1 - index)
    return found


class AysScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver++ at the timesteps of Align Your Steps."""

    model_name: str

    @classmethod
    def of(cls, scheduler: DPMSolverMultistepScheduler, model_name: str) -> "AysScheduler":
        """Make one with another scheduler's settings, bar its grid, for a name of `ays_name`."""
        made = cls.from_config(scheduler.config, **dict.fromkeys(_OTHER_GRIDS, False))
        made.model_name = model_name
        return made

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Lay out the tuned grid, or the one that is given."""
        if timesteps is None:
            timesteps = ays_timesteps(self.model_name, num_inference_steps, self.alphas_cumprod)
        super().set_timesteps(timesteps=timesteps, device=device)
