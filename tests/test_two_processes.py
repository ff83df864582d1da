"""`accelerate launch` of the commands that share their work out: one launch, for it takes long."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from evaluation_fixtures import tiny_folder  # noqa: F401
from safetensors.torch import load_file
from test_train_distillation import ALL, OPTIONS, base, data_dir, pipe  # noqa: F401
from test_tune_dot import arguments, folder  # noqa: F401
from two_processes import SHARD_SAMPLES, SHARD_WINDOWS

from morse import MorseDot
from morse.cli import parse_config
from morse.evaluation.ablation.workers import one_thread
from morse.evaluation.fid.command import FidConfig, run_fid
from morse.training.loop import TrainDotConfig, train_dot
from morse.tuning.command import TuneDotConfig, tune_dot

ROOT = Path(__file__).parents[1]
# Without a GPU the launcher's only way to several processes on one machine is this name.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
          "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no",
          "--dynamo_backend", "no"]  # fmt: skip
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
               "PYTHONUNBUFFERED": "1"}  # fmt: skip
SCRIPTS = {
    "distilled": "training/train_dot.py",
    "plain": "training/train_dot.py",
    "tuned": "training/tune_dot.py",
    "images": "eval/fid.py",
}
# Of gradients near zero Adam makes steps of any sign, unless its epsilon is larger.
SAME_STEPS = ("--adam_epsilon", "1e-3")

pytestmark = pytest.mark.slow


class Launched(NamedTuple):
    """What each command was given but its folder, the folders of all, and what they printed."""

    given: dict[str, list[str]]
    root: Path
    stdout: str


@pytest.fixture(scope="module")
def launched(base, data_dir, folder, tiny_folder, tmp_path_factory):  # noqa: F811
    train = ["--pretrained_model_name_or_path", str(base), "--train_data_dir", str(data_dir),
             *OPTIONS.split(), "--cache_pairs", "40"]  # fmt: skip
    given = {
        "distilled": [*train, "--window_steps", "2", "--distill", *ALL],
        # One step: which pairs windows give is then no matter of chance.
        "plain": [*train, "--window_steps", "1", "--gradient_accumulation_steps", "2",
                  "--max_train_steps", "4", *SAME_STEPS],
        "tuned": arguments(folder, "", "--lsd", "2", "--max_train_steps", "4",
                           "--validation_steps", "0", *SAME_STEPS),
        # Without a GPU that is found out, as most people leave --device out.
        "images": ["--pipeline", str(tiny_folder), "--real", "fashion-mnist",
                   *(("--device", "cpu") if torch.cuda.is_available() else ()),
                   "--scheduler", "ddim", "--lsd", "2", "--speed_ratio", "4", "--num_images", "11",
                   "--batch_size", "3", "--reference_steps", "4"],
    }  # fmt: skip
    root = tmp_path_factory.mktemp("launched")
    commands = [[SCRIPTS[name], *words, *outputs(root / name)] for name, words in given.items()]
    (root / "commands.json").write_text(json.dumps(commands))
    command = [*LAUNCH, str(ROOT / "tests/two_processes.py"), str(root / "commands.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True,
                          text=True, timeout=200, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Launched(given, root, done.stdout)


def outputs(place):
    is_fid = place.name == "images"
    return ["--output_dir", str(place), *(["--json", f"{place}.json"] if is_fid else [])]


def both(launched, name, place, config_class, function, *options):
    """Run the same in this process; give the folder of that and of the launched one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    words = [*launched.given[name], *options, *outputs(place / name)]
    with one_thread():
        function(parse_config(config_class, words))
    return place / name, launched.root / name


def assert_shared(run, num_steps):
    """Both processes took part, and have the same weights in the end."""
    checkpoint = run / f"checkpoint-{num_steps}"
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["extra"]["num_processes"] == 2
    first, second = (load_file(run / f"rank-{rank}.safetensors") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    saved = load_file(checkpoint / "model.safetensors")
    torch.testing.assert_close({name: saved[name] for name in first}, first, rtol=0, atol=0)
    return saved


def test_each_command_runs_in_both(launched):
    for script in SCRIPTS.values():
        count = [*SCRIPTS.values()].count(script)
        assert launched.stdout.count(f"{script}: 2 processes") == 2 * count


def test_training_with_distillation_shares_all_gradients(launched):
    run = launched.root / "distilled"
    parts = {name.split(".")[0] for name in assert_shared(run, 3)}
    assert parts == {"dot", "transform", "terms"}
    assert launched.stdout.count("step 2/3") == 1
    assert MorseDot.from_pretrained(run).config.lora_rank == 2


def shards_of(*runs):
    """Pair the shards of two runs, two of each."""
    found = [sorted(run.glob("*/*-0000?.safetensors")) for run in runs]
    assert [len(shards) for shards in found] == [2, 2]
    return zip(*found, strict=True)


def assert_same_weights(found, run):
    expected = load_file(run / "checkpoint-4/model.safetensors")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # sums of other orders


def test_training_does_what_one_process_does_with_twice_the_batch(launched, tmp_path, monkeypatch):
    monkeypatch.setattr("morse.training.cache_sizes.MOST_ROWS", SHARD_WINDOWS)
    more = ("--train_batch_size", "4")
    one, two = both(launched, "plain", tmp_path, TrainDotConfig, train_dot, *more)
    for mine, theirs in shards_of(one, two):
        assert mine.read_bytes() == theirs.read_bytes()
    found = assert_shared(two, 4)
    assert_same_weights(found, one)
    assert found["conv_out.weight"].abs().max() > 1e-3  # begun at zero


def test_tuning_does_what_one_process_does_with_twice_the_batch(launched, tmp_path, monkeypatch):
    monkeypatch.setattr("morse.tuning.targets.SHARD_SAMPLES", SHARD_SAMPLES)
    more = ("--train_batch_size", "4")
    one, two = both(launched, "tuned", tmp_path, TuneDotConfig, tune_dot, *more)
    for mine, theirs in shards_of(one, two):
        torch.testing.assert_close(load_file(mine), load_file(theirs), rtol=1e-4, atol=1e-5)
    found = assert_shared(two, 4)
    assert_same_weights(found, one)
    before = MorseDot.from_pretrained(launched.given["tuned"][1] + "/dot").conv_out.weight
    assert (found["dot.conv_out.weight"] - before).abs().max() > 1e-4
    assert MorseDot.from_pretrained(two).config.plans


def test_images_and_their_distances_have_the_digits_of_one(launched, tmp_path, capsys):
    runs = both(launched, "images", tmp_path, FidConfig, run_fid)
    assert capsys.readouterr().out.count("real images:") == 1
    assert launched.stdout.count("real images:") == 1
    found = [json.loads(Path(f"{run}.json").read_text())["rows"] for run in runs]
    results = [[row["scores"] for row in rows] for rows in found]
    pictures = [
        {path.name: path.read_bytes() for path in (run / "lsd_2").iterdir()} for run in runs
    ]
    assert results[0] == results[1] and len(results[0]) == 2
    assert pictures[0] == pictures[1] and len(pictures[0]) == 12
