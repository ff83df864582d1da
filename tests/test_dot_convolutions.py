"""Dynamic convolutions (ODConv, KernelWarehouse, GridConv) in Dot's extra blocks."""

import copy
import json
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.state import AcceleratorState
from attached import in_two_threads
from diffusers import DDPMPipeline, DDPMScheduler
from idx_files import write_parts
from safetensors.torch import load_file
from test_transformer_dots import inputs as transformer_inputs
from tiny_pipelines import TEXT_CHANNELS, text_unet
from tiny_transformers import BUILDERS, conditions
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from train_runs import assert_same_run

from morse import MorseDot, MorsePipeline
from morse.cli import parse_config
from morse.dot import conv_layers
from morse.dot.conv_layers import DotKWConv2d, DotODConv2d, share_time
from morse.dot.convolutions import anneal
from morse.modules import GridConv2d, Warehouse
from morse.sampling import JumpPoint
from morse.training.convolutions import annealing_steps, parse_conv_options, warn_unless_annealed
from morse.training.loop import TrainDotConfig, build_dot, train_dot
from morse.training.progressive import first_stage, second_stage

CASES = {
    "odconv": ("odconv", {"num_kernels": 2}),
    "odconv-time": ("odconv", {"condition": "time", "num_kernels": 2}),
    "kernel_warehouse": ("kernel_warehouse", {}),
    "kernel_warehouse-time": ("kernel_warehouse", {"condition": "time", "budget": 1}),
    "gridconv": ("gridconv", {"paddings": ["circular", "zeros"]}),
}
every = pytest.mark.parametrize("case", CASES)
listening = pytest.mark.parametrize("case", ["odconv-time", "kernel_warehouse-time"])


def options(case):
    conv, given = CASES[case]
    return {"conv": conv, "conv_options": given}


@pytest.fixture
def dash(build_unet):
    return build_unet(channels=(16, 16))


