import json
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from idx_files import write_parts
from torch import nn
from torch.testing import assert_close
from train_runs import dot_arguments, save_pixels, weights

from morse import MorseDot, enable_morse
from morse.cli import parse_config
from morse.dot.gate import Gate
from morse.dot.hub import renew_card
from morse.sampling import JumpPoint
from morse.saved_plans import SavedPlan
from morse.training.frozen import FrozenDash
from morse.training.gate import calibration_pairs, fit_gate
from morse.training.guidance import Conditions
from morse.training.loop import TrainDotConfig, train_dot
from morse.training.pairs import dot_outputs
from morse.training.schedule import NoiseSchedule
from morse.training.source import ConditionedImages
from morse.training.validation import validation_pairs
from morse.training.windows import fresh_window, pick_pairs

TABLE = {
    "gap_edges": [20.0, 100.0],
    "timestep_edges": [500.0],
    "alpha": [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]],
}
SCHEDULE = NoiseSchedule.variance_preserving(DDPMScheduler().alphas_cumprod)


def constant(value):
    return {"gap_edges": [], "timestep_edges": [], "alpha": [[value]]}


def test_bins_have_their_upper_edge():
    gate = Gate.from_config(TABLE)
    timestep = torch.tensor([500, 501, 500, 600, 100, 900])
    since = timestep + torch.tensor([20, 20, 21, 100, 101, 99])
    scaled = gate(torch.ones(6, 1, 2, 2), timestep, since)
    expected = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.4]).reshape(-1, 1, 1, 1)
    assert_close(scaled, expected.expand(6, 1, 2, 2))
    # One timestep for the batch, packed rows and half precision.
    packed = gate(torch.ones(3, 5, 2).half(), torch.tensor(100.5), torch.tensor([130.0]))
    assert_close(packed, torch.full((3, 5, 2), 0.3).half())
    assert Gate.from_config(json.loads(json.dumps(gate.to_config()))) == gate


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gap_edges": [100.0, 20.0]}, "gap_edges"),
        ({"timestep_edges": []}, "alpha"),
        ({"alpha": [[0.1, 0.2], [0.3, 1.4], [0.5, 0.6]]}, r"\[0, 1\]"),
        ({"alpha": [[0.1, 0.2], [0.3, float("nan")], [0.5, 0.6]]}, r"\[0, 1\]"),
        ({"more": 1}, "keys"),
    ],
)
def test_wrong_gates_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        Gate.from_config(TABLE | change)


def example(dash):
    torch.manual_seed(2)
    sample, output = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16)
    jump = JumpPoint(sample, torch.tensor([700, 400]), output)
    return sample + 0.1, torch.tensor([690, 250]), jump


@torch.no_grad()
def test_the_residual_is_scaled_also_merged_and_saved(make_dot, dash, tmp_path):
    dot, inputs = make_dot(dash, num_down_blocks=1), example(dash)
    for merged in (False, True):
        dot.merge_lora() if merged else dot.unmerge_lora()
        plain = dot.set_gate(None)(*inputs)
        factors = torch.tensor([0.2, 0.5]).reshape(2, 1, 1, 1)
        assert torch.equal(dot.set_gate(TABLE)(*inputs), plain * factors)
        assert torch.equal(dot.set_gate(constant(1.0))(*inputs), plain)
    names = set(dot.set_gate(TABLE).state_dict())
    dot.save_pretrained(tmp_path)
    loaded = MorseDot.from_pretrained(tmp_path)
    assert loaded.gate == Gate.from_config(TABLE) and set(loaded.state_dict()) == names
    assert torch.equal(loaded.bind(dash).merge_lora()(*inputs), dot(*inputs))
    assert "gate" in dot.model_card()


def test_a_gate_used_in_inference_serves_in_training(make_dot, dash):
    dot, inputs = make_dot(dash, num_down_blocks=1).set_gate(TABLE), example(dash)
    with torch.inference_mode():
        dot(*inputs)
    dot(*inputs).square().sum().backward()
    assert dot.conv_out.weight.grad.abs().max() > 0


def test_a_shut_gate_is_reuse_in_a_pipeline(make_dot, make_pipe):
    pipe = make_pipe()
    dot = make_dot(pipe.unet, num_down_blocks=1)

    def sample(gate, network):
        enable_morse(pipe, network.set_gate(gate))
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe(plan="DoDo", generator=generator, output_type="np").images)

    untrained = MorseDot.from_dash(pipe.unet, num_down_blocks=1)
    reuse, plain = sample(None, untrained), sample(None, dot)
    assert torch.equal(sample(constant(0.0), dot), reuse)
    assert not torch.equal(plain, reuse)
    assert torch.equal(sample(constant(1.0), dot), plain)


