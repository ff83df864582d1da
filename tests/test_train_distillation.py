"""train_dot with --distill: feature losses train Dot and leave nothing behind."""

import copy
import doctest
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler
from idx_files import write_parts
from safetensors.torch import load_file
from tiny_text import dit_pipeline, sd3_pipeline
from torch.testing import assert_close
from train_runs import assert_same_run, copy_unfinished, dot_arguments, weights

from morse import MorseDot
from morse.cli import parse_config
from morse.distillation import af_dcd, norm, norm_transform
from morse.dot.grid import Grid
from morse.training.distillation import add_distillation
from morse.training.distillation_terms import TERMS, shrink
from morse.training.feature_taps import read_student, read_teacher
from morse.training.frozen import freeze_pipeline
from morse.training.loop import TrainDotConfig, build_dot, train_dot, window_loss
from morse.training.source import draw_windows, open_source
from morse.training.windows import pick_pairs

OPTIONS = """--train_batch_size 2 --max_train_steps 3 --lr_warmup_steps 1 --learning_rate 1e-2
    --checkpointing_steps 2 --logging_steps 1 --validation_steps 0 --validation_images 2 --seed 3
    --num_down_blocks 1 --block_out_channels 4 --lora_rank 2"""
ALL = ("norm", "af_dcd", "scale_kd")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_parts(folder, 6, 3, num_classes=3)
    return folder


@pytest.fixture(scope="module")
def pipe(build_unet):
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    return DDPMPipeline(build_unet(channels=(8, 16), sample_size=8), scheduler)


@pytest.fixture(scope="module")
def base(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_config(base, data_dir, tmp_path_factory):
    def make(*options):
        AcceleratorState._reset_state(reset_partial_state=True)
        output_dir = tmp_path_factory.mktemp("runs") / "run"
        return parse_config(
            TrainDotConfig, dot_arguments(OPTIONS, base, data_dir, output_dir, *options)
        )

    return make


@pytest.fixture(scope="module")
def all_run(make_config):
    config = make_config("--distill", *ALL, "--gradient_accumulation_steps", "2")
    return config, train_dot(config)


@pytest.fixture(scope="module")
def setup(make_config, pipe):
    """A function giving the trained module of a config, with what it is trained on."""

    def make(*options, pipeline=pipe):
        config = make_config(*options)
        source = open_source(freeze_pipeline(pipeline), config, "train")
        dot = build_dot(source.pipeline.dash.model, config)
        return add_distillation(dot, source, config), source, config

    return make


def draw_pairs(source, config):
    batch, generator = source.__getitems__([0, 1]), torch.Generator().manual_seed(0)
    window = draw_windows(source, config, batch, generator)
    return pick_pairs(source.pipeline.dash, window, 1, generator, first=False)


def call(model, pairs, rng=None):
    given = {} if rng is None else {"rng": rng}
    return model(pairs.sample, pairs.timestep, pairs.jump, **given, **pairs.conditions.inputs())


def randomise(module):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def count_hooks(*modules):
    return sum(
        len(part._forward_hooks) + len(part._forward_pre_hooks)
        for module in modules
        for part in module.modules()
    )


# The command


def test_all_losses_train_and_the_result_is_a_plain_dot(all_run, make_config, capsys):
    _, folder = all_run
    plain = train_dot(make_config("--gradient_accumulation_steps", "2"))
    found, expected = weights(folder), weights(plain)
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in expected.items()}
    assert any(not torch.equal(value, expected[name]) for name, value in found.items())
    assert MorseDot.from_pretrained(folder).config.lora_rank == 2
    whole = load_file(folder / "checkpoint-3" / "model.safetensors")
    parts = {name.split(".")[0] for name in whole}
    assert parts == {"dot", "transform", "terms"}
    assert "once more for each" not in capsys.readouterr().out  # of the plain run


def test_the_losses_own_parameters_are_trained(all_run):
    _, folder = all_run
    two, three = (load_file(folder / f"checkpoint-{n}" / "model.safetensors") for n in (2, 3))
    same = [name for name, value in three.items()
            if torch.equal(value, two[name]) and not name.startswith("dot.")]  # fmt: skip
    assert same == []


def test_resumed_it_gives_the_same_bits(all_run, tmp_path):
    config, folder = all_run
    AcceleratorState._reset_state(reset_partial_state=True)
    unfinished = copy_unfinished(folder, tmp_path / "run", 3)
    resumed = replace(config, output_dir=unfinished, resume_from_checkpoint="latest")
    assert_same_run(train_dot(resumed), folder, 3)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="is from another network"):
        train_dot(replace(resumed, distill=("norm",), max_train_steps=4))