def inputs(batch_size=3, size=16, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample, before, output = torch.randn(3, batch_size, channels, size, size, generator=generator)
    times = 600 - 100 * torch.arange(batch_size)
    return sample, times, JumpPoint(before, times + 100, output)


def stirred(dash, case, scale=0.1, **more):
    """A Dot of which no weight is as it began."""
    torch.manual_seed(1)
    settings = {"num_down_blocks": 2, "block_out_channels": (8, 16), "lora_rank": 2, **more}
    dot = MorseDot.from_dash(dash, **settings, **options(case))
    with torch.no_grad():
        for parameter in dot.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return dot.eval()


def dynamic_layers(dot):
    kinds = (DotODConv2d, DotKWConv2d, GridConv2d)
    return [name for name, module in dot.named_modules() if isinstance(module, kinds)]


class TestPlaces:
    def test_the_3x3_convolutions_of_the_extra_blocks_and_no_other(self, dash):
        resnets = [f"{side}.{index}.resnets.0.conv{number}" for side in ("down_blocks", "up_blocks")
                   for index in range(2) for number in (1, 2)]  # fmt: skip
        strided = [f"down_blocks.{index}.downsampler.conv" for index in range(2)]
        for case in CASES:
            dot = MorseDot.from_dash(dash, **options(case))
            expected = resnets if case == "gridconv" else resnets + strided
            assert sorted(dynamic_layers(dot)) == sorted(expected)
            assert type(dot.conv_in) is type(dot.up_blocks[0].reduce) is nn.Conv2d

    def test_plain_convolutions_are_the_default(self, dash):
        dots = []
        for given in ({}, {"conv": "conv"}):
            torch.manual_seed(0)
            dots.append(MorseDot.from_dash(dash, **given))
        assert dynamic_layers(dots[0]) == [] and "plain" in str(dots[0].convolution_summary())
        first, second = (dot.state_dict() for dot in dots)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_odconv_begins_as_plain_convolutions(self, dash, make_dot):
        plain = make_dot(dash)
        dot = MorseDot.from_dash(dash, lora_rank=4, conv="odconv").eval()
        state = dot.state_dict()
        with torch.no_grad():
            for name, value in plain.state_dict().items():
                if state[name].shape == value.shape:
                    state[name].copy_(value)
                else:  # three gates stand at 1/2
                    assert state[name].shape == (1, *value.shape)
                    state[name].copy_(8 * value[None])
        assert plain(*inputs()).abs().max() > 1e-3
        assert_close(dot(*inputs()), plain(*inputs()), rtol=1e-4, atol=1e-5)


@every
def test_an_untrained_dot_is_exactly_reuse(dash, case):
    dot = MorseDot.from_dash(dash, **options(case))
    assert dynamic_layers(dot)
    assert (dot(*inputs()) == 0).all()


@every
def test_gradients_reach_everything_after_a_few_updates(dash, case):
    torch.manual_seed(0)
    dot = MorseDot.from_dash(dash, lora_rank=2, **options(case)).train()
    optimizer = torch.optim.SGD(dot.parameters(), lr=1e-2)

    def backward():
        (dot(*inputs()) - inputs(seed=1)[0]).square().mean().backward()

    for _ in range(3):  # behind zero weights there are other zero weights: heads, then `fc`
        optimizer.zero_grad()
        backward()
        optimizer.step()
    names = [name for name, p in dot.named_parameters() if any(
        name.startswith(layer + ".") for layer in dynamic_layers(dot))]  # fmt: skip
    names += [name for name, _ in dot.named_parameters() if name.startswith("warehouses.")]
    assert len(names) >= 8
    gradients = dict(dot.named_parameters())
    assert [name for name in names if not gradients[name].grad.abs().max() > 0] == []


@every
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_round_trip_gives_the_same_bits(dash, case, low_cpu_mem_usage, tmp_path):
    dot = stirred(dash, case)
    expected = dot(*inputs())
    assert expected.abs().max() > 1e-2
    dot.save_pretrained(tmp_path)
    loaded = MorseDot.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).bind(dash)
    assert torch.equal(loaded(*inputs()), expected)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert not any("extra_state" in name for name in saved)
    assert json.loads((tmp_path / "config.json").read_text())["conv"] == dot.config.conv


@every
def test_half_precision(dash, case, tmp_path):
    dot = stirred(dash, case)
    expected = dot(*inputs())
    dot.save_pretrained(tmp_path)
    half = copy.deepcopy(dash).bfloat16()
    sample, times, jump = inputs()
    jump = JumpPoint(jump.sample.bfloat16(), jump.timestep, jump.model_output.bfloat16())
    for each in (copy.deepcopy(dot).to(torch.bfloat16),
                 MorseDot.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)):  # fmt: skip
        found = each.bind(half)(sample.bfloat16(), times, jump)
        assert found.dtype == torch.bfloat16
        assert_close(found.float(), expected, rtol=0.1, atol=0.05)  # 8 bits of precision


@every
def test_copies_and_memory_formats(dash, case):
    dot = stirred(dash, case)
    expected = dot(*inputs())
    twin = copy.deepcopy(dot)
    with torch.no_grad():
        for parameter in dot.parameters():
            parameter.zero_()
    assert torch.equal(twin.bind(dash)(*inputs()), expected)
    last = copy.deepcopy(twin).to(memory_format=torch.channels_last).bind(dash)
    assert_close(last(*inputs()), expected, rtol=1e-4, atol=1e-5)
    shapes = {name: value.shape for name, value in twin.state_dict().items()}
    assert {name: value.shape for name, value in last.state_dict().items()} == shapes


@every
def test_offloaded_layer_by_layer(dash, case):
    dot = stirred(dash, case)
    with torch.no_grad():
        expected = dot(*inputs())
        cpu_offload(dot, torch.device("cpu"))
        assert next(dot.parameters()).is_meta
        assert torch.equal(dot(*inputs()), expected)


