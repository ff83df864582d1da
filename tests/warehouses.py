"""Small warehouses with a few layers each, for tests of KernelWarehouse."""

import torch
from torch import nn

from morse.modules import Warehouse, set_temperature

HALVES = {"cell_in_ratio": 0.5, "cell_out_ratio": 0.5}
# Settings of the warehouse, and its 2d layers: in, out, kernel, options.
THREE = {"kernel_size": 3, "padding": 1}
CASES = {
    "one": ({}, [(8, 8, THREE), (8, 16, {"kernel_size": (3, 1), "bias": True})]),
    "double": ({"budget": 2}, [(8, 8, THREE | {"stride": 2}), (8, 8, {"kernel_size": 1})]),
    "half": ({"budget": 0.5, **HALVES}, [(8, 8, THREE), (8, 16, {"kernel_size": 1})]),
    "quarter": ({"budget": 0.25, **HALVES}, [(8, 8, THREE), (8, 8, THREE | {"dilation": 2})]),
    "whole": ({"budget": 2, **HALVES, "spatial_partition": False}, [(8, 12, THREE)] * 2),
    "grouped": ({**HALVES}, [(8, 16, THREE | {"groups": 4}), (4, 8, THREE | {"groups": 2})]),
    "basis": ({"basis_ratio": 0.25}, [(8, 8, THREE), (8, 8, THREE), (8, 8, {"kernel_size": 1})]),
    "alone": ({"basis_ratio": 0.5, "budget": 0.5, **HALVES}, [(8, 8, THREE)]),
}


def make(case, dtype=torch.float32, tau=0.0, seed=0, **more):
    """A network of a case's warehouse and layers with every parameter drawn, in eval mode."""
    torch.manual_seed(seed)
    settings, layers = CASES[case]
    warehouse = Warehouse(**({"norm": "layer"} | settings | more))
    layers = [warehouse.conv2d(i, o, **options) for i, o, options in layers]
    warehouse.build()
    network = nn.ModuleDict({"bank": warehouse, "layers": nn.ModuleList(layers)}).to(dtype)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    set_temperature(network, tau)
    return network.eval()


def draw(layer, batch=3, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, layer.in_channels, 7, 6, generator=generator, dtype=dtype)
