"""Pruning in train_dot: the paper's rule, resuming, averages, and sparse Dots on the disk."""

import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from diffusers.pipelines.pipeline_loading_utils import is_safetensors_compatible
from safetensors.torch import load_file
from test_hub import hub  # noqa: F401
from test_train_dot import arguments
from train_runs import WEIGHTS, assert_same_run, save_pixels

from morse import MorseDot, MorsePipeline
from morse.cli import parse_config
from morse.compression import NetworkSurgery, load_sparse
from morse.training.loop import TrainDotConfig, build_dot, train_dot
from morse.training.pruning import (
    DotPruner,
    keep_share,
    prune_bounds,
    raw_weights,
    set_thresholds,
)
from morse.training.run import TrainingRun
from morse.training.start import inherit

STEPS = ["--max_train_steps", "8", "--prune_start", "3", "--prune_stop", "6", "--prune", "0.8"]


@pytest.fixture(scope="module")
def base(build_unet, tmp_path_factory):
    unet = build_unet(channels=(8, 16), sample_size=8)
    return save_pixels(tmp_path_factory.mktemp("base"), unet)


@pytest.fixture(scope="module")
def train(base, data_dir, tmp_path_factory):
    """A function that trains into a new folder."""

    def run(*options):
        output_dir = tmp_path_factory.mktemp("runs") / "run"
        return train_dot(
            parse_config(TrainDotConfig, arguments(base, data_dir, output_dir, *options))
        )

    return run


@pytest.fixture(scope="module")
def history():
    """What the pruners of this module's runs did: (step, surgery's iteration, masks)."""
    return []


@pytest.fixture(scope="module")
def pruned_run(train, history):
    before_step = DotPruner.before_step

    def recording(pruner, step):
        before_step(pruner, step)
        masks = {name: mask.clone() for name, mask in pruner.surgery.masks.items()}
        history.append((step, pruner.surgery.iteration, masks))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DotPruner, "before_step", recording)
        return train(*STEPS)


@pytest.fixture(scope="module")
def dense_run(train):
    return train("--max_train_steps", "3")


def assert_pruned(folder, share=0.8):
    for name, value in load_sparse(folder / WEIGHTS).items():
        count = int((value == 0).sum())
        if value.ndim > 1 and not name.startswith("conv_out"):
            kept = max(1, round((1 - share) * value.numel()))
            assert count == value.numel() - kept, name
        else:
            assert count < value.numel(), name


def test_the_schedule_of_a_run(pruned_run, history):
    steps, iterations, masks = zip(*history, strict=True)
    assert steps == tuple(range(8))
    assert iterations == (-1, -1, -1, 0, 1, 2, 2, 2)
    full, moved = masks[2], masks[3]
    assert all(mask.all() for mask in full.values())
    assert not any(name.startswith("conv_out") or name.endswith("bias") for name in full)
    assert any(name.startswith("lora.") for name in full) and "conv_in.weight" in full
    # By the paper's rule first: exactly the share, and what has moved since came back.
    for name, mask in moved.items():
        assert mask.numel() - int(mask.sum()) >= round(0.8 * mask.numel()), name
    back = [bool((~moved[name] & masks[5][name]).any()) for name in full]
    assert any(back)
    assert all(torch.equal(masks[6][name], masks[7][name]) for name in full)
    assert_pruned(pruned_run)


def test_averages_carry_the_final_mask(pruned_run, history):
    last = history[-1][2]
    state = load_sparse(pruned_run / WEIGHTS)
    checkpoint = pruned_run / "checkpoint-8"
    names = [n for n in load_file(checkpoint / "model.safetensors") if n.endswith(".original")]
    averages = load_file(checkpoint / "ema.safetensors")
    assert len(averages) == len(state)
    for name, mask in last.items():
        assert torch.equal(state[name] == 0, ~mask), name
        assert not torch.signbit(state[name][~mask]).any()  # they would take room in the file
    # Each average has come to the weight that it is the average of.
    shapes = {name: value.shape for name, value in state.items()}
    assert len(names) == len(last)
    raw = load_file(checkpoint / "model.safetensors")
    for name, mask in last.items():
        original = raw[re.sub(r"(\w+)$", r"parametrizations.\1.original", name)]
        assert original.shape == shapes[name]
        # 8 updates at 0.01 move a weight by at most 0.08.
        torch.testing.assert_close(state[name][mask], original[mask], rtol=0, atol=0.08)