class Stub(nn.Module):
    """Gives residuals that a function makes of the pairs; takes a gate as MorseDot does."""

    def __init__(self, make):
        super().__init__()
        self.make, self.gate = make, None
        self.config = type("Config", (), {"independent": False})

    def set_gate(self, gate):
        self.gate = Gate.from_config(gate)

    def forward(self, sample, timestep, jump, **inputs):
        residual = self.make(sample, timestep, jump, **inputs)
        return residual if self.gate is None else self.gate(residual, timestep, jump.timestep)


def model(sample, timestep, return_dict=False, shift=None):
    moved = sample.roll(1, -1) + timestep.reshape(-1, 1, 1, 1) / 300
    return (torch.tanh(moved if shift is None else moved + shift.reshape(-1, 1, 1, 1)),)


def exact(sample, timestep, jump, **inputs):
    return model(sample, timestep, **inputs)[0] - jump.model_output


def noise(sample, timestep, jump, **inputs):
    return torch.randn(sample.shape, generator=torch.Generator().manual_seed(5))


def mixed(sample, timestep, jump, **inputs):
    # Good at large timesteps, too strong at small ones, and noisy.
    scale = 0.5 + 400 / (timestep + 100).reshape(-1, 1, 1, 1)
    wrong = 0.05 * noise(sample, timestep, jump)
    return scale * exact(sample, timestep, jump, **inputs) + wrong


def batches(guided=False, count=200):
    dash = FrozenDash(model, SCHEDULE, "epsilon")
    found = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        clean = torch.randn(count, 1, 4, 4, generator=generator) / 2
        conditions = Conditions()
        if guided:
            shift = torch.rand(count, generator=generator)
            scale = 2 + 3 * torch.rand(count, generator=generator)
            conditions = Conditions({"shift": shift}, {"shift": torch.zeros(1)}, scale)
        window = fresh_window(dash, clean, generator, 5, "plans", conditions)
        found.append(pick_pairs(dash, window, 8, generator, False))
    return found


def errors_by_bin(dot, found, gate):
    """Squared guided errors, (bins,), computed through Dot's own forward method."""
    sums = torch.zeros(sum(map(len, gate.alpha)), dtype=torch.float64)
    for pairs in found:
        wrong = (pairs.guided(dot_outputs(dot, pairs)) - pairs.target).double()
        rows = slice(None, None, pairs.conditions.branches)
        index = gate.bins(pairs.timestep[rows], pairs.jump.timestep[rows])
        sums.index_add_(0, index, wrong.square().flatten(1).sum(1))
    return sums


@pytest.mark.parametrize("guided", [False, True])
def test_no_bin_is_worse_than_dot_or_its_base(guided):
    dot, found = Stub(mixed), batches(guided)
    fitted = fit_gate(dot, found, 1000, min_pairs=1)
    gate = fitted.gate
    counts = torch.tensor(fitted.counts)
    assert counts.sum() == 2 * 200 * 8 and (counts > 0).sum() >= 8
    gated = errors_by_bin(dot, found, gate)
    dot.set_gate(None)
    without = errors_by_bin(dot, found, gate)
    base = errors_by_bin(Stub(lambda sample, *_, **__: torch.zeros_like(sample)), found, gate)
    best = torch.minimum(without, base)
    assert (gated <= best * (1 + 1e-5)).all() and (gated < 0.97 * best).any()
    expected = [float(errors.sum() / base.sum()) for errors in (gated, without)]
    assert_close(list(fitted.ratios), expected, rtol=1e-4, atol=1e-6)
    # No other factor is better: the closed form is the least of the parabola.
    for change in (-0.02, 0.02):
        moved = [[min(1, max(0, value + change)) for value in row] for row in gate.alpha]
        dot.set_gate(replace(gate, alpha=tuple(map(tuple, moved))).to_config())
        assert (errors_by_bin(dot, found, gate) >= gated * (1 - 1e-5)).all()


@pytest.mark.parametrize("guided", [False, True])
def test_noise_is_shut_off_and_an_exact_dot_let_through(guided):
    found = batches(guided)
    fitted = fit_gate(Stub(noise), found, 1000)
    # Pairs of one window are alike, so that a bin of 100 pairs has few independent ones.
    assert fitted.overall < 0.02 and torch.tensor(fitted.gate.alpha).max() < 0.1
    assert fitted.ratios[0] < 1 < fitted.ratios[1]
    # Targets are kept in half precision.
    assert torch.tensor(fit_gate(Stub(exact), found, 1000).gate.alpha).min() > 0.99


