"""Training a Dot with a down block fewer first, and growing it."""

import copy
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_dot import inputs
from test_train_dot import arguments, base  # noqa: F401
from tiny_transformers import BUILDERS
from train_runs import assert_same_run, weights

from morse import MorseDot
from morse.cli import parse_config
from morse.dot.mixture import GaussianMixture
from morse.training import loop
from morse.training.loop import TrainDotConfig, train_dot
from morse.training.progressive import grow, start_from
from morse.training.run import TrainingRun

GROWING = ("--num_down_blocks", "2", "--block_out_channels", "4", "8", "--progressive_steps", "3",
           "--resample", "ske2grid", "--checkpointing_steps", "1")  # fmt: skip


@pytest.fixture(scope="module")
def configure(base, data_dir, tmp_path_factory):  # noqa: F811
    def make(*options):
        output_dir = tmp_path_factory.mktemp("runs") / "run"
        return parse_config(TrainDotConfig, arguments(base, data_dir, output_dir, *options))

    return make


@pytest.fixture(scope="module")
def whole(configure):
    return train_dot(configure(*GROWING))


class TestGrowth:
    @pytest.fixture
    def start(self, dash, make_dot):
        return make_dot(dash, num_down_blocks=1, block_out_channels=(8,))

    def make(self, dash, *widths, **options):
        torch.manual_seed(4)
        return MorseDot.from_dash(dash, 2, widths, lora_rank=4, **options)

    def test_a_mixture_is_not_grown(self, dash, start):
        start.set_mixture(GaussianMixture(2, 1, (1, 16, 16)))
        dot = self.make(dash, 8, 32)
        grow(dot, start)
        assert dot.mixture is None

    def test_as_wide_as_dash_all_is_kept(self, dash, start):
        dot = self.make(dash, 8, 32)  # Dash's first layer has 32 channels
        grow(dot, start)
        own, old = dot.state_dict(), start.state_dict()
        for name, value in old.items():
            assert torch.equal(own[re.sub("^up_blocks.0", "up_blocks.1", name)], value), name
        learning = {name for name, value in dot.named_parameters() if value.requires_grad}
        new = {"down_blocks.1.", "up_blocks.0."}
        assert all(name.startswith(("lora.", *new)) for name in learning)
        assert {name for name in own if name.startswith((*new, "lora."))} == learning

    def test_narrower_the_convolutions_next_to_the_new_pair_are_new(self, dash, start):
        dot = self.make(dash, 8, 16)
        grow(dot, start)
        learning = {n for n, p in dot.named_parameters() if p.requires_grad and n[:4] != "lora"}
        outer = {name for name in learning if name.startswith(("down_blocks.0", "up_blocks.1"))}
        assert {name.rsplit(".", 1)[0] for name in outer} == {
            "down_blocks.0.downsampler.conv", "up_blocks.1.reduce"}  # fmt: skip
        residual = dot(*inputs())
        assert residual.isfinite().all() and residual.abs().max() > 0

    def test_what_is_frozen_stays_and_the_rest_learns(self, dash, start):
        dot = self.make(dash.requires_grad_(False), 8, 16)
        grow(dot, start)
        before = copy.deepcopy(dot.state_dict())
        learning = [parameter for parameter in dot.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(dot.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(2):
            dot(*inputs()).square().mean().backward()
            assert all(parameter.grad.abs().max() > 0 for parameter in learning)
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in dot.named_parameters():
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name

    def test_the_new_up_sampler_copies_and_the_old_is_kept(self, dash, make_dot):
        start = make_dot(dash, num_down_blocks=1, block_out_channels=(8,), resample="ske2grid")
        start.up_blocks[0].upsample.upt.weight.data.normal_()
        dot = self.make(dash, 8, 16, resample="ske2grid")
        fresh = dot.up_blocks[0].upsample.upt.weight.clone()
        grow(dot, start)
        inner, outer = (block.upsample.upt.weight for block in dot.up_blocks)
        assert torch.equal(outer, start.up_blocks[0].upsample.upt.weight)
        assert torch.equal(inner, fresh) and inner.requires_grad and not outer.requires_grad

    @pytest.mark.parametrize(
        ("options", "name"),
        [({"block_out_channels": (4,)}, "conv_in."), ({"lora_rank": 2}, "lora."),
         ({"layers_per_block": 2}, "down_blocks.0.resnets.1")],
    )  # fmt: skip
    def test_other_settings_are_refused(self, dash, make_dot, options, name):
        start = make_dot(dash, **{"num_down_blocks": 1, "block_out_channels": (8,), **options})
        with pytest.raises(ValueError, match=rf"num_down_blocks=1.*'{name}"):
            grow(self.make(dash, 8, 16), start)

    def test_what_a_frozen_layer_could_not_learn_is_refused(self, dash, start):
        with pytest.raises(ValueError, match=r"'conv_in\.weight' has no counterpart"):
            start_from(self.make(dash, 8, 16, history=1), start)

    def test_grids_that_differ_are_told(self):
        dash = BUILDERS["sd3"]()
        # In patches of 2, filled up to 6x10 and to 8x12.
        settings = {"conv": "gridconv", "conv_options": {"sample_size": (12, 20)}, "lora_rank": 0}
        start, dot = (MorseDot.from_dash(dash, m, (8,) * m, **settings) for m in (1, 2))
        with pytest.raises(ValueError, match=r"conv1.*width are multiples of 8"):
            grow(dot, start)

    @pytest.mark.filterwarnings("ignore:conv='kernel_warehouse'")
    def test_banks_stay_next_to_a_pair_as_wide_as_dash(self, dash, make_dot):
        banks = {"conv": "kernel_warehouse"}
        start = make_dot(dash, num_down_blocks=1, block_out_channels=(8,), **banks)
        dot = self.make(dash, 8, 32, **banks)
        grow(dot, start)
        assert torch.equal(dot.warehouses[0].cells, start.warehouses[0].cells)
        for widths, sharing in (((8, 16), "shapes"), ((8, 32), "all")):
            options = banks | {"conv_options": {"sharing": sharing}}
            with pytest.raises(ValueError, match=r"sharing=shapes .* width, 32, and have it nowhe"):
                grow(self.make(dash, *widths, **options), start)


def test_a_dot_of_another_dash_is_refused(dash, build_unet, make_dot):
    start = make_dot(build_unet(channels=(8, 16)), num_down_blocks=1, block_out_channels=(8,))
    with pytest.raises(ValueError, match="init_from is a Dot of another network, in 'down_blocks"):
        start_from(make_dot(dash, num_down_blocks=1, block_out_channels=(8,)), start)


def test_a_run_grows_the_dot_of_its_first_stage(whole):
    first, last = (MorseDot.from_pretrained(path) for path in (whole / "first_stage", whole))
    assert (first.config.num_down_blocks, last.config.num_down_blocks) == (1, 2)
    assert last.config.resample == first.config.resample == "ske2grid"
    old, new = weights(whole / "first_stage"), weights(whole)
    for name in ("conv_in.weight", "norm_out.weight", "conv_out.weight", "jump_time.weight"):
        assert torch.equal(old[name], new[name])
    lora = [name for name in old if name.startswith("lora.")]
    assert lora and not all(torch.equal(old[name], new[name]) for name in lora)
    names = {path.name for path in whole.glob("*/checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-3"} and (whole / "checkpoint-5").is_dir()
    settings = json.loads((whole / "train_config.json").read_text())
    assert (settings["progressive_steps"], settings["init_from"]) == (3, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num_down_blocks", "3", "--block_out_channels", "4", "4", "4"),
         "sample_size must be positive multiples of 16, got 8x8"),
        (("--conv", "kernel_warehouse", "--block_out_channels", "4", "4"),
         "or a first stage, .* Banks of kernel_warehouse stay"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:conv='kernel_warehouse'")
def test_what_cannot_grow_is_told_before_the_first_stage(configure, options, message):
    config = configure(*GROWING, *options)
    with pytest.raises(ValueError, match=message):
        train_dot(config)
    assert not (config.output_dir / "first_stage").exists()


def test_resampling_alone_starts_from_a_plain_dot(configure):
    plain = train_dot(configure())
    config = configure("--init_from", str(plain), "--resample", "ske2grid", "--max_train_steps",
                       "1", "--lr_warmup_steps", "1", "--learning_rate", "1e-12")  # fmt: skip
    new = weights(train_dot(config))
    matrix = new.pop("up_blocks.0.upsample.upt.weight")
    assert matrix.shape == (64, 16) and (matrix[:16] - torch.eye(16)).abs().max() < 1e-6
    torch.testing.assert_close(new, weights(plain))


@pytest.mark.parametrize("stop", [("first_stage", 1), ("run", 3)])
def test_interrupted_in_either_stage_and_resumed_gives_the_same_bits(
    configure, whole, stop, monkeypatch
):
    config, one_pass = configure(*GROWING), TrainingRun._forward_backward

    def interrupt(run, batch, micro_step):
        loss = one_pass(run, batch, micro_step)
        if (run.config.output_dir.name, run.step) == stop:
            raise KeyboardInterrupt
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_forward_backward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_dot(config)
    assert not (config.output_dir / "config.json").exists()
    resumed = train_dot(replace(config, resume_from_checkpoint="latest"))
    assert_same_run(resumed, whole, 5)
    assert_same_run(resumed / "first_stage", whole / "first_stage", 3)


@pytest.mark.parametrize("last", [2, 3])
def test_time_that_is_up_in_the_first_stage_or_right_after(configure, whole, monkeypatch, last):
    config = configure(*GROWING, "--max_train_seconds", "1000")
    clock = iter([0.0, 1001.0])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        patch.setattr(TrainingRun, "_out_of_time", lambda run: run.step == last)
        folder = train_dot(config)
    assert folder.name == "first_stage"
    assert MorseDot.from_pretrained(folder).config.num_down_blocks == 1
    assert not (config.output_dir / "config.json").exists()
    resumed = train_dot(replace(config, resume_from_checkpoint="latest"))
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_fewer_steps_of_a_resumed_first_stage(configure, whole, monkeypatch):
    """Those that it has are enough, where fewer are asked for now; time is that of both stages."""
    config = configure(*GROWING, "--max_train_steps", "1", "--max_train_seconds", "1000")
    clock, seconds, train = iter([0.0, 400.0]), [], loop._train_stage
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(
        loop,
        "_train_stage",
        lambda stage, *rest: seconds.append(stage.max_train_seconds) or train(stage, *rest),
    )
    shutil.copytree(whole / "first_stage", config.output_dir / "first_stage")
    config = replace(config, progressive_steps=2, resume_from_checkpoint="latest")
    assert train_dot(config) == config.output_dir
    assert MorseDot.from_pretrained(config.output_dir).config.num_down_blocks == 2
    assert seconds == [1000, 600]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--progressive_steps", "-1"), "progressive_steps is -1; it must be 0 or more"),
        (("--progressive_steps", "2"), "needs num_down_blocks of 2 or 3"),
        ((*GROWING, "--prune", "0.5"), "and no prune"),
        (("--resample", "cubic"), "invalid choice: 'cubic'"),
    ],
)
def test_settings_are_checked(configure, options, message, capsys):
    with pytest.raises(SystemExit):
        configure(*options)
    assert message in capsys.readouterr().err