def test_without_averages_raw_weights_are_masked(train):
    folder = train(*STEPS, "--no-use_ema", "--gradient_accumulation_steps", "2")
    assert_pruned(folder)
    state = load_sparse(folder / WEIGHTS)
    raw = load_file(folder / "checkpoint-8" / "model.safetensors")
    original = raw["conv_in.parametrizations.weight.original"]
    mask = raw["conv_in.parametrizations.weight.0.mask"]
    assert torch.equal(state["conv_in.weight"], original * mask)
    assert (original[~mask] != 0).all()


def test_one_shot_prunes_once(train, dense_run, monkeypatch):
    masks = []
    save = TrainingRun.save

    def look(run):
        masks.append({name: mask.clone() for name, mask in run.pruner.surgery.masks.items()})
        save(run)

    monkeypatch.setattr(TrainingRun, "save", look)
    options = ("--prune", "0.6", "--prune_method", "one_shot", "--prune_start", "0")
    folder = train(*options, "--init_from", str(dense_run), "--checkpointing_steps", "1")
    assert_pruned(folder, 0.6)
    weight = MorseDot.from_pretrained(dense_run).conv_in.weight.detach()
    order = weight.abs().flatten().sort().values
    # The dense Dot is the start, so that the masks are known.
    expected = weight.abs() > order[len(order) - round(0.4 * len(order)) - 1]
    for found in masks:
        assert torch.equal(found["conv_in.weight"], expected)


def pruned_matrices(state):
    """The places of zeros that training without a pruner must leave."""
    return {n: v == 0 for n, v in state.items() if v.ndim > 1 and not n.startswith("conv_out")}


def test_a_pruned_dot_is_a_start(train, pruned_run):
    folder = train("--init_from", str(pruned_run), "--max_train_steps", "1", "--learning_rate",
                   "1e-12", "--lr_warmup_steps", "1")  # fmt: skip
    state = load_sparse(pruned_run / WEIGHTS)
    torch.testing.assert_close(load_sparse(folder / WEIGHTS), state, rtol=0, atol=1e-9)


@pytest.mark.parametrize("average", ["--use_ema", "--no-use_ema"])
def test_a_pruned_dot_stays_so_when_it_learns_on(train, pruned_run, average):
    options = ("--max_train_steps", "2", "--lr_warmup_steps", "0", "--adam_weight_decay", "0.1")
    folder = train("--init_from", str(pruned_run), average, *options)
    assert MorseDot.from_pretrained(folder).config.sparse
    before, after = (load_sparse(path / WEIGHTS) for path in (pruned_run, folder))
    for name, zeros in pruned_matrices(before).items():
        assert torch.equal(after[name] == 0, zeros), name
        assert zeros.all() or not torch.equal(after[name], before[name]), name


def test_what_a_pruned_dot_lacked_learns_from_zero(train, pruned_run):
    folder = train("--init_from", str(pruned_run), "--history", "1", "--window_steps", "3",
                   "--max_train_steps", "2", "--lr_warmup_steps", "0")  # fmt: skip
    before, after = (load_sparse(path / WEIGHTS)["conv_in.weight"] for path in (pruned_run, folder))
    old, new = after.split([before.shape[1], after.shape[1] - before.shape[1]], dim=1)
    assert torch.equal(old == 0, before == 0) and new.any()


def test_surgery_goes_on_from_a_pruned_dot(base, data_dir, pruned_run, tmp_path):
    given = arguments(base, data_dir, tmp_path, "--init_from", str(pruned_run), "--prune", "0.8")
    dash = MorsePipeline.from_pretrained(base).unet
    dot = build_dot(dash, inherit(parse_config(TrainDotConfig, given)))
    pruner = DotPruner(dot, parse_config(TrainDotConfig, given))
    zeros = pruned_matrices(load_sparse(pruned_run / WEIGHTS))
    assert all(torch.equal(mask, ~zeros[n]) for n, mask in pruner.surgery.masks.items())
    pruner.before_step(0)
    with torch.no_grad():
        for weight in raw_weights(pruner.surgery).values():
            weight += 1e-6 * torch.ones_like(weight)
    pruner.before_step(1)
    for name, mask in pruner.surgery.masks.items():
        # Nothing comes back for a millionth, where there is something to compare it with.
        assert zeros[name].all() or not (mask & zeros[name]).any(), name
    assert not any(weight._backward_hooks for weight in dot.parameters())


