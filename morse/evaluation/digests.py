"""SHA-256 of files and networks, by which results tell what they were made with."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import ConfigMixin, DiffusionPipeline

    from morse.dot import MorseDot


def file_sha256(*files: Path) -> str:
    """Return the SHA-256 of files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)  # adds to it
    return digest.hexdigest()


def state_sha256(network: nn.Module) -> str:
    """Return the SHA-256 of a network's parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def dot_sha256(dot: "MorseDot") -> str:
    """Return the SHA-256 of a Dot's config, saved plans included, and its weights."""
    return hashlib.sha256((_config_text(dot) + state_sha256(dot)).encode()).hexdigest()


def networks_sha256(
    pipe: "DiffusionPipeline", but: Collection[nn.Module | None] = ()
) -> dict[str, str]:
    """Return the SHA-256 of each network of a pipeline, by its name; `but` are left out."""
    return {
        name: state_sha256(part)
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and part not in but
    }


def components_sha256(pipe: "DiffusionPipeline") -> dict[str, str]:
    """Return the SHA-256 of each network of a pipeline, and of its scheduler's config.

    Returns:
        Such as {"unet_sha256": ..., "vae_sha256": ..., "scheduler_sha256": ...}.
    """
    found = {f"{name}_sha256": value for name, value in networks_sha256(pipe).items()}
    scheduler = hashlib.sha256(_config_text(pipe.scheduler).encode()).hexdigest()
    return {**found, "scheduler_sha256": scheduler}


def _config_text(part: "ConfigMixin") -> str:
    config = {name: value for name, value in part.config.items() if name[0] != "_"}  # no paths
    return json.dumps(config, sort_keys=True, default=str)
