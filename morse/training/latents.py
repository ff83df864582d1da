"""Images to latents and back, by a pipeline's own autoencoder."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_MOST_IMAGES, _IMAGE_SIDE = 32, 128
# Of the autoencoder's config, what a codec reads.
_CONSTANTS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_NEEDED = ("in_channels", "block_out_channels", "latent_channels", "scaling_factor")


def _chunk_size(height: int, width: int) -> int:
    """Give how many images of this size go through the autoencoder at a time.

    32 of up to 128 x 128 pixels. Its features at full size take memory by the pixel: a chunk that
    is right for small images does not fit a GPU with those of Stable Diffusion.
    """
    return min(_MOST_IMAGES, max(1, _MOST_IMAGES * _IMAGE_SIDE**2 // (height * width)))


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
            chunks = images.split(_chunk_size(*images.shape[-2:]))
            latents = torch.cat([self.vae.encode(chunk).latent_dist.mode() for chunk in chunks])
        shift, scale = self._moments(latents)
        return (latents - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [-1, 1]; the inverse of `encode`."""
        shift, scale = self._moments(latents)
        size = _chunk_size(*(side * self.factor for side in latents.shape[-2:]))
        with torch.autocast(latents.device.type, enabled=False):
            chunks = (latents / scale + shift).split(size)
            return torch.cat([self.vae.decode(chunk, return_dict=False)[0] for chunk in chunks])

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.vae.config.in_channels

    @property
    def factor(self) -> int:
        """How many times smaller latents are than images, in height and width."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def constants(self) -> dict[str, object]:
        """What latents depend on besides the weights, as JSON has it."""
        found = {name: self.vae.config.get(name) for name in _CONSTANTS}
        return {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in found.items()}


def find_codec(pipe: "DiffusionPipeline") -> LatentCodec | None:
    """Freeze a pipeline's autoencoder; None where it works on pixels.

    Raises:
        ValueError: If it has an autoencoder of another kind, such as LDMPipeline's `vqvae`,
            SanaPipeline's AutoencoderDC or WanPipeline's, which is of videos.
    """
    if getattr(pipe, "vae", None) is not None:
        _check_kind(pipe)
        return LatentCodec(pipe.vae.requires_grad_(False).eval())
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and hasattr(part, "encode") and hasattr(part, "decode"):
            raise ValueError(
                f"{type(pipe).__name__} has a {type(part).__name__} as {name}, but train_dot knows "
                "no autoencoder except `vae`; give a pipeline that has one, or works on pixels."
            )
    return None


def _check_kind(pipe: "DiffusionPipeline") -> None:
    """Check that a pipeline's `vae` is used as an AutoencoderKL is, by what it is made of."""
    vae = pipe.vae
    complete = all(vae.config.get(name) is not None for name in _NEEDED)
    last = getattr(getattr(vae, "encoder", None), "conv_out", None)
    # It gives means and variances, for `latent_dist`, and of pictures.
    channels = last.out_channels if isinstance(last, nn.Conv2d) else None
    if complete and channels == 2 * vae.config.latent_channels:
        return
    raise ValueError(
        f"{type(pipe).__name__} has a {type(vae).__name__} as vae, but train_dot knows no "
        "autoencoder except AutoencoderKL; give a pipeline that has one, or works on pixels."
    )