def test_cached_windows_and_on_policy_ones(make_config, capsys):
    cached = ("--cache_pairs", "4", "--window_steps", "2", "--distill", "af_dcd")
    on_policy = ("--on_policy", "--window_steps", "2", "--distill", "norm")
    for options in (cached, on_policy):
        found = weights(train_dot(make_config(*options)))
        assert "Dash is evaluated once more for each training pair" in capsys.readouterr().out
        assert found["conv_out.weight"].any() and found["conv_out.bias"].any()  # begun at zero


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--distill", "norms"), "invalid choice: 'norms' (choose from "),
        (("--distill", "norm", "norm"), "give each once"),
        (("--distill", "norm", "norm_transform_only"), "of ('norm', 'norm_transform_only') one"),
        (("--distill", *ALL, "--distill_weight", "1", "2"), "distill_weight is (1.0, 2.0)"),
        (("--distill", "norm", "--distill_weight", "-1"), "distill_weight is (-1.0,)"),
        (("--distill_weight", "0.5"), "distill_weight is (0.5,), but distill is not given"),
        (("--distill", "norm", "--compile"), "neither be compiled nor captured"),
        (("--distill", "norm", "--cuda_graphs"), "neither be compiled nor captured"),
    ],
)
def test_settings_are_checked(make_config, options, message, capsys):
    with pytest.raises(SystemExit):
        make_config(*options)
    assert message in capsys.readouterr().err


def test_unknown_names_list_the_known(make_config):
    with pytest.raises(ValueError, match=r"\['nrom'\] are unknown.*'norm', 'af_dcd', 'scale_kd'"):
        replace(make_config(), distill=("nrom",))


# What is added to Dot


def test_without_names_nothing_is_added(setup):
    assert type(setup()[0]) is MorseDot


@pytest.mark.parametrize("names", [(name,) for name in (*TERMS, "norm_transform_only") if
                                   name != "scale_kd_tpp"] + [ALL])  # fmt: skip
def test_at_the_start_dot_is_what_it_was(setup, names):
    model, source, config = setup("--distill", *names)
    dot, pairs = setup()[0], draw_pairs(source, config)
    for module in (model, dot):
        torch.nn.init.normal_((module if module is dot else module.dot).conv_out.weight,
                              generator=torch.Generator().manual_seed(1))  # fmt: skip
    expected = call(dot, pairs)
    residual, loss = call(model, pairs, torch.Generator().manual_seed(0))
    assert torch.equal(residual, expected) and torch.equal(call(model, pairs), expected)
    assert loss.isfinite() and (loss > 0) == (names != ("norm_transform_only",))
    assert_close(call(model.finished(), pairs), expected)


def test_untrained_the_output_is_zero_and_no_hooks_stay(setup):
    model, source, config = setup("--distill", *ALL)
    dash = source.pipeline.dash.model
    before = count_hooks(dash, model)
    residual, loss = call(model, draw_pairs(source, config), torch.Generator())
    loss.backward()
    assert not residual.any() and count_hooks(dash, model) == before == 0
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 1, 8, 8), torch.zeros(3), None, rng=torch.Generator())
    assert count_hooks(dash, model) == 0
    assert all(p.grad is None and not p.requires_grad for p in dash.parameters())


def test_folding_changes_no_output(setup):
    model, source, config = setup("--distill", "norm")
    randomise(model)
    dash = source.pipeline.dash
    model, double = model.double(), copy.deepcopy(dash.model).double()
    model.bind(double)
    pairs = draw_pairs(source, config)
    jump = type(pairs.jump)(*(value.double() for value in (pairs.jump.sample,
                            pairs.jump.timestep, pairs.jump.model_output)))  # fmt: skip
    folded = model.finished()
    outputs = [m(pairs.sample.double(), pairs.timestep, jump) for m in (model, folded, model.dot)]
    assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
    assert (outputs[0] - outputs[2]).abs().max() > 1e-4
    assert folded.state_dict().keys() == model.dot.state_dict().keys()
    changed = {n for n, v in folded.state_dict().items()
               if not torch.equal(v, model.dot.state_dict()[n])}  # fmt: skip
    assert changed == {"up_blocks.0.reduce.weight"}


def test_loss_is_the_weighted_sum(setup):
    names = ("af_dcd", "feature_mse")
    model, source, config = setup("--distill", *names, "--distill_weight", "0.5", "2")
    pairs = draw_pairs(source, config)
    _, loss = call(model, pairs, torch.Generator().manual_seed(0))
    dash, dot = source.pipeline.dash.model, model.dot
    teacher = read_teacher(dash, dot, pairs.sample, pairs.timestep, {})
    _, student = read_student(dash, dot, lambda: call(dot, pairs), [])
    rng = torch.Generator().manual_seed(0)
    parts = [model.terms[name](student, teacher, rng) for name in names]
    assert_close(loss, 0.5 * parts[0] + 2 * parts[1])
    goal = teacher.last.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    assert_close(parts[1], (student.trunk - goal).square().mean() / goal.var())


