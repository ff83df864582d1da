"""Images to latents and back, by a pipeline's own autoencoder."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_BATCH_SIZE = 32


@dataclass(frozen=True)
class LatentCodec:
    """An AutoencoderKL and what its pipeline does to its latents.

    Latents are the means of the encoder's distributions: they are the same in every epoch, so that
    they can be cached, and what sampling from the distributions adds is far below the noise that
    a window starts with. Later points of a window follow Dash, into its own distribution.

    Attributes:
        vae: Frozen and in evaluation mode.
    """

    vae: nn.Module

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """What to subtract from the encoder's latents and then to multiply them with."""
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        scale = torch.tensor(config.scaling_factor, dtype=like.dtype, device=like.device)
        if mean is not None and std is not None:  # one each for every channel, as SDXL takes them
            mean, std = (like.new_tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))
            return mean, scale / std
        return like.new_tensor(config.get("shift_factor") or 0.0), scale

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1] as Dash gets them, (B, C', H / f, W / f)."""
        with torch.autocast(images.device.type, enabled=False):
            latents = torch.cat(
                [self.vae.encode(chunk).latent_dist.mode() for chunk in images.split(_BATCH_SIZE)]
            )
        shift, scale = self._moments(latents)
        return (latents - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [-1, 1]; the inverse of `encode`."""
        shift, scale = self._moments(latents)
        with torch.autocast(latents.device.type, enabled=False):
            chunks = (latents / scale + shift).split(_BATCH_SIZE)
            return torch.cat([self.vae.decode(chunk, return_dict=False)[0] for chunk in chunks])

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.vae.config.in_channels

    @property
    def factor(self) -> int:
        """How many times smaller latents are than images, in height and width."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def find_codec(pipe: "DiffusionPipeline") -> LatentCodec | None:
    """Freeze a pipeline's autoencoder; None where it works on pixels.

    Raises:
        ValueError: If it has an autoencoder of another kind, such as LDMPipeline's `vqvae`.
    """
    if getattr(pipe, "vae", None) is not None:
        return LatentCodec(pipe.vae.requires_grad_(False).eval())
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and hasattr(part, "encode") and hasattr(part, "decode"):
            raise ValueError(
                f"{type(pipe).__name__} has a {type(part).__name__} as {name}, but train_dot knows "
                "no autoencoder except `vae`; give a pipeline that has one, or works on pixels."
            )
    return None
