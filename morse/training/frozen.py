"""The pipeline of a training run, with its Dash: evaluated and never changed."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from morse.capture import map_tensors
from morse.dot.guidance import DotGuidance
from morse.dot.loading import loading_from
from morse.history import extrapolate
from morse.spaces import BaseSpace, Rates, rebase
from morse.training.conditions import ConditionEncoder, make_encoder
from morse.training.frozen_checks import (
    check_channels,
    check_one_pass,
    choose_guidance,
    choose_resolution,
    frozen_dtypes,
)
from morse.training.guidance import UNCONDITIONAL, Conditions, each_branch, guide
from morse.training.latents import LatentCodec, find_codec
from morse.training.schedule import NoiseSchedule, read_schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from morse.training.config import TrainDotConfig

_LARGE_DASH, _LARGE_SIDE = 100_000_000, 512


@dataclass(frozen=True)
class FrozenDash:
    """A denoiser with its noise schedule; calling it gives the bare output of every branch.

    Attributes:
        model: The denoiser, frozen and in evaluation mode.
        schedule: On the denoiser's device.
        prediction_type: What it predicts.
        base_space: What of its latest estimate Dot's residual is added to.
        history: How many estimates before it Dot uses; see `MorseDot`.
        extrapolation_cap: How far the base follows them; see `MorseDot`.
        guidance: What Dot corrects under guidance; see `MorseDot`.
        dtype: The precision of its weights.
    """

    model: nn.Module
    schedule: NoiseSchedule
    prediction_type: str
    base_space: BaseSpace = "raw"
    history: int = 0
    extrapolation_cap: float = 1.0
    guidance: DotGuidance = "branches"
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def __call__(
        self, sample: Tensor, position: Tensor, conditions: Conditions = UNCONDITIONAL
    ) -> Tensor:
        """Evaluate at `sample` (B, C, H, W) and positions (B,), giving (B, G, C_out, H, W)."""
        branches = conditions.branches
        output = self.model(
            each_branch(sample, branches).to(self.dtype),
            timestep=each_branch(self.schedule.timesteps[position], branches),
            return_dict=False,
            **map_tensors(conditions.inputs(), self._rounded),
        )[0]
        return output.float().unflatten(0, (-1, branches))

    def _rounded(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value

    def autocast(self) -> AbstractContextManager:
        """Give what a Dot runs in that shares weights of less precision than its own."""
        if self.dtype == torch.float32:
            return nullcontext()  # whatever is in force stays so
        return torch.autocast(self.schedule.device.type, self.dtype)

    def guided(self, outputs: Tensor, guidance_scale: Tensor | None, like: Tensor) -> Tensor:
        """Combine branches (B, G, C_out, H, W) into what the solver steps with, shaped as `like`.

        A learned variance, in the channels beyond those of `like`, is not part of it: diffusers'
        pipelines drop it before the scheduler's step.
        """
        return guide(outputs[:, :, : like.shape[1]], guidance_scale)

    def base(
        self, outputs: Tensor, jump: tuple[Tensor, Tensor], here: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Carry the outputs of a jump point to another, as `morse.estimates` does when sampling.

        Args:
            outputs: (B, G, C_out, H, W).
            jump: The jump point's sample, (B, C, H, W), and position, (B,).
            here: The same of the point where Dot is evaluated.

        Returns:
            A row for each branch, (B * G, C_out, H, W).
        """
        branches, flat = outputs.shape[1], outputs.flatten(0, 1)
        if self.base_space == "raw":
            return flat
        points = (self._rows(*point, branches) for point in (jump, here))
        return rebase(self.base_space, flat, *points, self.prediction_type)

    def extrapolated(
        self,
        earlier: tuple[Tensor, Tensor, Tensor],
        jump: tuple[Tensor, Tensor, Tensor],
        here: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Give Dot's base and what it sees of the line, as `morse.history.extrapolate` does.

        Args:
            earlier: Outputs, sample and position of the estimate before the latest, as for `base`;
                the jump point's own where there is none.
            jump: The same of the jump point.
            here: Sample and position where Dot is evaluated.
        """
        branches = jump[0].shape[1]
        latest, before = (
            (outputs.flatten(0, 1), *self._rows(*point, branches))
            for outputs, *point in (jump, earlier)
        )
        there, cap = self._rows(*here, branches), self.extrapolation_cap
        return extrapolate(self.base_space, latest, before, there, self.prediction_type, cap)

    def _rows(self, sample: Tensor, position: Tensor, branches: int) -> tuple[Tensor, Rates]:
        rows = each_branch(sample, branches)
        return rows, self.schedule.rates(each_branch(position, branches), rows)


@dataclass(frozen=True)
class FrozenPipeline:
    """A pretrained pipeline, as far as training needs it.

    Attributes:
        dash: Its denoiser.
        codec: Its autoencoder; None where it works on pixels.
        encoder: How it encodes what it is conditioned on.
        resolution: Height and width of images.
        image_channels: Their channels.
        guidance_scale: Lowest and highest scale to train for; (1, 1) for no guidance.
    """

    dash: FrozenDash
    codec: LatentCodec | None
    encoder: ConditionEncoder
    resolution: int
    image_channels: int
    guidance_scale: tuple[float, float]

    @property
    def device(self) -> torch.device:
        """The device that all of it is on."""
        return self.dash.schedule.device

    @property
    def sample_size(self) -> tuple[int, int]:
        """Height and width of the denoiser's samples."""
        side = self.resolution // (1 if self.codec is None else self.codec.factor)
        return side, side

    def batch_size(self, usual: int, large: int) -> int:
        """Give how many samples to evaluate Dash on at a time, by what memory holds.

        Args:
            usual: For small denoisers.
            large: A power of two for those such as Stable Diffusion's; for images beyond 512 x 512
                it is halved until it has no more pixels.
        """
        if self.dash.model.num_parameters() <= _LARGE_DASH:
            return usual
        pixels = large * _LARGE_SIDE**2
        while large > 1 and large * self.resolution**2 > pixels:
            large //= 2
        return large

    def to_images(self, samples: Tensor) -> Tensor:
        """Turn samples of the denoiser's kind into images in [0, 1]."""
        images = samples if self.codec is None else self.codec.decode(samples)
        return (images.float() / 2 + 0.5).clamp(0, 1)


def load_frozen_pipeline(config: "TrainDotConfig", device: torch.device) -> FrozenPipeline:
    """Load the pipeline that `config` names and freeze it.

    Raises:
        ValueError: If its precision is none that the device trains in, or it is not handled.
    """
    from morse.pipeline import MorsePipeline

    dtypes = frozen_dtypes(config.dtype, device)
    name = config.pretrained_model_name_or_path
    with loading_from("pretrained_model_name_or_path", name):
        pipe = MorsePipeline.from_pretrained(name, dtype=dtypes).to(device)
    found = freeze_pipeline(pipe, config.resolution, config.guidance_scale, config.base_space)
    if config.guidance == "guided":
        check_one_pass(pipe, found.guidance_scale)
    names = ("history", "extrapolation_cap", "guidance")
    return replace(found, dash=replace(found.dash, **{n: getattr(config, n) for n in names}))


def freeze_pipeline(
    pipe: "DiffusionPipeline",
    resolution: int | None = None,
    guidance_scale: tuple[float, ...] | None = None,
    base_space: BaseSpace | None = None,
) -> FrozenPipeline:
    """Take from a pipeline what training needs.

    Args:
        pipe: The pipeline, on its device; its weights require gradients no more.
        resolution: Height and width of images; what the denoiser is made for if None.
        guidance_scale: Lowest and highest scale; None for `frozen_checks.DEFAULT_GUIDANCE` where
            the pipeline has something to guide away from.
        base_space: See `MorseDot`; None for "raw", which deterministic schedulers use.

    Raises:
        ValueError: If its noise schedule, autoencoder, conditions or input are not handled, or
            images of that size.
    """
    from morse.denoisers import find_denoiser

    denoiser = find_denoiser(pipe).requires_grad_(False).eval()
    codec = find_codec(pipe)
    check_channels(denoiser, codec)
    factor = 1 if codec is None else codec.factor
    patch_size = denoiser.config.get("patch_size") or 1
    resolution = choose_resolution(resolution, denoiser, factor, patch_size)
    patches = (resolution // factor // patch_size) ** 2
    schedule, prediction_type = read_schedule(pipe.scheduler, patches)
    schedule, base = schedule.to(denoiser.device), base_space or "raw"
    dash = FrozenDash(denoiser, schedule, prediction_type, base, dtype=denoiser.dtype)
    encoder = make_encoder(pipe, denoiser, resolution)
    channels = denoiser.config.in_channels if codec is None else codec.image_channels
    scales = choose_guidance(guidance_scale, encoder)
    return FrozenPipeline(dash, codec, encoder, resolution, channels, scales)