def test_the_loss_of_a_step_has_both_parts(setup):
    model, source, config = setup("--distill", "feature_mse")
    batch = source.__getitems__([0, 1])

    def compute(config, module):
        rng = torch.Generator().manual_seed(0)
        return window_loss(source, config, None)(module, batch, rng)

    whole = compute(config, model)
    plain = compute(replace(config, distill=()), model.dot)
    generator = torch.Generator().manual_seed(0)
    window = draw_windows(source, config, batch, generator)
    pairs = pick_pairs(source.pipeline.dash, window, 1, generator, first=False)
    features = call(model, pairs, generator)[1]
    assert features > 0 and plain > 0
    assert_close(whole, plain * (1 + features))


# Where features are read


def test_teacher_and_student_features(setup):
    """Dash's are those of its own layers; Dot's come from 2^m times fewer rows and columns."""
    model, source, config = setup("--distill", "scale_kd")
    randomise(model.dot)
    pairs, dash = draw_pairs(source, config), source.pipeline.dash.model
    teacher = read_teacher(dash, model.dot, pairs.sample, pairs.timestep, {})
    assert_close(dash.conv_out(teacher.last), dash(pairs.sample, pairs.timestep).sample)
    residual, student = read_student(dash, model.dot, lambda: call(model.dot, pairs), [])
    assert student.mid.shape == (2, 16, 4, 4) and student.trunk.shape == (2, 8, 4, 4)
    assert student.fine.shape == (2, 4, 8, 8) and teacher.last.shape == (2, 8, 8, 8)
    end = torch.nn.functional.silu(model.dot.norm_out(student.fine))
    assert_close(model.dot.conv_out(end), residual)
    gradients = torch.autograd.grad(student.mid.sum(), list(model.dot.lora.parameters()),
                                    allow_unused=True)  # fmt: skip
    assert any(g is not None and g.any() for g in gradients)


@pytest.mark.parametrize(
    ("m", "size"), [(1, (8, 8)), (2, (6, 6)), (3, (28, 9)), (2, (16, 6)), (3, (4, 17)), (3, (3, 1))]
)
def test_dashs_features_shrink_as_dots_grid_does(m, size):
    """Each cell has the mean of the positions that Dot makes it of, without those filled up."""
    feature = torch.randn(2, 3, *size, dtype=torch.float64)
    side = 2**m
    rows, columns = (range(0, n, side) for n in size)
    cells = [feature[..., y : y + side, x : x + side].mean((2, 3)) for y in rows for x in columns]
    expected = torch.stack(cells, -1).unflatten(-1, (len(rows), len(columns)))
    dots = Grid(*size, packed=False, multiple=side).spread(feature)[..., ::side, ::side]
    assert dots.shape == expected.shape
    assert_close(shrink(feature, dots), expected)


@pytest.mark.parametrize("names", [("norm",), ("feature_mse", "norm_transform_only")])
def test_what_would_fill_a_pruned_dots_zeros_is_refused(setup, names):
    dot, source, config = setup()
    dot.register_to_config(sparse=True)
    with pytest.raises(ValueError, match=f"pruned Dot.*'{names[-1]}' would fill.*then prune"):
        add_distillation(dot, source, replace(config, distill=names))
    assert add_distillation(dot, source, replace(config, distill=("feature_mse",))).terms


def test_tpp_is_refused_for_unets(setup):
    with pytest.raises(ValueError, match="UNet: its last layers take skip connections"):
        setup("--distill", "scale_kd_tpp")


@pytest.mark.parametrize("build", [dit_pipeline, sd3_pipeline])
def test_transformers(setup, build):
    names = ("--class_names", "cat", "dog", "emu") if build is sd3_pipeline else ()
    tpp = () if build is sd3_pipeline else ("scale_kd_tpp",)
    model, source, config = setup(*names, "--distill", *ALL, *tpp, pipeline=build())
    residual, loss = call(model, draw_pairs(source, config), torch.Generator())
    loss.backward()
    unused = [name for name, parameter in model.named_parameters()
              if name.startswith("terms") and parameter.grad is None]  # fmt: skip
    assert loss.isfinite() and not residual.any() and unused == []
    assert count_hooks(source.pipeline.dash.model, model) == 0
    if build is sd3_pipeline:
        with pytest.raises(ValueError, match="single block or a text stream"):
            setup(*names, "--distill", "scale_kd_tpp", pipeline=build())


def test_tpp_on_the_teachers_own_tokens_gives_its_final_feature(setup):
    model, source, config = setup("--distill", "scale_kd_tpp", pipeline=dit_pipeline())
    pairs, dash = draw_pairs(source, config), source.pipeline.dash.model
    inputs = pairs.conditions.inputs()
    tokens = []
    handle = dash.transformer_blocks[0].register_forward_hook(
        lambda _, args, output: tokens.append(output)
    )
    teacher = read_teacher(dash, model.dot, pairs.sample, pairs.timestep, inputs)
    handle.remove()
    found = model.terms["scale_kd_tpp"].scale_kd.tpp(tokens[0], calls=teacher.calls)
    assert_close(found.transpose(1, 2).reshape(teacher.final.shape), teacher.final)
    assert len(teacher.calls) == 1


@pytest.mark.parametrize("module", [af_dcd, norm, norm_transform])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 1 and result.failed == 0
