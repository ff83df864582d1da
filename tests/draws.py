"""Seeded inputs."""

import torch


def draw(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers; draws of different seeds are independent."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
