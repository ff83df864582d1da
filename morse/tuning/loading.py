"""A pipeline in the precision that was asked for, and a Dot that is trained in float32."""

from typing import TYPE_CHECKING

import torch

from morse.denoisers import find_denoiser
from morse.dot import MorseDot
from morse.dot.loading import loading_from
from morse.evaluation.bench.loading import load_bare
from morse.pipeline import load_dot
from morse.training.frozen_checks import frozen_dtypes
from morse.tuning.config import TuneDotConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_to_tune(
    config: TuneDotConfig, device: torch.device
) -> tuple["DiffusionPipeline", MorseDot]:
    """Load a pipeline without Morse, as `load_bare` does, and its Dot.

    Raises:
        OSError: If nothing is there, or is not whole; the message names the setting.
        ValueError: As `load_bare`, or if the precision is none that the device trains in.
    """
    dtypes = frozen_dtypes(config.dtype, device)
    name = config.pretrained_model_name_or_path
    with loading_from("pretrained_model_name_or_path", name):
        bare, dot = load_bare(name, config.dot, str(device), dtype=dtypes)
    if config.dtype != "float32":
        # Anew, as that one was rounded to Dash's precision.
        dot = load_dot(dot.config["_name_or_path"], dtype=torch.float32)
        dot.bind(find_denoiser(bare)).takes_dtype = False
    return bare, dot
