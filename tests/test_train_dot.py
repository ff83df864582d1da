import json
import os
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline
from safetensors.torch import load_file
from train_runs import assert_same_run, copy_unfinished, dot_arguments, save_pixels, weights

from morse import MorseDot, MorsePipeline
from morse.cli import parse_config
from morse.dot.mixture import GaussianMixture
from morse.settings import as_json
from morse.training.cache_sizes import MOST_ROWS
from morse.training.common import make_accelerator
from morse.training.graphs import GraphedDot
from morse.training.loop import TrainDotConfig, build_dot, train_dot
from morse.training.pairs import weighted_loss
from morse.training.run import TrainingRun
from morse.training.shards import make_shards
from morse.training.start import inherit

OPTIONS = """--train_batch_size 3 --max_train_steps 5 --lr_warmup_steps 2 --learning_rate 1e-2
    --checkpointing_steps 2 --logging_steps 2 --validation_steps 0 --validation_images 4 --seed 3
    --num_down_blocks 1 --block_out_channels 4 --lora_rank 2"""


@pytest.fixture(scope="module")
def base(build_unet, tmp_path_factory):
    unet = build_unet(channels=(8, 8), sample_size=8)
    return save_pixels(tmp_path_factory.mktemp("base"), unet)


arguments = partial(dot_arguments, OPTIONS)


@pytest.fixture(scope="module")
def run(base, data_dir, tmp_path_factory):
    """A function that trains into a new folder."""

    def train(*options):
        AcceleratorState._reset_state(reset_partial_state=True)  # else precisions can't differ
        output_dir = tmp_path_factory.mktemp("runs") / "run"
        config = parse_config(TrainDotConfig, arguments(base, data_dir, output_dir, *options))
        return train_dot(config)

    return train


def make_one_shard(folder, description, shard_size=1):
    alone = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None,
                            process_index=0, num_processes=1)  # fmt: skip
    make_shards(folder, "windows", 1, shard_size, "", lambda: description,
                lambda rows: {"a": torch.ones(1)}, alone)  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(run):
    return run()


def test_held_out_pairs_are_not_kept_where_nothing_is_validated(run, monkeypatch):
    """In a process that is not the main one; `test_two_processes` launches some."""

    def keeps_pairs(*arguments):
        raise MemoryError

    monkeypatch.setattr(Accelerator, "is_main_process", False)
    monkeypatch.setattr("morse.training.loop.make_validator", keeps_pairs)
    assert not any(run("--max_train_steps", "1", "--validation_steps", "1").iterdir())


@pytest.mark.supports("training", "DDPMPipeline")
def test_the_result_works_in_a_pipeline(whole_run, base):
    dot = MorseDot.from_pretrained(whole_run)
    assert any(value.abs().max() > 0 for name, value in weights(whole_run).items()
               if name.startswith("conv_out"))  # fmt: skip
    pipe = MorsePipeline.from_pretrained(base, dot=dot, scheduler="ddim")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(plan="DoDo", output_type="pt").images.isfinite().all()
    assert pipe.last_run.num_dot == 2


def test_dash_on_disk_is_untouched_and_not_in_the_result(whole_run, base, build_unet):
    before = build_unet(channels=(8, 8), sample_size=8).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in
               DDPMPipeline.from_pretrained(base).unet.state_dict().items())  # fmt: skip
    size = sum(value.numel() for value in weights(whole_run).values())
    assert size == sum(parameter.numel() for parameter in MorseDot.from_pretrained(
        whole_run).parameters())  # fmt: skip


def test_training_lowers_the_held_out_error(run):
    folder = run(
        "--max_train_steps",
        "40",
        "--timestep_sampling",
        "plans",
        "--window_steps",
        "3",
        "--pairs_per_window",
        "4",
        "--validation_steps",
        "20",
        "--checkpointing_steps",
        "40",
        "--ema_max_decay",
        "0.9",
    )
    ratios = [
        json.loads(path.read_text())["residual_ratio"]
        for path in sorted((folder / "validation").glob("*.json"))
    ]
    # A random Dash is nearly constant in time: small tests need only show that errors shrink.
    assert ratios[-1] < 1 and ratios[-1] < ratios[0]
    assert (folder / "validation" / "step-0000040.png").is_file()