def record_decisions(patch):
    """Give a list of what surgery prunes and splices from now on: (iteration, flips, updated)."""
    found = []
    step = NetworkSurgery.step

    def recording(surgery, iteration):
        updated = step(surgery, iteration)
        found.append((iteration, surgery.flips, dict(updated)))
        return updated

    patch.setattr(NetworkSurgery, "step", recording)
    return found


class TestResuming:
    # gamma makes some updates miss, so that the draws count too.
    options = (*STEPS, "--prune_gamma", "0.5")

    def assert_same_run(self, folder, other):
        assert (folder / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
        assert_same_run(folder, other, 8)

    @pytest.fixture(scope="class")
    def recorded(self, train):
        """A run without a break, and what surgery decided in it."""
        with pytest.MonkeyPatch.context() as patch:
            decisions = record_decisions(patch)
            return train(*self.options), decisions

    @pytest.fixture(scope="class")
    def whole(self, recorded):
        return recorded[0]

    def test_killed_amid_surgery(self, base, data_dir, tmp_path, recorded, monkeypatch):
        whole, decisions = recorded
        expected = [entry for entry in decisions if entry[0] >= 1]
        assert len(expected) == 2 and any(not all(entry[2].values()) for entry in expected)
        assert any(flips.spliced for entry in expected for flips in entry[1].values())
        given = arguments(base, data_dir, tmp_path / "run", *self.options)
        config, one_pass = parse_config(TrainDotConfig, given), TrainingRun._forward_backward

        def die_in_the_sixth_step(run, batch, micro_step):
            loss = one_pass(run, batch, micro_step)
            if run.step == 5:
                raise KeyboardInterrupt
            return loss

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(TrainingRun, "_forward_backward", die_in_the_sixth_step)
            train_dot(config)
        assert not (tmp_path / "run" / "config.json").exists()
        again = record_decisions(monkeypatch)
        train_dot(replace(config, resume_from_checkpoint="checkpoint-4"))
        assert again == expected
        self.assert_same_run(tmp_path / "run", whole)

    def stop_at(self, step, monkeypatch):
        monkeypatch.setattr(TrainingRun, "_out_of_time", lambda run: run.step >= step)

    @pytest.mark.parametrize("step", [2, 7], ids=["before", "after"])
    def test_out_of_time_at_any_stage(self, base, data_dir, tmp_path, whole, step, monkeypatch,
                                      capsys):  # fmt: skip
        config = parse_config(
            TrainDotConfig, arguments(base, data_dir, tmp_path / "run", *self.options)
        )
        with monkeypatch.context() as patch:
            self.stop_at(step, patch)
            capsys.readouterr()
            train_dot(config)
        early = "it was to end at update 6" in capsys.readouterr().out
        assert early == (step < 6)
        assert MorseDot.from_pretrained(tmp_path / "run").config.sparse
        train_dot(replace(config, resume_from_checkpoint="latest"))
        self.assert_same_run(tmp_path / "run", whole)

    def test_a_longer_run_goes_on_amid_surgery(self, base, data_dir, tmp_path, monkeypatch):
        given = arguments(base, data_dir, tmp_path / "run", *STEPS[:2])
        config = replace(parse_config(TrainDotConfig, given), prune=0.8)
        with monkeypatch.context() as patch:
            self.stop_at(config.max_train_steps // 2, patch)
            train_dot(config)
        steps = 2 * config.max_train_steps
        train_dot(replace(config, max_train_steps=steps, resume_from_checkpoint="latest"))
        weight = MorseDot.from_pretrained(tmp_path / "run").conv_in.weight
        assert (weight == 0).float().mean() == pytest.approx(0.8, abs=0.5 / weight.numel())

    def test_other_runs_checkpoints(self, base, data_dir, tmp_path, monkeypatch, capsys):
        given = arguments(base, data_dir, tmp_path / "run")
        dense = parse_config(TrainDotConfig, given)
        train_dot(dense)
        config = replace(dense, prune=0.8, resume_from_checkpoint="latest")
        with pytest.raises(ValueError, match=r"of a run without prune.*--init_from"):
            train_dot(config)
        pruned = replace(config, output_dir=tmp_path / "pruned", resume_from_checkpoint=None)
        self.stop_at(2, monkeypatch)
        train_dot(pruned)
        with pytest.raises(ValueError, match="from another network"):
            train_dot(replace(pruned, prune=None, resume_from_checkpoint="latest"))
        capsys.readouterr()
        train_dot(replace(pruned, prune=0.5, resume_from_checkpoint="latest"))
        assert "prune was 0.8 and is now 0.5" in capsys.readouterr().out


def test_what_a_pruner_does_not_load(base, data_dir, tmp_path):
    config = parse_config(TrainDotConfig, arguments(base, data_dir, tmp_path, *STEPS))
    pruner = DotPruner(build_dot(UNet2DModel.from_pretrained(base / "unet"), config), config)
    with torch.device("meta"):
        set_thresholds(pruner.surgery, 0.5)
    state = pruner.state_dict()
    for left_out, error, words in (
        ("conv_in.parametrizations.weight.0.mask", RuntimeError, "Missing key"),
        ("surgery.iteration", ValueError, "without prune"),
    ):
        with pytest.raises(error, match=words):
            pruner.load_state_dict({k: v for k, v in state.items() if k != left_out})
    pruner.load_state_dict(state)


def test_thresholds_are_quantiles():
    torch.manual_seed(0)
    layer = torch.nn.Linear(20, 10)
    surgery = NetworkSurgery(layer, prune_bias=False, iter_stop=5)
    raw = layer.parametrizations.weight.original
    set_thresholds(surgery, 0.7)
    (thresholds,) = surgery.thresholds.values()
    sizes = raw.detach().abs().flatten()
    assert thresholds.prune_below == sizes.sort().values[139].item()
    assert thresholds.splice_above == pytest.approx(thresholds.prune_below * 1.1 / 0.9)
    # They are the paper's for another c_rate.
    c_rate = (thresholds.prune_below / 0.9 - thresholds.mu) / thresholds.std
    twin = torch.nn.Linear(20, 10)
    twin.weight.data.copy_(raw.detach())
    theirs = NetworkSurgery(twin, prune_bias=False, c_rate=c_rate)
    theirs.step()
    assert thresholds == pytest.approx(theirs.thresholds[""], rel=1e-6)
    surgery.step()
    assert surgery.density() == pytest.approx(0.3)


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_thresholds_of_what_was_pruned_before(share):
    layer = torch.nn.Linear(10, 2, bias=False)
    weight = torch.arange(20.0).sub(10).clamp(min=0)  # eleven zeros, then 1 to 9
    layer.weight.data = weight.view(2, 10).clone()
    surgery = NetworkSurgery(layer, iter_stop=5)
    surgery.masks["weight"].copy_(layer.weight != 0)
    raw_weights(surgery)["weight"].data[0] += 0.5  # pruned weights move before they are looked at
    set_thresholds(surgery, share)
    (thresholds,) = surgery.thresholds.values()
    # At half there are too many zeros already, and the smallest that is left is the measure.
    assert thresholds.prune_below == {0.5: 1, 0.75: 4}[share]
    assert (thresholds.mu, thresholds.std) == pytest.approx((5, (60 / 9) ** 0.5))
    surgery.step()
    assert surgery.masks["weight"].flatten().tolist() == (weight > thresholds.prune_below).tolist()


def test_keep_share_changes_as_little_as_needed():
    layer = torch.nn.Linear(5, 2, bias=False)
    layer.weight.data = torch.arange(1.0, 11).view(2, 5)
    surgery = NetworkSurgery(layer)
    mask = surgery.masks["weight"]
    keep_share(surgery, 0.6)
    assert mask.flatten().nonzero().flatten().tolist() == [4, 5, 6, 7, 8, 9]
    mask[1, 3] = mask[1, 4] = False
    keep_share(surgery, 0.5)  # one comes back, the smaller ones stay
    assert mask.flatten().nonzero().flatten().tolist() == [4, 5, 6, 7, 9]
    keep_share(surgery, 0.01)  # never none
    assert mask.flatten().nonzero().flatten().tolist() == [9]


class TestOnDisk:
    @pytest.fixture
    def pruned(self, pruned_run, base):
        dash = MorsePipeline.from_pretrained(base).unet
        return MorseDot.from_pretrained(pruned_run).bind(dash)

    def test_its_bytes_shrink(self, pruned, pruned_run, tmp_path):
        assert {path.name for path in pruned_run.glob("*.safetensors")} == {WEIGHTS}
        sparse = (pruned_run / WEIGHTS).stat().st_size
        pruned.register_to_config(sparse=False)
        pruned.save_pretrained(tmp_path)
        assert sparse < 0.5 * (tmp_path / WEIGHTS).stat().st_size

    def test_every_bit_comes_back(self, pruned, pruned_run, tmp_path):
        state = load_sparse(pruned_run / WEIGHTS)
        found = pruned.state_dict()
        assert found.keys() == state.keys()
        assert all(
            torch.equal(found[k].view(torch.int32), v.view(torch.int32)) for k, v in state.items()
        )
        assert not pruned.training and pruned.config._name_or_path == str(pruned_run)
        pruned.save_pretrained(tmp_path)
        torch.testing.assert_close(load_sparse(tmp_path / WEIGHTS), state, rtol=0, atol=0)

    def test_in_a_pipeline(self, pruned, pruned_run, base, tmp_path):
        def images(pipe):
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(0)
            return pipe(plan="DoDo", output_type="pt", generator=generator).images

        pipe = MorsePipeline.from_pretrained(base, dot=pruned_run, scheduler="ddim")
        expected = images(pipe)
        assert expected.isfinite().all() and pipe.last_run.num_dot == 2
        pipe.save_pretrained(tmp_path / "pipe")
        assert {path.name for path in (tmp_path / "pipe" / "dot").iterdir()} == {
            "README.md",
            "config.json",
            WEIGHTS,
        }
        assert torch.equal(images(MorsePipeline.from_pretrained(tmp_path / "pipe")), expected)
        plain = DDPMPipeline.from_pretrained(tmp_path / "pipe")
        assert not hasattr(plain, "dot")
        # On the hub too: diffusers takes these names for a complete safetensors model.
        names = [
            str(path.relative_to(tmp_path / "pipe"))
            for path in (tmp_path / "pipe").rglob("*")
            if path.is_file()
        ]
        assert is_safetensors_compatible(names, folder_names={"unet", "dot", "scheduler"})

    def test_on_the_hub(self, pruned, hub, pruned_run):  # noqa: F811
        pruned.push_to_hub("us/it")
        loaded = MorseDot.from_pretrained(hub.root / "us" / "it")
        torch.testing.assert_close(loaded.state_dict(), pruned.state_dict(), rtol=0, atol=0)
        size = (hub.root / "us" / "it" / WEIGHTS).stat().st_size
        assert abs(size - (pruned_run / WEIGHTS).stat().st_size) < 100  # the order of names

    def test_dtypes_and_variants(self, pruned, tmp_path):
        pruned.half().save_pretrained(tmp_path, variant="fp16")
        assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").exists()
        full = MorseDot.from_pretrained(tmp_path, variant="fp16")
        half = MorseDot.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
        assert full.dtype == torch.float32 and half.dtype == torch.float16
        for name, value in pruned.state_dict().items():
            assert torch.equal(half.state_dict()[name], value)
            assert torch.equal(full.state_dict()[name], value.float())
        with pytest.raises(OSError, match=WEIGHTS):
            MorseDot.from_pretrained(tmp_path)

    def test_loading_draws_nothing(self, pruned_run):
        state = torch.get_rng_state()
        MorseDot.from_pretrained(pruned_run)
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_layout_may_change(self, pruned, tmp_path):
        sizes = []
        for sparse in (True, False, True):
            pruned.register_to_config(sparse=sparse)
            pruned.save_pretrained(tmp_path)
            assert [path.name for path in tmp_path.glob("*.safetensors")] == [WEIGHTS]
            sizes.append((tmp_path / WEIGHTS).stat().st_size)
            loaded = MorseDot.from_pretrained(tmp_path)
            assert torch.equal(loaded.conv_in.weight, pruned.conv_in.weight)
            assert loaded.config.sparse == sparse
        assert sizes[0] == sizes[2] < 0.5 * sizes[1]

    def test_a_failed_save_leaves_the_old_dot(self, pruned, tmp_path, monkeypatch):
        pruned.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        pruned.conv_in.weight.data.zero_()
        monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            pruned.save_pretrained(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_dense_dot_is_as_ever(self, dense_run):
        assert "conv_in.weight" in load_file(dense_run / WEIGHTS)
        assert json.loads((dense_run / "config.json").read_text())["sparse"] is False
        assert "by pruning" not in (dense_run / "README.md").read_text()

    def test_the_card_counts_zeros(self, pruned, pruned_run):
        zeros = sum(int((value == 0).sum()) for value in pruned.state_dict().values())
        assert (
            f"| of these zero, by pruning | {zeros:,} |" in (pruned_run / "README.md").read_text()
        )

    def test_what_a_sparse_dot_refuses(self, pruned, pruned_run, tmp_path):
        with pytest.raises(TypeError, match=r"does not know \['device_map'\]"):
            MorseDot.from_pretrained(pruned_run, device_map="cpu")
        with pytest.raises(ValueError, match="use_safetensors must be True"):
            MorseDot.from_pretrained(pruned_run, use_safetensors=False)
        with pytest.raises(ValueError, match="safe_serialization is False"):
            pruned.save_pretrained(tmp_path, safe_serialization=False)
        pruned.save_pretrained(tmp_path)
        file = tmp_path / WEIGHTS
        content = file.read_bytes()
        file.write_bytes(content.replace(b"bitmask", b"bitmosk"))
        with pytest.raises(ValueError, match=rf"{WEIGHTS} is damaged"):
            MorseDot.from_pretrained(tmp_path)
        file.write_bytes(content[:-8])
        with pytest.raises(OSError, match=WEIGHTS):
            MorseDot.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--prune 0", "prune is 0.0; it must be a share of weights, in (0, 1)"),
        ("--prune 1", "prune is 1.0; it must be a share of weights, in (0, 1)"),
        ("--prune nan", "prune is nan"),
        ("--prune_start 3", "prune_start is 3, but prune is not given"),
        ("--prune_stop 3", "prune_stop is 3, but prune is not given"),
        ("--prune_method one_shot", "prune_method is 'one_shot', but prune is not given"),
        ("--prune_gamma 0.1", "prune_gamma is 0.1, but prune is not given; give --prune too"),
        ("--prune_power 2", "prune_power is 2.0, but prune is not given"),
        ("--prune 0.5 --prune_start 5", "prune_start is 5; it must be in [0, 5)"),
        ("--prune 0.5 --prune_start -1", "prune_start is -1; it must be in [0, 5)"),
        ("--prune 0.5 --prune_start 2 --prune_stop 2", "prune_stop is 2; it must be in (2, 5)"),
        ("--prune 0.5 --prune_stop 5", "prune_stop is 5; it must be in (1, 5)"),
        ("--prune 0.5 --prune_gamma -1", "prune_gamma is -1.0; it must be finite and at least 0"),
        ("--prune 0.5 --prune_power inf", "prune_power is inf; it must be finite and at least 0"),
        ("--prune 0.5 --prune_method one_shot --prune_stop 3", "leave --prune_stop out"),
        ("--prune 0.5 --conv odconv", "prune is 0.5 and conv is 'odconv', whose kernels"),
        ("--prune 0.5 --conv kernel_warehouse", "and conv is 'kernel_warehouse', whose kernels"),
    ],
)
def test_settings_are_checked(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_config(
            TrainDotConfig, arguments(tmp_path, tmp_path, tmp_path / "run", *options.split())
        )
    assert message in capsys.readouterr().err


def test_defaults(tmp_path):
    given = arguments(tmp_path, tmp_path, tmp_path / "run", "--max_train_steps", "3000")
    pruner = parse_config(TrainDotConfig, [*given, "--prune", "0.8"])
    assert prune_bounds(pruner) == (1000, 2400)
    assert prune_bounds(replace(pruner, init_from=tmp_path)) == (0, 2100)
