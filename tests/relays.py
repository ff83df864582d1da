"""Modules with drawn parameters, for tests of DNR."""

import torch
from torch import nn

BASES = ["group", "batch", "none"]


def drawn(module, seed=0, dtype=torch.float64):
    """The module with every parameter and running statistic drawn."""
    torch.manual_seed(seed)
    module = module.to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, buffer in module.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return module
