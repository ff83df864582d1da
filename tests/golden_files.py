"""Recordings of other code, that paper modules are held to: tensors, metadata, tolerances."""

import json
from pathlib import Path

from safetensors import safe_open
from torch.testing import assert_close

GOLDEN = Path(__file__).parent / "golden"


def read_golden(name):
    """Give a recording's metadata and its tensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["json"])
        return meta, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def part(tensors, prefix):
    """Give what is named so, without the prefix."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def assert_golden(actual, expected, meta):
    assert_close(actual, expected, rtol=meta["rtol"], atol=meta["atol"])


def assert_gradient(actual, expected, meta):
    """To a share of the tensor's largest value."""
    atol = meta["grad_rtol_of_max"] * expected.abs().max().item() + meta["grad_atol"]
    assert_close(actual, expected, rtol=0, atol=atol)