@pytest.mark.parametrize(
    "options",
    [
        ("--mixed_precision", "bf16", "--gradient_accumulation_steps", "2"),
        ("--on_policy", "--window_steps", "2", "--pairs_per_window", "2"),
        ("--loss_weighting", "gap", "--no-use_ema", "--lora_rank", "0"),
        ("--independent", "--lr_scheduler", "constant", "--report_to", "tensorboard"),
    ],
)
def test_options_run(run, options):
    folder = run(*options)
    assert MorseDot.from_pretrained(folder).config.independent == ("--independent" in options)
    if "tensorboard" in options:
        assert any((folder / "logs").rglob("events.out.tfevents.*"))


def test_init_from_starts_with_those_weights(run, whole_run):
    folder = run("--init_from", str(whole_run), "--max_train_steps", "1", "--lr_warmup_steps", "1",
                 "--learning_rate", "1e-12")  # fmt: skip
    torch.testing.assert_close(weights(folder), weights(whole_run))


class TestInitFrom:
    def test_what_is_left_out_is_the_starting_dots(self, run):
        start = run("--lora_alpha", "6", "--base_space", "x0", "--max_train_steps", "1")
        folder = run("--init_from", str(start), "--max_train_steps", "1")
        config = MorseDot.from_pretrained(folder).config
        assert (config.lora_alpha, config.base_space) == (6, "x0")
        # Dash's estimate, which the pairs are made from, is kept there too.
        assert json.loads((folder / "train_config.json").read_text())["base_space"] == "x0"

    def test_a_scale_without_a_lora_is_no_hindrance(self, dash, tmp_path):
        MorseDot.from_dash(dash, 1, (8,), lora_rank=0, lora_alpha=8).save_pretrained(tmp_path)
        words = arguments("", "", "", "--block_out_channels", "8", "--init_from", str(tmp_path))
        config = inherit(parse_config(TrainDotConfig, [*words, "--lora_rank", "0"]))
        assert build_dot(dash, config).config.lora_alpha is None
        with pytest.raises(ValueError, match="lora_rank=0, but lora_rank is 2"):
            build_dot(dash, inherit(parse_config(TrainDotConfig, words)))

    def test_widths_and_options_too(self, dash, tmp_path):
        start = MorseDot.from_dash(dash, 1, (8,), lora_rank=2, conv="odconv",
                                   conv_options={"num_kernels": 2, "reduction": 0.5})  # fmt: skip
        start.set_mixture(GaussianMixture(2, 1, (1, 16, 16)))
        start.save_pretrained(tmp_path)
        words = ["--pretrained_model_name_or_path", "", "--train_data_dir", "", "--output_dir", "",
                 "--init_from", str(tmp_path), "--num_down_blocks", "1", "--lora_rank", "2",
                 "--conv", "odconv"]  # fmt: skip
        config = inherit(parse_config(TrainDotConfig, words))
        assert config.block_out_channels == (8,)
        assert config.conv_options == ("num_kernels=2", "reduction=0.5")
        dot = build_dot(dash, config)
        for part, first in ((dot, start), (dot.mixture, start.mixture)):
            found = part.state_dict()
            assert all(torch.equal(v, found[n]) for n, v in first.state_dict().items())

    def test_without_a_start_the_seed_decides_and_draws_of_others_stay(self, dash):
        before, found = torch.get_rng_state(), []
        for seed in ("3", "3", "4"):
            words = arguments("", "", "", "--block_out_channels", "8", "--seed", seed)
            found.append(build_dot(dash, parse_config(TrainDotConfig, words)).conv_in.weight)
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--lora_rank", "3"), "lora_rank=2, but lora_rank is 3 .*: give --lora_rank 2"),
            (("--lora_rank", "0"), "lora_rank=2, but lora_rank is 0 .*: give --lora_rank 2"),
            (("--lora_alpha", "3"), "lora_alpha=2, but lora_alpha is 3.0 .*: give --lora_alpha 2"),
            (("--block_out_channels", "8"), "block_out_channels=.*: give --block_out_channels 4"),
            (("--num_down_blocks", "3", "--block_out_channels", "4", "4", "4"),
             "num_down_blocks=1, but num_down_blocks is 3 .*: give --num_down_blocks 1, or one"),
            (("--independent",), "independent=False, .*: give --no-independent"),
            (("--norm", "dnr", "--window_steps", "2"), "norm='group', .*: give --norm group"),
            (("--conv", "odconv"), "conv='conv', .*: give --conv conv"),
        ],
    )  # fmt: skip
    def test_what_it_cannot_become_is_told(self, run, whole_run, options, message):
        start = re.escape(f"init_from is {whole_run}, a Dot with ")
        with pytest.raises(ValueError, match=start + message):
            run("--init_from", str(whole_run), *options)


