import json
import math
import os

import pytest
import torch

from morse.evaluation.bench.methods import Method
from morse.evaluation.bench.store import Cell, CellStore
from morse.evaluation.scoring import ImageScores

SETTINGS = {"num_images": 8}


def make_cell(method, budget=5, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    scores = ImageScores(
        torch.randn(8, 4, generator=generator),
        torch.rand(8, generator=generator),
        torch.rand(8, generator=generator),
    )
    counts = {"plan": "DoD", "num_dash": 2, "num_dot": 1, "lsd": 2.25, "seconds": 0.5}
    rest = {"fallbacks": {"no clock": 1}, "scores": scores, **options}
    return Cell(method, budget, seed, **counts, **rest)


def test_a_cell_comes_back_bit_by_bit(tmp_path):
    store = CellStore(tmp_path, SETTINGS, resume=False)
    cell = make_cell(
        Method("dpmsolver++", "morse", 1.5), engaged=False, note="no step", peak_memory_mib=3.5
    )
    store.add(cell)
    again = CellStore(tmp_path, SETTINGS, resume=True).get(cell.method, 5, 0)
    assert again.facts() == cell.facts() and again.method == cell.method
    assert not again.engaged and again.note == "no step" and again.peak_memory_mib == 3.5
    for name, tensor in vars(cell.scores).items():
        assert torch.equal(getattr(again.scores, name), tensor)


def test_a_store_resumes_only_the_same_run(tmp_path):
    store = CellStore(tmp_path, SETTINGS, resume=False)
    cell = make_cell(Method("ddim"))
    store.add(cell)
    with pytest.raises(FileExistsError, match="--resume"):
        CellStore(tmp_path, SETTINGS, resume=False)
    with pytest.raises(ValueError, match="num_images was 8 and is 9"):
        CellStore(tmp_path, {"num_images": 9}, resume=True)
    with pytest.raises(
        ValueError, match=r"dot was missing and is null.* give another --output_dir"
    ):
        CellStore(tmp_path, {**SETTINGS, "dot": None}, resume=True)
    with pytest.raises(ValueError, match="num_images was 8 and is missing"):
        CellStore(tmp_path, {}, resume=True)
    left = tmp_path / "cells" / ".a.safetensors.tmp-1"
    left.mkdir()
    os.utime(left, (0, 0))
    again = CellStore(tmp_path, SETTINGS, resume=True)
    assert again.has(cell.method, 5, 0) and not left.exists()
    assert not again.has(cell.method, 6, 0) and not again.has(cell.method, 5, 10)
    for content in ("{", "[]"):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(ValueError, match=r"settings\.json is damaged .*; delete "):
            CellStore(tmp_path, SETTINGS, resume=True)
    with pytest.raises(FileNotFoundError):
        again.get(cell.method, 6, 0)


def test_a_run_goes_on_from_another_working_folder(tmp_path, monkeypatch):
    (tmp_path / "P").mkdir()
    monkeypatch.chdir(tmp_path)
    names = {"pipeline": "P/", "dot": None, "data": "owner/name", "device": "P"}
    CellStore(tmp_path / "run", names, resume=False)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "settings.json").write_text('{"pipeline": "P"}')
    CellStore(tmp_path / "old", {"pipeline": "./P"}, resume=True)
    monkeypatch.chdir(tmp_path / "P")
    CellStore(tmp_path / "run", {**names, "pipeline": "../P"}, resume=True)
    for other in ({"pipeline": ".."}, {"device": "../P"}):
        with pytest.raises(ValueError, match=next(iter(other))):
            CellStore(tmp_path / "run", {**names, "pipeline": "../P", **other}, resume=True)


def test_methods_do_not_share_files(tmp_path):
    store = CellStore(tmp_path, SETTINGS, resume=False)
    methods = [Method("ddim"), Method("ddim", "morse", 2.0), Method("ddim", "morse", 2.5)]
    for index, method in enumerate(methods):
        store.add(make_cell(method, note=str(index)))
    assert [store.get(method, 5, 0).note for method in methods] == ["0", "1", "2"]


def test_a_cell_that_was_cut_off_is_absent(tmp_path, monkeypatch):
    store = CellStore(tmp_path, SETTINGS, resume=False)
    cell = make_cell(Method("ddim"))

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("morse.evaluation.bench.store.write_json", fail)
        store.add(cell)
    assert list((tmp_path / "cells").glob("*.safetensors"))
    assert not store.has(cell.method, 5, 0)
    store.add(cell)
    assert store.has(cell.method, 5, 0)


def test_damaged_tensors_are_named(tmp_path):
    store = CellStore(tmp_path, SETTINGS, resume=False)
    cell = make_cell(Method("ddim"))
    store.add(cell)
    (tensors,) = (tmp_path / "cells").glob("*.safetensors")
    tensors.write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"safetensors is missing or damaged .* by --resume"):
        store.get(cell.method, 5, 0)
    tensors.unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        store.get(cell.method, 5, 0)


def test_what_is_measured_once_is_kept(tmp_path):
    store = CellStore(tmp_path, SETTINGS, resume=False)
    assert store.once("answer", lambda: 42) == store.once("answer", lambda: 0) == 42
    ones, zeros = torch.ones(2, 3), torch.zeros(2, 3)
    assert torch.equal(store.images("seed0", lambda: ones), ones)
    assert torch.equal(store.features("seed0", lambda: zeros), zeros)
    assert torch.equal(store.images("seed0", lambda: zeros), ones)
    with pytest.raises(ZeroDivisionError):
        store.images("broken", lambda: torch.ones(1 // 0))
    assert torch.equal(store.images("broken", lambda: ones), ones)


def test_the_json_of_a_cell_is_plain(tmp_path):
    store = CellStore(tmp_path, SETTINGS, resume=False)
    store.add(make_cell(Method("ddim")))
    (file,) = (tmp_path / "cells").glob("*.json")
    facts = json.loads(file.read_text())
    assert facts["method"]["solver"] == "ddim" and "scores" not in facts
    assert math.isclose(facts["lsd"], 2.25)
