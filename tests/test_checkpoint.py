import json
import os
from copy import deepcopy
from stat import S_ISDIR
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from morse.files import atomic_save_file, read_tensors, write_bytes, write_json
from morse.training import checkpoint
from morse.training.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from morse.training.output import prepare_output_dir

diffusers_training = pytest.importorskip("diffusers.training_utils")


class Training:
    """A small network, channels last, with everything a checkpoint holds."""

    def __init__(self, seed, width=4, fused=False):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Conv2d(3, width, 3), nn.GroupNorm(2, width))
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=fused)
        self.ema = diffusers_training.EMAModel(self.model.parameters(), use_ema_warmup=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(self, seed):
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.scaler.scale(self.model(images).square().mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())

    def save(self, folder, step, total_limit=None):
        parts = (self.model.state_dict(), self.optimizer, self.ema, self.scaler)
        return save_checkpoint(folder, step, *parts, {"note": [1, "x"]}, total_limit)

    def load(self, path):
        return load_checkpoint(path, self.model, self.optimizer, self.ema, self.scaler)

    def state(self):
        ema = self.ema.state_dict()
        optimizer = self.optimizer.state_dict()["state"]
        return deepcopy((self.model.state_dict(), optimizer, ema, self.scaler.state_dict()))


def assert_same_bits(one, two):
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_round_trip_and_further_steps_are_bit_exact(tmp_path, fused):
    first, second = Training(0, fused=fused), Training(1, fused=fused)
    first.step(0)
    first.step(1)

    step, extra = second.load(first.save(tmp_path, 2))

    assert (step, extra) == (2, {"note": [1, "x"]})
    assert_same_bits(first.state(), second.state())
    for group, old in zip(second.optimizer.param_groups, first.optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in old.items() if k != "params"
        }
    moments = second.optimizer.state[second.model[0].weight]["exp_avg"]
    assert moments.stride() == second.model[0].weight.stride()
    first.step(2)
    second.step(2)
    assert_same_bits(first.state(), second.state())


def test_no_pickle_and_no_leftovers(tmp_path):
    path = Training(0).save(tmp_path, 1)
    assert {f.suffix for f in path.iterdir()} == {".safetensors", ".json"}
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-1"]


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    training = Training(0)
    for step in (8, 9, 10):
        training.save(tmp_path, step, total_limit=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]

    def interrupt(path, data):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            training.save(tmp_path, 11, total_limit=2)
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names[1:] == ["checkpoint-10", "checkpoint-9"] and names[0].startswith(".checkpoint-11")
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"

    training.step(0)
    training.save(tmp_path, 11, total_limit=2)  # over what a process of the same number left
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    training.save(tmp_path, 10, total_limit=2)  # again, over the old one, and tidies up
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-10"]
    Training(1).load(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("step", [0, 1, 2])
def test_killed_while_it_removes_checkpoints_a_run_leaves_complete_ones(
    tmp_path, monkeypatch, step
):
    training = Training(0)
    training.save(tmp_path, 1)

    def interrupt(path):
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "shutil", SimpleNamespace(rmtree=interrupt))
    with pytest.raises(KeyboardInterrupt):
        training.save(tmp_path, step, total_limit=1)
    assert find_checkpoint(tmp_path, "latest").name == f"checkpoint-{step}"
    for path in tmp_path.glob("checkpoint-*"):
        Training(1).load(path)


def test_how_updates_are_computed_is_left_to_the_device_at_hand(tmp_path):
    first, second = Training(0, fused=True), Training(1)
    first.step(0)
    second.load(first.save(tmp_path, 1))
    assert not second.optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize(("total_limit", "kept"), [(2, [4, 5]), (1, [5]), (None, [2, 4, 5])])
def test_having_gone_back_the_run_abandons_later_checkpoints(tmp_path, total_limit, kept):
    training = Training(0)
    for step in (2, 4, 6, 10):
        training.save(tmp_path, step)
    training.save(tmp_path, 5, total_limit)
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in kept]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-5"


def test_a_run_at_an_earlier_checkpoint_keeps_it_and_later_ones(tmp_path):
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old_checkpoints(tmp_path, 4, 1)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4"]


def test_find_checkpoint(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    path = Training(0).save(tmp_path, 3)
    assert find_checkpoint(tmp_path, None) is None
    for name in ("latest", "checkpoint-3", str(path)):
        assert find_checkpoint(tmp_path, name) == path
    with pytest.raises(FileNotFoundError, match=r"'checkpoint-4'.*\['checkpoint-3'\]"):
        find_checkpoint(tmp_path, "checkpoint-4")


@pytest.mark.parametrize("name", ["model", "optimizer", "ema"])
@pytest.mark.parametrize("size", [0, 5, 300])
def test_truncated_file_is_named(tmp_path, name, size):
    path = Training(0).save(tmp_path, 1)
    file = path / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    if name == "optimizer":  # an unused optimizer's file is short itself
        file.write_bytes(b"\x10")
    with pytest.raises(ValueError, match=rf"{name}\.safetensors is damaged.*another checkpoint"):
        Training(1).load(path)


def test_other_damage_is_explained(tmp_path):
    path = Training(0).save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"model\.safetensors is from another network"):
        Training(0, width=6).load(path)
    with pytest.raises(ValueError, match=r"saved with ema state.*use_ema"):
        load_checkpoint(path, Training(0).model, Training(0).optimizer)
    unscaled = Training(0)
    unscaled.scaler = None
    with pytest.raises(ValueError, match=r"saved with scaler state.*mixed_precision"):
        unscaled.load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        Training(0).load(path)
    (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json cannot be read"):
        Training(0).load(path)


def test_output_dir_with_results_is_refused(tmp_path):
    folder = tmp_path / "run"
    prepare_output_dir(folder, resume=False)
    prepare_output_dir(folder, resume=False)
    write_json(folder / "train_config.json", {"a": 1})
    assert json.loads((folder / "train_config.json").read_text()) == {"a": 1}
    with pytest.raises(FileExistsError, match=r"--resume_from_checkpoint latest.*--output_dir"):
        prepare_output_dir(folder, resume=False)
    prepare_output_dir(folder, resume=True)


def test_what_safetensors_writes_beside_a_file_does_not_stay(tmp_path, monkeypatch):
    def stopped(tensors, path, metadata):
        (path.parent / ".tmpPfLIc0").touch()  # as it names what it then renames
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        atomic_save_file({}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_atomic_save_file_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "x.safetensors"
    atomic_save_file({"a": torch.arange(6).view(2, 3).T}, path)
    with pytest.raises(AttributeError):
        atomic_save_file({"a": None}, path)
    assert_same_bits(read_tensors(path, ""), {"a": torch.arange(6).view(2, 3).T.contiguous()})


@pytest.mark.parametrize(
    "write",
    [write_bytes, lambda path, data: atomic_save_file({"a": torch.tensor([*data])}, path)],
)
def test_files_are_put_in_place_once_they_are_on_the_disk_or_not_at_all(
    tmp_path, monkeypatch, write
):
    path, done = tmp_path / "folder" / "x", []
    fsync, replace = os.fsync, os.replace

    def sync(descriptor):
        done.append("folder" if S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def move(*paths):
        done.append("move")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", move)
    write(path, b"old")
    assert done == ["file", "move", *(["folder"] if os.name == "posix" else [])]
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(path, b"new")
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