class TestCache:
    options = ("--cache_pairs", "7", "--window_steps", "2", "--timestep_sampling", "plans")

    @pytest.fixture(scope="class")
    def first(self, run):
        """A run that makes its windows."""
        return run(*self.options)

    @pytest.fixture
    def folder(self, first, tmp_path):
        """A copy of these windows."""
        return shutil.copytree(first / "pairs", tmp_path / "pairs")

    def test_dash_is_evaluated_once(self, run, first, folder):
        shard = folder / "windows-00000.safetensors"
        stamp, content = shard.stat().st_mtime_ns, load_file(shard)
        assert content["samples"].shape == (7, 3, 1, 8, 8)
        assert content["samples"].dtype == torch.float16
        second = run(*self.options, "--cache_dir", str(folder))
        assert shard.stat().st_mtime_ns == stamp
        assert_same_run(first, second, 5)

    def test_missing_shards_alone_are_made(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr("morse.training.cache_sizes._LARGEST_SHARD", 17_000)  # 32 windows
        options = ("--cache_pairs", "70", "--window_steps", "1", "--max_train_steps", "1")
        folder = tmp_path / "pairs"
        run(*options, "--cache_dir", str(folder))
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        assert len(names) == 3
        before = {name: (folder / name).read_bytes() for name in names}
        (folder / names[1]).unlink()
        run(*options, "--cache_dir", str(folder))
        assert {name: (folder / name).read_bytes() for name in names} == before

    def test_gather_reads_across_shards(self, tmp_path):
        from safetensors.torch import save_file

        from morse.training.cache import WindowCache

        paths, total = [], 0
        for number, count in enumerate((3, 2, 4)):
            rows = torch.arange(total, total + count)
            total += count
            paths.append(tmp_path / f"{number}.safetensors")
            points = rows.reshape(-1, 1, 1, 1, 1).half()
            outputs = -points[:, :, None]
            tensors = {"timesteps": rows[:, None], "samples": points, "outputs": outputs}
            save_file(tensors, paths[-1])
        cache = WindowCache(paths, torch.device("cpu"))
        # In bf16 training on a CPU, where concatenating half precision is refused.
        with torch.autocast("cpu", torch.bfloat16):
            window = cache.gather(torch.tensor([8, 0, 4, 3, 3, 2]))
        assert len(cache) == 9
        assert window.timesteps.flatten().tolist() == [8, 0, 4, 3, 3, 2]
        assert window.outputs.flatten().tolist() == [-8, 0, -4, -3, -3, -2]

    def test_other_settings_are_refused(self, run, folder):
        with pytest.raises(ValueError, match=r"other settings \(window_steps was 2 and is 3\)"):
            run(*self.options, "--cache_dir", str(folder), "--window_steps", "3")

    def test_other_images_are_refused(self, run, folder):
        options = (*self.options, "--cache_dir", str(folder))
        description = folder / "cache.json"
        told = json.loads(description.read_text())
        assert (told["images"], told["image_column"]) == (10, "image")
        unnoted = {name: value for name, value in told.items() if name != "images"}
        for other, was in ((told | {"images": 9}, 9), (unnoted, "missing")):
            description.write_text(json.dumps(other))
            with pytest.raises(ValueError, match=rf"settings \(images was {was} and is 10\)"):
                run(*options)
        description.write_text(json.dumps(told))

    def test_a_truncated_shard_is_named(self, run, folder):
        shard = folder / "windows-00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-10])
        message = r"windows-00000.safetensors is damaged .*; delete that file alone"
        with pytest.raises(ValueError, match=message):
            run(*self.options, "--cache_dir", str(folder))

    def test_what_killed_processes_left_is_removed(self, tmp_path):
        old, new, other = (tmp_path / f".{name}.safetensors.tmp-1" for name in
                           ("windows-00003", "windows-00004", "latents-00000"))  # fmt: skip
        for path in (old, new, other):
            path.mkdir()
            (path / ".tmpPfLIc0").touch()
        for path in (old, other):
            os.utime(path, (0, 0))
        make_one_shard(tmp_path, {})
        assert not old.exists() and new.exists() and other.exists()

    def test_processes_share_the_shards_out_and_wait_for_each_other(self, tmp_path):
        for index, mine in enumerate(([range(2), range(4, 5)], [range(2, 4)])):
            done, tensors = Mock(), {"a": torch.ones(1)}
            done.describe.return_value, done.make.return_value = {}, tensors
            done.is_main_process, done.process_index, done.num_processes = index == 0, index, 2
            make_shards(tmp_path, "windows", 5, 2, "", done.describe, done.make, done)
            # Nobody makes any before the folder is claimed, nor goes on before all are made.
            waits, claims = [call.wait_for_everyone()], [call.describe()] * (index == 0)
            assert done.mock_calls == [*claims, *waits, *map(call.make, mine), *waits]

    def test_what_nobody_knows_or_lacks_a_setting_is_refused(self, tmp_path):
        make_one_shard(tmp_path, {"seed": 1})
        with pytest.raises(ValueError, match=r"vae was missing and is null\); .* or delete that"):
            make_one_shard(tmp_path, {"seed": 1, "vae": None})
        with pytest.raises(ValueError, match=r"shard_rows was 1 and is 2\)"):
            make_one_shard(tmp_path, {"seed": 1}, shard_size=2)
        make_one_shard(tmp_path, {"seed": 1})
        (tmp_path / "cache.json").write_text("{")
        with pytest.raises(ValueError, match=r"cache\.json is damaged .*; delete "):
            make_one_shard(tmp_path, {"seed": 1})
        (tmp_path / "cache.json").unlink()
        with pytest.raises(FileExistsError, match=r"no cache\.json, .* another --cache_dir"):
            make_one_shard(tmp_path, {"seed": 1})

    def test_shards_hold_whole_batches(self):
        from morse.training.cache import _BATCH_SIZES, _DEFAULT_BATCH_SIZE

        for batch_size in (_DEFAULT_BATCH_SIZE, *_BATCH_SIZES.values()):
            assert MOST_ROWS % batch_size == 0


def test_what_fails_at_the_end_costs_no_dot(base, data_dir, tmp_path, monkeypatch):
    def out_of_memory(dot, step):
        raise MemoryError

    def validator(source, config):
        assert len(source) == 6  # held out; there are 10 to train on
        return out_of_memory

    monkeypatch.setattr("morse.training.loop.make_validator", validator)
    given = arguments(base, data_dir, tmp_path / "run", "--max_train_steps", "1")
    with pytest.raises(MemoryError):
        train_dot(parse_config(TrainDotConfig, given))
    assert MorseDot.from_pretrained(tmp_path / "run").config.num_down_blocks == 1


@pytest.mark.parametrize(
    ("factor", "message"),
    [("nan", "the loss is nan at step 3"), ("inf", "weights are not finite at step 3")],
)
def test_good_checkpoints_stay_when_training_breaks(
    base, data_dir, tmp_path, factor, message, monkeypatch
):
    calls = []

    def breaks(*arguments):
        calls.append(float(factor) if len(calls) > 1 else 1.0)
        return weighted_loss(*arguments) * calls[-1]

    monkeypatch.setattr("morse.training.loop.weighted_loss", breaks)
    given = arguments(base, data_dir, tmp_path / "run", "--checkpointing_steps", "1",
                      "--logging_steps", "100")  # fmt: skip
    with pytest.raises(ValueError, match=message):
        train_dot(parse_config(TrainDotConfig, given))
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {"checkpoint-1", "checkpoint-2"}


def train_and_die_in_the_fourth_step(words):
    one_pass = TrainingRun._forward_backward

    def last_pass(run, batch, micro_step):
        loss = one_pass(run, batch, micro_step)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    torch.set_num_threads(1)  # those of the process before a fork are not there
    AcceleratorState._reset_state(reset_partial_state=True)
    TrainingRun._forward_backward = last_pass
    train_dot(parse_config(TrainDotConfig, words))


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_a_warm_up_without_an_end_is_told(run, warmup, capsys):
    run("--max_train_steps", "2", "--lr_warmup_steps", str(warmup))
    told = "lr_warmup_steps is 2 and max_train_steps 2, so that the rate ends at 5.0e-03"
    assert (told in capsys.readouterr().out) == (warmup == 2)


def test_without_time_an_update_is_made_and_the_run_goes_on(
    base, data_dir, tmp_path, whole_run, capsys
):
    given = arguments(base, data_dir, tmp_path / "run")
    train_dot(parse_config(TrainDotConfig, [*given, "--max_train_seconds", "1e-9"]))
    assert "max_train_seconds are over: stopped at step 1 of 5; to go" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoint-1").is_dir()
    train_dot(parse_config(TrainDotConfig, [*given, "--resume_from_checkpoint", "latest"]))
    assert_same_run(tmp_path / "run", whole_run, 5)


@pytest.mark.parametrize("missing", [(".json", ".png"), (".png",)], ids=["all", "picture"])
def test_a_validation_that_an_interrupted_run_did_not_finish_is_made(
    run, base, data_dir, tmp_path, missing
):
    validating = ("--validation_steps", "2")
    whole = run(*validating)
    given = arguments(base, data_dir, tmp_path / "run", *validating)
    copy_unfinished(whole, tmp_path / "run", 5)
    for step, suffix in product((2, 4), missing):
        (tmp_path / f"run/validation/step-000000{step}{suffix}").unlink()
    train_dot(parse_config(TrainDotConfig, [*given, "--resume_from_checkpoint", "latest"]))
    for suffix in missing:
        second, fourth = (f"validation/step-000000{step}{suffix}" for step in (2, 4))
        assert not (tmp_path / "run" / second).exists()
        assert (tmp_path / "run" / fourth).read_bytes() == (whole / fourth).read_bytes()


def test_what_a_killed_run_left_is_removed(base, data_dir, tmp_path, whole_run):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    left, running = (
        [folder / f".config.json.tmp-{number}", folder / f"validation/.step.json.tmp-{number}"]
        for number in (1, 2)
    )
    for path in (*left, *running):
        path.touch()
    for path in left:
        os.utime(path, (0, 0))
    (folder / ".checkpoint-2.tmp-old").mkdir()
    options = ("--checkpoints_total_limit", "1", "--resume_from_checkpoint", "latest")
    train_dot(parse_config(TrainDotConfig, arguments(base, data_dir, folder, *options)))
    assert [path.exists() for path in (*left, *running)] == [False, False, True, True]
    kept = [path.name for path in folder.iterdir() if "checkpoint" in path.name]
    assert kept == ["checkpoint-5"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_in_a_step_and_resumed_gives_the_same_bits(base, data_dir, tmp_path, whole_run):
    given = arguments(base, data_dir, tmp_path / "run")
    # A fork spares the imports, but cannot use a GPU that was used before.
    start = "spawn" if torch.cuda.is_available() else "fork"
    process = get_context(start).Process(target=train_and_die_in_the_fourth_step, args=(given,))
    process.start()
    process.join(100)
    process.kill()  # if it hangs, which the step of the checkpoint would tell
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "run" / "config.json").exists()
    config = parse_config(TrainDotConfig, given)
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        train_dot(config)
    train_dot(replace(config, resume_from_checkpoint="latest"))
    assert_same_run(tmp_path / "run", whole_run, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--on_policy",), "on_policy needs fresh windows of several steps"),
        (("--cuda_graphs", "--compile"), "cuda_graphs is True and so is"),
        (
            ("--cuda_graphs", "--gradient_accumulation_steps", "2"),
            "gradient_accumulation_steps is 2, but the replay",
        ),
        (("--window_steps", "0"), "window_steps is 0"),
        (("--cache_pairs", "0"), "cache_pairs is 0"),
        (("--validation_steps", "-1"), "validation_steps is -1"),
        (("--lora_alpha", "0"), "lora_alpha is 0.0; it must be more than 0"),
        (("--lora_rank", "0", "--lora_alpha", "8"), "lora_alpha is 8 and lora_rank is 0"),
    ],
)
def test_settings_are_checked(base, data_dir, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        parse_config(TrainDotConfig, arguments(base, data_dir, tmp_path, *options))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [("absent", (), "does not exist"), (".", ("--cache_latents",), "works on pixels")],
)
def test_a_failed_first_try_leaves_an_empty_folder(
    base, data_dir, tmp_path, folder, options, message
):
    AcceleratorState._reset_state(reset_partial_state=True)
    given = arguments(base, data_dir / folder, tmp_path / "run", *options)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        train_dot(parse_config(TrainDotConfig, given))
    assert not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("option", "place", "message"),
    [
        ("init_from", "{}/nowhere", "does not exist; give a folder, or an id of the hub"),
        ("init_from", "{}", "cannot be loaded: Error no file named config.json"),
        ("pretrained_model_name_or_path", "some/where/else", "does not exist"),
    ],
)
def test_a_place_without_a_model_is_told_with_its_option(run, base, option, place, message):
    place = place.format(base)
    start = re.escape(f"{option} is {place!r}, which ")
    with pytest.raises(OSError, match=start + message):
        run(f"--{option}", place)