@every
def test_a_batch_equals_its_images_one_by_one(dash, case):
    dot = stirred(dash, case)
    sample, times, jump = inputs()
    both = dot(sample, times, jump)
    for row in range(3):
        at = slice(row, row + 1)
        alone = JumpPoint(jump.sample[at], jump.timestep[at], jump.model_output[at])
        assert_close(dot(sample[at], times[at], alone), both[at], rtol=1e-4, atol=1e-5)


@every
def test_merged_lora_gives_the_same_output(dash, case):
    dot = stirred(dash, case)
    expected = dot(*inputs())
    assert_close(dot.merge_lora()(*inputs()), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(dot.unmerge_lora()(*inputs()), expected)


class TestTime:
    @pytest.fixture
    def kernels(self, monkeypatch):
        """How many kernels each convolution uses: its groups."""
        seen = []
        plain = functional.conv2d

        def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
            seen.append(groups)
            return plain(x, weight, bias, stride, padding, dilation, groups)

        monkeypatch.setattr(functional, "conv2d", conv2d)
        return seen

    @listening
    @pytest.mark.parametrize("times", [torch.tensor(500), torch.tensor([500] * 3)])
    def test_a_batch_that_shares_its_times_shares_its_kernels(self, dash, case, times, kernels):
        dot = stirred(dash, case)
        sample, _, jump = inputs()
        jump = JumpPoint(jump.sample, times + 100, jump.model_output)
        shared = dot(sample, times, jump)
        assert kernels and set(kernels) == {1}
        each = dot.train()(sample, times, jump)
        assert 3 in kernels
        assert_close(shared, each, rtol=1e-4, atol=1e-5)

    @listening
    def test_other_times_give_other_kernels(self, dash, case, kernels):
        dot = stirred(dash, case)
        dot(*inputs())
        assert kernels.count(3) == 10
        layer = dot.down_blocks[0].resnets[0].conv1
        x = torch.randn(1, 8, 4, 4)
        first, second = (layer.assembled_kernel(x, torch.randn(1, layer.cond_dim)) for _ in "ab")
        assert not torch.allclose(first, second)

    @listening
    def test_close_times_are_told_apart_in_half_precision(self, dash, case, kernels):
        dot = stirred(dash.bfloat16(), case)
        sample, _, jump = inputs()
        jump = JumpPoint(jump.sample.bfloat16(), torch.tensor(700), jump.model_output.bfloat16())
        dot(sample.bfloat16(), torch.tensor([500, 500.06, 500.12]), jump)
        assert kernels.count(3) == 10

    @listening
    def test_nothing_is_left_behind(self, dash, case):
        dot = stirred(dash, case)
        dot(*inputs())
        assert conv_layers._HEARD.time is None

    @listening
    def test_each_thread_hears_its_own(self, dash, case):
        dot = stirred(dash, case)
        given = [inputs(seed=0), inputs(batch_size=2, seed=1)]
        expected, found = [dot(*each) for each in given], [None, None]
        both = threading.Barrier(2, timeout=30)

        def wait(*_):
            both.wait()

        # Both have told their time before either's first convolution runs.
        dot.down_blocks[0].resnets[0].conv1.register_forward_pre_hook(wait)

        def work(index):
            found[index] = dot(*given[index])

        in_two_threads(work)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

    def test_blocks_compile_without_breaks(self, dash):
        block = stirred(dash, "odconv-time").down_blocks[0]
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        x = torch.randn(2, 8, 8, 8)
        for _ in range(2):
            time = torch.randn(2, block.time_listeners[0].cond_dim)
            assert_close(compiled(x, time), block(x, time))
        torch._dynamo.reset()

    def test_features_need_no_equal_rows(self, dash):
        embedding, times = torch.ones(4, 8), [torch.full((4,), 5)]
        settings = stirred(dash, "odconv").conv_settings
        assert share_time(settings, embedding, times) is embedding
        assert share_time(None, embedding, times) is embedding
        listening = stirred(dash, "odconv-time").conv_settings
        assert share_time(listening, embedding, times).stride(0) == 0

    def test_equal_conditions_are_looked_for(self, dash):
        listening = stirred(dash, "odconv-time").conv_settings
        for rows, alike in ((torch.zeros(4, 3), True), (torch.eye(4), False)):
            found = share_time(listening, torch.ones(4, 8), [None, torch.tensor(5), rows])
            assert (found.stride(0) == 0) == alike

    @pytest.mark.parametrize("other", [None, "timestep", "jump", "scale"])
    def test_all_that_the_time_is_made_of_decides(self, dash, other, kernels):
        dot = stirred(dash, "odconv-time", guidance="guided")
        rows = {name: torch.full((3,), 500.0) for name in ("timestep", "jump", "scale")}
        if other is not None:
            rows[other][2] += 1
        sample, _, jump = inputs()
        dot(sample, rows["timestep"], replace(jump, timestep=rows["jump"],
                                              guidance_scale=rows["scale"]))  # fmt: skip
        assert (3 in kernels) == (other is not None)


class TestGrid:
    def test_another_size_is_refused(self, dash):
        dot = MorseDot.from_dash(dash, conv="gridconv")
        with pytest.raises(ValueError, match=r"24x24.*gridconv.*made for 16x16 alone"):
            dot(*inputs(size=24))

    def test_a_size_of_ones_own(self, dash):
        dot = MorseDot.from_dash(dash, conv="gridconv", conv_options={"sample_size": (8, 24)})
        assert dot.down_blocks[1].resnets[0].conv1.grid_shape == (4, 12)
        sample = torch.zeros(1, 1, 8, 24)
        assert dot(sample, torch.tensor(5), JumpPoint(sample, torch.tensor(7), sample)).sum() == 0

    def test_a_dash_without_a_size(self):
        with pytest.raises(ValueError, match=r"conv_options=\{'sample_size'"):
            MorseDot.from_dash(BUILDERS["flux"](), lora_rank=0, conv="gridconv")


class TestWarehouse:
    def test_summary_counts_what_is_there(self, dash):
        settings = {"lora_rank": 0, "block_out_channels": (16, 32)}
        plain = MorseDot.from_dash(dash, **settings)
        dot = MorseDot.from_dash(dash, **settings, conv="kernel_warehouse")
        found = dot.convolution_summary()
        difference = plain.num_parameters() - dot.num_parameters()
        assert found.plain_parameters - found.parameters == difference > 0
        banks = sum(each.cells.numel() for each in dot.modules() if isinstance(each, Warehouse))
        assert sum(plan.bank_parameters for plan in found.plans) == banks
        assert f"{found.parameters:,} parameters in place of" in str(found)
        assert found.layers == {"KWConv2d": 10}

    def test_layers_of_equal_shapes_share_a_bank(self, dash):
        dot = stirred(dash, "kernel_warehouse")
        before = dot.down_blocks[0].resnets[0].conv1, dot.up_blocks[1].resnets[0].conv2
        x = torch.randn(1, 8, 4, 4)
        kernels = [layer.assembled_kernel(x) for layer in before]
        bank = next(each for each in dot.warehouses if each.cells.shape[1:3] == (4, 4))
        with torch.no_grad():
            bank.cells.mul_(2)
        for layer, kernel in zip(before, kernels, strict=True):
            assert_close(layer.assembled_kernel(x), 2 * kernel)

    def test_a_plan_that_saves_nothing_warns_once_and_only_when_made(self, dash, tmp_path):
        given = {"conv": "kernel_warehouse", "conv_options": {"sharing": "all"}}
        with pytest.warns(UserWarning, match="saves no parameters") as record:
            dot = MorseDot.from_dash(dash, block_out_channels=(8, 16), **given)
        assert len(record) == 1 and len(dot.warehouses) == 1
        dot.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            MorseDot.from_pretrained(tmp_path)
            MorseDot.from_dash(dash, block_out_channels=(32, 64), conv="kernel_warehouse")


@pytest.mark.parametrize(
    ("conv", "given", "message"),
    [
        ("dynamic", None, "conv must be one of.*got 'dynamic'"),
        ("conv", {"budget": 1}, "conv_options is .*budget.*leave conv_options out"),
        ("odconv", {"budget": 1}, r"conv_options has 'budget'.*takes \['condition'"),
        ("odconv", {"condition": "text"}, r"conv_options\['condition'\] must be one of"),
        ("odconv", {"num_kernels": 0}, r"\['num_kernels'\] must be .* at least 1, got 0"),
        ("odconv", {"num_kernels": 1.5}, r"\['num_kernels'\].*got 1.5"),
        ("odconv", {"reduction": 0}, r"\['reduction'\] must be a finite number above 0, got 0"),
        ("odconv", {"reduction": float("inf")}, r"\['reduction'\] must be .*, got inf"),
        ("kernel_warehouse", {"budget": float("inf")}, r"\['budget'\].* below 1e9, got inf"),
        ("kernel_warehouse", {"budget": 0.3}, r"\['budget'\]: budget must be a whole number"),
        ("kernel_warehouse", {"budget": "b"}, r"\['budget'\] must be a number, got 'b'"),
        ("kernel_warehouse", {"cell_ratio": 2}, r"\['cell_ratio'\] must be .*got 2"),
        ("kernel_warehouse", {"cell_ratio": 1}, r"budget=0.5 and cell_ratio=1 .*one of: 1/2"),
        ("kernel_warehouse", {"sharing": "some"}, r"\['sharing'\].*got 'some'"),
        ("gridconv", {"paddings": ["zeros"]}, r"\['paddings'\] must be two of"),
        ("gridconv", {"sample_size": (8, 0)}, r"\['sample_size'\].*got \(8, 0\)"),
    ],
)
def test_options_are_checked(dash, conv, given, message):
    with pytest.raises(ValueError, match=message):
        MorseDot.from_dash(dash, conv=conv, conv_options=given)


class TestOtherDashes:
    @every
    def test_a_text_conditional_unet(self, case, tmp_path):
        dash = text_unet()
        text = torch.randn(3, 5, TEXT_CHANNELS)
        given = inputs(channels=4)
        untrained = MorseDot.from_dash(dash, 1, lora_rank=2, **options(case))
        assert (untrained(*given, encoder_hidden_states=text) == 0).all()
        dot = stirred(dash, case, num_down_blocks=1, block_out_channels=(8,))
        output = dot(*given, encoder_hidden_states=text)
        assert (dot(*given, encoder_hidden_states=text + 1) - output).abs().max() > 1e-4

    @pytest.mark.parametrize("name", BUILDERS)
    @every
    def test_transformers(self, name, case):
        dash, settings = BUILDERS[name](), options(case)
        if name == "flux" and case == "gridconv":
            settings["conv_options"] = {**settings["conv_options"], "sample_size": 8}
        dot = MorseDot.from_dash(dash, 1, (8,), lora_rank=2, **settings)
        given = conditions(name)
        assert (dot(*transformer_inputs(name), **given) == 0).all()
        with torch.no_grad():
            for parameter in dot.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        assert dot.eval()(*transformer_inputs(name), **given).abs().max() > 1e-3

    def test_patches_that_do_not_divide_evenly(self):
        dash = BUILDERS["sd3"]()
        dot = MorseDot.from_dash(dash, 2, (8, 8), lora_rank=0, conv="gridconv",
                                 conv_options={"sample_size": (12, 20)})  # fmt: skip
        given = conditions("sd3", grid=(6, 10))
        assert (dot(*transformer_inputs("sd3", (12, 20)), **given) == 0).all()


class TestTraining:
    OPTIONS = """--train_batch_size 3 --max_train_steps 5 --lr_warmup_steps 1 --learning_rate 1e-2
        --checkpointing_steps 2 --logging_steps 2 --validation_steps 2 --validation_images 3
        --num_down_blocks 1 --block_out_channels 8 --lora_rank 2 --conv_annealing_steps 4"""
    KINDS = (
        ("odconv", "condition=time", "num_kernels=2"),
        ("kernel_warehouse", "budget=1/2", "sharing=shapes"),
        ("gridconv", "paddings=circular,zeros"),
    )

    @pytest.fixture(scope="class")
    def given(self, build_unet, tmp_path_factory):
        """A function that gives a configuration with a new output folder."""
        base, data = (tmp_path_factory.mktemp(name) for name in ("base", "data"))
        unet = build_unet(channels=(8, 8), sample_size=8)
        DDPMPipeline(unet, DDPMScheduler(clip_sample=False)).save_pretrained(base)
        write_parts(data, 8, 3)

        def config(conv, *words, more=()):
            AcceleratorState._reset_state(reset_partial_state=True)
            output_dir = tmp_path_factory.mktemp("runs") / "run"
            places = ("--pretrained_model_name_or_path", base, "--train_data_dir", data,
                      "--output_dir", output_dir)  # fmt: skip
            chosen = ("--conv", conv, "--conv_options", *words) if words else ("--conv", conv)
            return parse_config(
                TrainDotConfig, [*map(str, places), *self.OPTIONS.split(), *chosen, *more]
            )

        return config

    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0])
    def test_a_resumed_run_gives_the_same_bits(self, given, kind, monkeypatch, capsys):
        temperatures = []

        def watched(dot, settings, step, total):
            found = anneal(dot, settings, step, total)
            temperatures.append(found)
            return found

        monkeypatch.setattr("morse.training.convolutions.anneal", watched)
        start, end = (1.0, 0.0) if kind[0] == "kernel_warehouse" else (30.0, 1.0)
        whole = given(*kind)
        train_dot(whole)
        course = [start + (end - start) * step / 4 for step in (1, 2, 3, 4)]
        # At steps 2 and 4 the result so far is validated, and the last one is saved, at the end.
        expected = [*course[:2], end, *course[2:], end, end, end]
        assert temperatures == pytest.approx(expected)
        assert "in place of" in capsys.readouterr().out

        class KilledError(Exception):
            pass

        def die(dot, settings, step, total):
            if step == 4:
                raise KilledError
            return anneal(dot, settings, step, total)

        monkeypatch.setattr("morse.training.convolutions.anneal", die)
        again = given(*kind)
        with pytest.raises(KilledError):
            train_dot(again)
        monkeypatch.setattr("morse.training.convolutions.anneal", anneal)
        train_dot(replace(again, resume_from_checkpoint="latest"))
        assert_same_run(again.output_dir, whole.output_dir, 5)
        pipe = MorsePipeline.from_pretrained(
            whole.pretrained_model_name_or_path, dot=whole.output_dir, scheduler="ddim"
        )
        pipe.set_progress_bar_config(disable=True)
        assert pipe(plan="DoDo", batch_size=2, output_type="pt").images.isfinite().all()
        assert pipe.last_run.num_dot == 2
        if kind is self.KINDS[0]:
            capsys.readouterr()
            train_dot(replace(again, resume_from_checkpoint="latest", conv_annealing_steps=3))
            assert "conv_annealing_steps" in capsys.readouterr().out

    def test_grids_are_of_the_samples_to_train_on(self, given, dash):
        """Dash is made for 16x16."""
        for words, trained_on, side in (((), (8, 8), 8), (("sample_size=24",), (8, 8), 24),
                                        (("paddings=circular,zeros",), None, 16)):  # fmt: skip
            dot = build_dot(dash, given("gridconv", *words), trained_on)
            assert dot.config.conv_options["sample_size"] == side

    def test_a_saved_dot_is_at_the_final_temperature(self, given):
        with pytest.warns(UserWarning, match=r"steps is 4, but.* ends after 2 updates"):
            config = given("gridconv", more=("--max_train_steps", "2", "--validation_steps", "0"))
        with pytest.warns(UserWarning, match=r"ended at step 2.*annealed over 4 .*max_train_steps"):
            train_dot(config)
        layer = MorseDot.from_pretrained(config.output_dir).down_blocks[0].resnets[0].conv1
        assert layer.temperature == 1

    def test_a_start_is_at_the_final_temperature(self, given, dash):
        config = replace(given("odconv"), conv_annealing_steps=None, max_train_steps=50)
        assert annealing_steps(config) == 5
        start = replace(config, init_from=Path("dot"), fit_gate=True, max_train_steps=0)
        assert annealing_steps(start) == 0
        assert annealing_steps(replace(start, conv_annealing_steps=3, max_train_steps=3)) == 3
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_unless_annealed(stirred(dash, "odconv"), start, 0)

    PROGRESSIVE = ("--num_down_blocks", "2", "--block_out_channels", "8", "8",
                   "--progressive_steps", "4")  # fmt: skip

    def test_a_first_stage_alone_is_annealed(self, given):
        config = given("odconv", more=self.PROGRESSIVE)
        assert annealing_steps(first_stage(config)) == 4
        assert annealing_steps(second_stage(config, 1.0)) == 0

    def test_annealing_beyond_the_training_is_told_first(self, given):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            config = given("odconv", more=("--conv_annealing_steps", "5"))
            given("odconv", more=self.PROGRESSIVE)
        with pytest.warns(UserWarning, match=r"steps is 6, but.* ends after 5 updates"):
            replace(config, conv_annealing_steps=6)
        with pytest.warns(UserWarning, match=r"steps is 5, but.* ends after 4 updates"):
            given("odconv", more=(*self.PROGRESSIVE, "--conv_annealing_steps", "5"))

    def test_the_way_out_is_one(self, given, dash):
        config, dot = given("odconv"), stirred(dash, "odconv")
        with pytest.warns(UserWarning, match="at its end: resume the run, or set"):
            warn_unless_annealed(dot, config, 3)
        with pytest.warns(UserWarning, match="ends after 2 updates"):
            short = replace(config, max_train_steps=2)
        with pytest.warns(UserWarning, match=r"with a max_train_steps .*above 2, or set"):
            warn_unless_annealed(dot, short, 2)

    def test_words_are_read(self):
        words = ("condition=time", "num_kernels=4", "budget=1/4", "reduction=0.5", "size=8,16")
        expected = {"condition": "time", "num_kernels": 4, "budget": 0.25, "reduction": 0.5,
                    "size": [8, 16]}  # fmt: skip
        found = parse_conv_options(words)
        assert found == expected and isinstance(found["num_kernels"], int)
        assert parse_conv_options(None) is None
        limits = {"budget": float("inf"), "size": [-float("inf"), 1]}
        assert parse_conv_options(("budget=1e400", "size=-1e400,1")) == limits

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("odconv", "condition"), "conv_options has 'condition'; it must be words NAME=VALUE"),
            (("odconv", "num_kernels=1", "num_kernels=2"), "'num_kernels' twice"),
            (("odconv", "num_kernels=0"), "conv_options['num_kernels'] must be"),
            (("kernel_warehouse", "budget=1e400"), "['budget']: budget must be above"),
            (("conv",), "conv_annealing_steps is 4, but conv is 'conv'"),
        ],
    )
    def test_settings_are_checked(self, given, words, message, capsys):
        with pytest.raises(SystemExit):
            given(*words)
        assert message in capsys.readouterr().err

    def test_graphs_would_keep_the_temperature(self, given, capsys):
        with pytest.raises(SystemExit):
            given("odconv", more=("--cuda_graphs",))
        assert "whose temperature a graph would keep" in capsys.readouterr().err
        assert given("odconv", more=("--cuda_graphs", "--conv_annealing_steps", "0")).cuda_graphs