def test_bins_with_few_pairs_take_the_factor_of_all():
    fitted = fit_gate(Stub(mixed), batches(), 1000, min_pairs=10**6)
    assert set(sum(fitted.gate.alpha, ())) == {fitted.overall} and 0 < fitted.overall < 1


class Accelerated(torch.Tensor):
    """Stands in for a tensor on MPS, which has no float64."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("no float64 on this device")


def test_products_are_double_on_the_cpu_alone():
    found = batches()
    moved = [replace(pairs, target=pairs.target.as_subclass(Accelerated)) for pairs in found]
    assert fit_gate(Stub(mixed), moved, 1000) == fit_gate(Stub(mixed), found, 1000)


def test_fitting_refuses_what_has_no_residual():
    dot = Stub(mixed)
    with pytest.raises(ValueError, match="batches is empty"):
        fit_gate(dot, [], 1000)
    dot.config.independent = True
    with pytest.raises(ValueError, match="independent"):
        fit_gate(dot, batches(), 1000)


OPTIONS = """--train_batch_size 3 --lr_warmup_steps 0 --learning_rate 1e-2 --validation_steps 0
    --validation_images 4 --num_down_blocks 1 --block_out_channels 4 --lora_rank 2 --window_steps 3
    --timestep_sampling plans"""


@pytest.fixture(scope="module")
def folders(build_unet, tmp_path_factory):
    data, base = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("base")
    write_parts(data, 10, 8)
    return data, save_pixels(base, build_unet(channels=(8, 8), sample_size=8))


def config_of(folders, output_dir, *options):
    AcceleratorState._reset_state(reset_partial_state=True)
    data, base = folders
    return parse_config(TrainDotConfig, dot_arguments(OPTIONS, base, data, output_dir, *options))


def test_train_dot_fits_a_gate_also_to_a_dot_that_there_is(folders, tmp_path, capsys):
    plain = train_dot(config_of(folders, tmp_path / "plain", "--max_train_steps", "3"))
    dot = MorseDot.from_pretrained(plain)
    assert dot.gate is None
    records = {
        "speed_ratio": 6.0,
        "plan_ratio": {"default": 1.5},
        "plans": {"DDIMScheduler": [SavedPlan(4, "DooDoo").to_config()]},
    }
    dot.register_to_config(**records)
    dot.save_pretrained(plain)
    options = ("--init_from", str(plain), "--max_train_steps", "0", "--fit_gate")
    folder = train_dot(config_of(folders, tmp_path / "gated", *options))
    gated = MorseDot.from_pretrained(folder)
    assert gated.gate is not None and {name: gated.config[name] for name in records} == records
    assert "gate: " in capsys.readouterr().out
    before, after = weights(plain), weights(folder)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    both = train_dot(config_of(folders, tmp_path / "both", "--max_train_steps", "3", "--fit_gate"))
    assert MorseDot.from_pretrained(both).gate == gated.gate
    cards = ((path / "README.md").read_text() for path in (plain, folder, both))
    assert ["gate on the residual" in card for card in cards] == [False, True, True]


def test_a_card_with_words_of_people_is_not_renewed(make_dot, dash, tmp_path):
    dot = make_dot(dash)
    dot.save_pretrained(tmp_path)
    card, before = tmp_path / "README.md", dot.model_card()
    dot.set_gate(Gate((), (), ((0.5,),)).to_config())
    card.write_text(before + "Ours.")
    renew_card(dot, tmp_path, before)
    assert card.read_text() == before + "Ours."


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--max_train_steps", "0"), "max_train_steps"),
        (("--max_train_steps", "0", "--fit_gate"), "max_train_steps"),
        (("--fit_gate", "--independent"), "fit_gate"),
        (("--fit_gate", "--norm", "dnr"), "fit_gate"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folders, tmp_path, capsys, options, match):
    with pytest.raises(SystemExit):
        config_of(folders, tmp_path, *options)
    assert match in capsys.readouterr().err


def test_calibration_takes_other_images_than_validation(folders, tmp_path, monkeypatch):
    from morse.training.frozen import load_frozen_pipeline
    from morse.training.source import open_source

    config = config_of(folders, tmp_path / "unused", "--max_train_steps", "1")
    source = open_source(load_frozen_pipeline(config, torch.device("cpu")), config, "test")
    asked, plain = [], ConditionedImages.__getitems__
    monkeypatch.setattr(
        ConditionedImages,
        "__getitems__",
        lambda self, rows: asked.append(rows) or plain(self, rows),
    )
    validation_pairs(source, config)
    calibration_pairs(source, config)
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7]]