def test_graphs_need_cuda(run):
    with pytest.raises(ValueError, match="cuda_graphs needs a CUDA device"):
        run("--cuda_graphs")
    wrapped = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(ValueError, match="in a SimpleNamespace; train in one process"):
        GraphedDot(wrapped)


@pytest.mark.parametrize(
    ("launched", "options", "expected"),
    [
        (None, (), "no"),
        ("bf16", (), "bf16"),
        ("bf16", ("--mixed_precision", "no"), "no"),
        ("no", ("--mixed_precision", "bf16"), "bf16"),
    ],
)
def test_the_precision_is_that_of_the_launch(launched, options, expected, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    config = parse_config(TrainDotConfig, arguments("b", "d", "o", *options))
    assert config.mixed_precision == expected
    assert as_json(config)["mixed_precision"] == expected


def test_an_unknown_precision_of_the_launch_is_named(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(SystemExit):
        parse_config(TrainDotConfig, arguments("b", "d", "o"))
    assert "ACCELERATE_MIXED_PRECISION, is 'fp8'" in capsys.readouterr().err


def test_processes_wait_long_for_each_other_and_form_groups_on_cpus(monkeypatch):
    seen, made = {}, SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(accelerate, "Accelerator", lambda **options: seen.update(options) or made)
    base = {"pretrained_model_name_or_path": "x", "train_data_dir": Path("x")}
    make_accelerator(TrainDotConfig(**base, output_dir=Path("x")))
    assert seen["kwargs_handlers"][0].timeout.total_seconds() > 3600
    assert seen["cpu"] != torch.accelerator.is_available()


@pytest.mark.gpu
def test_graphs_change_nothing_but_speed(run):
    options = ("--cache_pairs", "9", "--mixed_precision", "no")
    torch.testing.assert_close(weights(run(*options, "--cuda_graphs")), weights(run(*options)),
                               rtol=1e-3, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num_down_blocks", "3", "--block_out_channels", "4", "4", "4", "--cache_pairs", "9"),
         r"resolution is 8, .*num_down_blocks 3 .* of 16 here: give --resolution 16, or fewer"),
        (("--num_down_blocks", "2", "--block_out_channels", "4", "4", "--resolution", "12",
          "--progressive_steps", "2"), "resolution is 12, .* multiples of 8"),
        (("--window_steps", "60", "--timestep_sampling", "plans", "--cache_pairs", "9"),
         "window_steps is 60; it must be 59 or less with timestep_sampling 'plans' here"),
        (("--window_steps", "1000"), "window_steps is 1000; it must be 999 or less"),
        (("--resolution", "10"), r"resolution is 10, .* give --resolution 8\.$"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_told_at_once(base, data_dir, tmp_path, options, message):
    AcceleratorState._reset_state(reset_partial_state=True)
    config = parse_config(TrainDotConfig, arguments(base, data_dir, tmp_path / "run", *options))
    with pytest.raises(ValueError, match=message):
        train_dot(config)
    assert not any((tmp_path / "run").iterdir())
