"""Sparse files: bits, bytes, other readers of the format, and broken files."""

import json
import math
import runpy
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from morse.compression import NetworkSurgery, load_sparse, save_sparse, sparse_codes
from morse.compression.sparse_codes import decode_gaps, encode_gaps, pack_bits, unpack_bits

SHAPES = {"a": (64, 100), "b": (3, 5, 7), "c": (1,), "d": (), "e": (0, 4), "f": (2, 40000)}


def sparse(shape, density, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    keep = torch.rand(shape, generator=generator) < density
    return torch.where(keep, values, 0).to(dtype)


def same_bits(a, b):
    as_bytes = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def formula(tensor, width):
    """The bytes of the smallest layout, found with plain Python."""
    flat = tensor.flatten().tolist()
    places = [i for i, value in enumerate(flat) if value != 0]
    gaps = [b - a - 1 for a, b in zip([-1, *places], places, strict=False)]
    codes = [
        math.ceil(len(flat) / 8),
        sum(1 + gap // 255 for gap in gaps),
        2 * sum(1 + gap // 65535 for gap in gaps),
        4 * len(places),
    ]
    return min(width * len(flat), width * len(places) + min(codes))


@pytest.mark.parametrize("density", [0.0, 0.0001, 0.003, 0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_round_trip_and_size(tmp_path, density, dtype):
    state = {name: sparse(shape, density, dtype=dtype) for name, shape in SHAPES.items()}
    path = tmp_path / "state.safetensors"
    save_sparse(state, path)
    loaded = load_sparse(str(path))
    assert list(loaded) == list(state)
    assert all(same_bits(loaded[name], tensor) for name, tensor in state.items())
    filled = [tensor for tensor in loaded.values() if tensor.numel()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in filled}) == len(filled)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    expected = sum(formula(tensor, dtype.itemsize) for tensor in state.values())
    assert path.stat().st_size == header + expected
    assert header < 900


def state_of_every_layout():
    return {
        "dense": sparse((50, 50), 0.99),
        "bitmask": sparse((50, 50), 0.5),
        "gaps8": sparse((500, 50), 0.02),
        "gaps16": sparse((500, 500), 0.0005),
        "index": torch.zeros(300_000).index_fill(0, torch.tensor([299_999]), 1.0),
    }


def test_every_layout_is_used(tmp_path):
    state = state_of_every_layout()
    save_sparse(state, tmp_path / "state.safetensors")
    with safe_open(tmp_path / "state.safetensors", framework="pt") as file:
        entries = json.loads(file.metadata()["json"])["tensors"]
    assert {name: entry[0] for name, entry in entries.items()} == {name: name for name in state}
    loaded = load_sparse(tmp_path / "state.safetensors")
    assert all(same_bits(loaded[name], tensor) for name, tensor in state.items())


def test_the_default_device_is_not_taken(tmp_path):
    """Which "meta" stands in for: whatever lands there is without numbers."""
    state = state_of_every_layout() | {"empty": torch.zeros(0, 4), "zeros": torch.zeros(400)}
    with torch.device("meta"):
        save_sparse(state, tmp_path / "state.safetensors")
        loaded = load_sparse(tmp_path / "state.safetensors")
        imported = runpy.run_path(sparse_codes.__file__)
    assert all(same_bits(loaded[name], tensor) for name, tensor in state.items())
    assert imported["BITS"].device.type == "cpu"


def test_special_bits_come_back(tmp_path):
    special = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45] + 200 * [0.0])
    state = {"x": special, "flag": torch.tensor([True, False]), "steps": torch.tensor(7)}
    save_sparse(state, tmp_path / "x.safetensors")
    loaded = load_sparse(tmp_path / "x.safetensors")
    assert all(same_bits(loaded[name], tensor) for name, tensor in state.items())


def test_half_values(tmp_path):
    state = {"w": sparse((200, 50), 0.1), "n": torch.arange(5), "h": sparse((9, 9), 0.5).bfloat16()}
    for values in ("float32", "float16"):
        save_sparse(state, tmp_path / values, values=values)
    loaded = load_sparse(tmp_path / "float16")
    assert same_bits(loaded["w"], state["w"].half().float())
    assert same_bits(loaded["n"], state["n"]) and same_bits(loaded["h"], state["h"])
    saved = (tmp_path / "float32").stat().st_size - (tmp_path / "float16").stat().st_size
    assert abs(saved - 2 * int(state["w"].count_nonzero())) < 16  # the padding of headers
    with pytest.raises(ValueError, match="'w' has numbers too large"):
        save_sparse({"w": torch.tensor([1e5])}, tmp_path / "x", values="float16")


def test_finalized_module(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3))
    surgery = NetworkSurgery(network, c_rate=1.0, iter_stop=1)
    surgery.step()
    path = tmp_path / "network.safetensors"
    with pytest.raises(ValueError, match="finalize"):
        save_sparse(network, path)
    assert not list(tmp_path.iterdir())
    save_sparse(surgery.finalize(), path)
    loaded = load_sparse(path)
    assert all(same_bits(loaded[name], tensor) for name, tensor in network.state_dict().items())
    x = torch.randn(1, 3, 8, 8)
    expected = network.eval()(x)
    fresh = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3))
    fresh.load_state_dict(loaded)
    assert torch.equal(fresh.eval()(x), expected)
    save_file(network.state_dict(), tmp_path / "dense.safetensors")
    assert path.stat().st_size < (tmp_path / "dense.safetensors").stat().st_size / 2


