"""Ways to make a trained network smaller, each from its own paper; torch and safetensors."""

from morse.compression.network_surgery import NetworkSurgery
from morse.compression.sparse import load_sparse, save_sparse

__all__ = ["NetworkSurgery", "load_sparse", "save_sparse"]
