"""SHA-256 of files and networks, by which results tell what they were made with."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
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
    config = {name: value for name, value in dot.config.items() if name[0] != "_"}  # no paths
    told = json.dumps(config, sort_keys=True, default=str) + state_sha256(dot)
    return hashlib.sha256(told.encode()).hexdigest()