def test_codes():
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 7, 8, 9, 1000):
        mask = torch.rand(count, generator=generator) < 0.3
        assert torch.equal(unpack_bits(pack_bits(mask), count), mask)
    assert pack_bits(torch.tensor([True, False, True] + 5 * [False] + [True])).tolist() == [5, 1]
    index = torch.tensor([0, 1, 255, 511, 512, 1532])
    assert encode_gaps(index, 255).tolist() == [0, 0, 253, 255, 0, 0, 255, 255, 255, 254]
    for largest in (1, 3, 255, 65535):
        assert torch.equal(decode_gaps(encode_gaps(index, largest), largest), index)


def test_the_file_by_hand(tmp_path):
    """What the format says, byte by byte: files that were written once go on being read."""
    entries = {"w": ["index", "F32", [2, 3], 2, 2], "n": ["dense", "U16", [2], 2, 0]}
    meta = {"format": "morse.compression.sparse", "version": 1, "values": "float32"}
    header = {
        "__metadata__": {"json": json.dumps(meta | {"tensors": entries})},
        "values.F32": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "index.I32": {"dtype": "I32", "shape": [2], "data_offsets": [8, 16]},
        "values.U16": {"dtype": "U16", "shape": [2], "data_offsets": [16, 20]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<2f2i2H", 1.5, -2.0, 1, 5, 7, 65535)
    (tmp_path / "state").write_bytes(struct.pack("<Q", len(text)) + text + data)
    loaded = load_sparse(tmp_path / "state")
    assert torch.equal(loaded["w"], torch.tensor([[0, 1.5, 0], [0, 0, -2]]))
    assert same_bits(loaded["n"], torch.tensor([7, 65535], dtype=torch.uint16))


@pytest.mark.parametrize("count", [5, 9, 3000])
def test_unsigned_numbers_of_two_bytes_come_back_from_every_layout(tmp_path, count):
    numbers = torch.zeros(count, dtype=torch.int16)
    numbers[4] = -1
    save_sparse({"n": numbers.view(torch.uint16)}, tmp_path / "state")
    assert same_bits(load_sparse(tmp_path / "state")["n"], numbers.view(torch.uint16))


def test_the_format_is_safetensors(tmp_path):
    save_sparse(state_of_every_layout(), tmp_path / "state.safetensors")
    pools = load_file(tmp_path / "state.safetensors")
    assert sorted(pools) == ["bitmask.U8", "gaps.U16", "gaps.U8", "index.I32", "values.F32"]
    assert pools["index.I32"].tolist() == [299_999]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_sparse({"x": torch.ones(3)}, path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_sparse({"x": torch.zeros(3)}, path)
    assert torch.equal(load_sparse(path)["x"], torch.ones(3))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_broken_files(tmp_path):
    path = tmp_path / "state.safetensors"
    save_sparse({"x": sparse((50, 50), 0.05), "y": sparse((50, 50), 0.5)}, path)
    content = path.read_bytes()
    broken = [b"", content[:6], content[:40], content[:-1], b"\xff" * 64, b"\0" * 8]
    broken.append(content.replace(b"gaps8", b"gapsX"))
    broken.append(content.replace(b"morse.compression", b"other.compression"))
    broken.append(content.replace(b"[50,50]", b"[50,49]"))
    for damaged in broken:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state\.safetensors"):
            load_sparse(path)
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not written by save_sparse"):
        load_sparse(path)
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "missing")


def test_bad_arguments(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(ValueError, match="values must be"):
        save_sparse({}, path, values="int8")
    for state, match in (
        ([torch.ones(1)], "must be a module or state dict, got list"),
        ({"x": 1.0}, "'x' must be a dense tensor.*got float"),
        ({"x": torch.ones(3).to_sparse()}, "'x' must be a dense tensor.*got Tensor"),
        ({"x": torch.ones(3, dtype=torch.complex64)}, "got torch.complex64"),
    ):
        with pytest.raises(TypeError, match=match):
            save_sparse(state, path)
    assert not list(tmp_path.iterdir())
