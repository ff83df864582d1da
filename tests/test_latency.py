import inspect
import json
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from morse.capture import CudaCapture
from morse.evaluation.bench import architectures, latency
from morse.evaluation.bench.architectures import Architecture
from morse.evaluation.bench.benchmark import BenchmarkConfig, run_benchmark
from morse.evaluation.bench.latency import FlopCounts, LatencySettings, measure_architecture
from morse.evaluation.bench.latency_report import run_architectures
from morse.evaluation.bench.measuring import hasten_after_tables


def test_flops_of_stable_diffusion_are_those_counted_by_hand():
    # 0.80 TFLOPs at 64x64 latents; the blocks at 1/16 of the positions cost 1/17.5 of that, and
    # Dot's own blocks of 96 and 160 channels the rest.
    counted = FlopCounts("sd15").of(2, True)
    assert counted["dash_flops"] == pytest.approx(0.803e12, rel=1e-3)
    assert 12 < counted["flop_ratio"] < 15
    assert counted["flop_ratio"] == counted["dash_flops"] / counted["dot_flops"]


def test_a_transformer_without_text_scales_with_its_tokens():
    counted = FlopCounts("dit-xl-2").of(2, True)
    assert counted["dash_flops"] == pytest.approx(2 * 118.6e9, rel=0.01)  # Peebles and Xie 2023
    # Attention gains more than the number of tokens, and Dot's own blocks cost a few percent.
    assert counted["flop_ratio"] == pytest.approx(16, rel=0.06)


def test_text_tokens_stay_as_many():
    # Stable Diffusion 3 at 1024x1024: 4096 tokens of the picture, of which 256 are left, and 333.
    counted = FlopCounts("sd3").of(2, True)
    assert counted["flop_ratio"] == pytest.approx(10.4, rel=0.01)
    assert counted["flop_ratio"] < (4096 + 333) / (256 + 333) * 1.5


def _tiny(name):
    """A published transformer with two narrow heads, one block of a kind and 4x4 tokens."""
    published, width = (
        architectures.ARCHITECTURES[name],
        {"num_attention_heads": 2, "num_layers": 1},
    )
    if name == "flux":
        return replace(
            published, config={**published.config, **width, "num_single_layers": 1}, size=4
        )
    width |= {"attention_head_dim": 8, "caption_projection_dim": 16}
    return replace(published, config={**published.config, **width}, size=8)


@pytest.fixture
def tiny(monkeypatch):
    channels, text = (16, 32), {"encoder_hidden_states": (2, 3, 8)}
    options = {
        "block_out_channels": channels,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    unet = Architecture(
        "UNet2DConditionModel",
        options,
        {"layers_per_block": 1},
        16,
        4,
        lambda batch: {name: (batch, *shape[1:]) for name, shape in text.items()},
    )
    dit = Architecture(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "num_layers": 1,
            "sample_size": 16,
        },
        {},
        16,
        4,
        lambda batch: {"class_labels": (batch,)},
    )
    known = {"unet": unet, "dit": dit, "sd3": _tiny("sd3"), "flux": _tiny("flux")}
    monkeypatch.setattr(architectures, "ARCHITECTURES", known)
    monkeypatch.setattr(latency, "DOT_CHANNELS", (8, 8))


def test_a_merged_lora_has_no_flops_of_its_own(tiny):
    counts = FlopCounts("unet")
    merged, separate = (counts.of(2, merged) for merged in (True, False))
    assert merged["dash_flops"] == separate["dash_flops"]
    assert merged["dot_flops"] < separate["dot_flops"]


@pytest.fixture
def uncounted(monkeypatch):
    """FLOPs are not counted, which takes seconds."""
    counts = SimpleNamespace(of=lambda *dot: {"flop_ratio": 1.0})
    monkeypatch.setattr(latency, "FlopCounts", lambda name: counts)


def test_every_combination_is_measured(tiny, uncounted):
    settings = LatencySettings(batch_sizes=(1, 2), repeats=2, reduced=True)
    entries = list(measure_architecture("unet", torch.device("cpu"), settings))
    combinations = [(e["num_down_blocks"], e["merged"], e["batch_size"]) for e in entries]
    assert combinations == [
        (m, merged, b) for m in (1, 2) for merged in (True, False) for b in (1, 2)
    ]
    for entry in entries:
        assert entry["mode"] == "eager"
        assert entry["speed_ratio"] == pytest.approx(
            entry["dash_seconds"][1] / entry["dot_seconds"][1]
        )


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_transformers_are_measured_with_their_dots(tiny, name):
    settings = LatencySettings(batch_sizes=(1,), repeats=2)
    entries = list(measure_architecture(name, torch.device("cpu"), settings))
    combinations = [(entry["num_down_blocks"], entry["merged"]) for entry in entries]
    assert combinations == [(m, merged) for m in (1, 2) for merged in (True, False)]
    assert all(entry["speed_ratio"] > 0 for entry in entries)


@pytest.mark.skipif(" " in torch.__file__, reason="torch cannot link in a path with a space")
@pytest.mark.slow
def test_compiled_calls_are_measured():
    weight = torch.randn(8, 8)
    pair = {"dash": lambda: weight @ weight @ weight, "dot": lambda: weight + 1}
    entry = latency.measure_pair(pair, "compiled", torch.device("cpu"), repeats=2)
    assert entry["speed_ratio"] > 0


def test_each_pair_is_compiled_for_its_own_shapes(monkeypatch):
    """One graph for several would serve none of them best, and past a limit none is made."""
    done = []

    def compile_call(call, **options):
        done.append(options)
        return call

    monkeypatch.setattr(torch, "compile", compile_call)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: done.append("reset"))
    pair = {"dash": lambda: None, "dot": lambda: None}
    for _ in range(2):
        latency.measure_pair(pair, "compiled", torch.device("cpu"), repeats=2)
    assert done == ["reset", {"dynamic": False}, {"dynamic": False}] * 2


def test_a_table_and_a_file_come_out(tiny, tmp_path, capsys):
    settings = LatencySettings(batch_sizes=(1,), repeats=2, reduced=True)
    file = tmp_path / "deep" / "latency.json"
    result = run_architectures(("dit",), torch.device("cpu"), settings, file)
    assert json.loads(file.read_text()) == result
    assert len(result["entries"]) == 4
    assert result["reduced"] is True and result["dtype"] == "float32"
    printed = capsys.readouterr().out
    assert "separate" in printed and "FLOP ratio" in printed


def test_the_benchmark_command_measures_architectures(tiny, tmp_path):
    config = BenchmarkConfig(
        arch=("dit",), output_dir=tmp_path, latency_batch_sizes=(2,), device="cpu"
    )
    result = run_benchmark(config)
    assert [entry["batch_size"] for entry in result["entries"]] == [2] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["latency.json"]
    with pytest.raises(ValueError, match=r"arch has \['sd99'\], choose from \['unet', 'dit'"):
        BenchmarkConfig(arch=("sd99", "dit"))


def test_batch_64_is_measured_where_there_is_a_gpu(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, sizes in (("cuda", (1, 4, 16, 64)), ("cpu", (1, 4, 16))):
        config = BenchmarkConfig(arch=("dit",), device=device)
        assert config.resolved().latency_batch_sizes == sizes


def test_flops_are_counted_without_timing_anything(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "measure_pair", None)
    monkeypatch.setattr("morse.evaluation.bench.benchmark.run_architectures", None)
    config = BenchmarkConfig(arch=("dit",), flops_only=True, output_dir=tmp_path, device="cpu")
    result = run_benchmark(config)
    combinations = [(e["num_down_blocks"], e["merged"]) for e in result["entries"]]
    assert combinations == [(m, merged) for m in (1, 2) for merged in (True, False)]
    assert {entry["speed_ratio"] for entry in result["entries"]} == {"not measured"}
    assert json.loads((tmp_path / "latency.json").read_text()) == result
    text = (tmp_path / "latency.md").read_text()
    assert text.count("| not measured |") == 4 and "N itself was not measured" in text
    with pytest.raises(ValueError, match="name some with --arch"):
        BenchmarkConfig(flops_only=True)


def test_what_does_not_fit_leaves_the_others(tiny, uncounted, tmp_path, monkeypatch):
    build = latency.build_architecture

    def too_large(architecture, device, *args):
        if (tmp_path / "latency.json").exists():
            raise torch.OutOfMemoryError
        return build(architecture, device, *args)

    monkeypatch.setattr(latency, "build_architecture", too_large)
    settings = LatencySettings(batch_sizes=(1,), modes=("eager",), repeats=2)
    device, file = torch.device("cpu"), tmp_path / "latency.json"
    run_architectures(("dit", "unet"), device, settings, file)
    entries = json.loads(file.read_text())["entries"]
    assert ["error" in entry for entry in entries] == 4 * [False] + 4 * [True]


def test_a_mode_that_fails_leaves_the_others(tiny, uncounted, tmp_path, monkeypatch):
    """Without a compiler, say; what was measured before is in the file."""
    file, seen, in_mode = tmp_path / "latency.json", [], latency._in_mode

    def fail(call, mode, device):
        seen.append(len(json.loads(file.read_text())["entries"]) if file.exists() else 0)
        if mode == "compiled":
            raise RuntimeError("no C++ compiler\nis there")
        return in_mode(call, mode, device)

    monkeypatch.setattr(latency, "_in_mode", fail)
    settings = LatencySettings(batch_sizes=(1,), modes=("compiled", "eager"), repeats=2)
    entries = run_architectures(("dit",), torch.device("cpu"), settings, file)["entries"]
    assert [entry.get("error") for entry in entries] == 4 * [
        "RuntimeError: no C++ compiler",
        None,
    ]
    assert seen == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]  # one call fails, two are timed


def test_a_failed_capture_tells_of_the_memory_it_lacked():
    try:
        try:
            raise torch.OutOfMemoryError
        finally:
            raise RuntimeError("capture was invalidated")
    except RuntimeError as error:
        assert latency._error(error) == {"error": "out of memory"}


def test_two_merged_dots_are_never_in_memory(tiny, monkeypatch):
    made, alive, make_pair = [], [], latency.make_pair

    def count(*args):
        alive.append(sum(dot() is not None for dot in made))
        pair = make_pair(*args)
        made.append(weakref.ref(inspect.getclosurevars(pair["dot"]).nonlocals["dot"]))
        return pair

    monkeypatch.setattr(latency, "make_pair", count)
    device = torch.device("cpu")
    model = architectures.build_architecture(
        architectures.ARCHITECTURES["unet"], device, torch.float32, False
    )
    for _ in range(3):
        found = latency._try_pair("unet", model, (1, 1, True), "eager", device, 2)
        assert found["speed_ratio"] > 0
    assert alive == [0] * 3


def test_a_graph_is_captured_on_its_own_device_after_what_went_before(monkeypatch):
    """With CUDA's parts replaced by some that note what is done."""
    done = []

    def noting(name):
        def part(*args, **kwargs):
            done.append((name, *args, *kwargs.values()))
            return nullcontext()

        return part

    def stream(name):
        return SimpleNamespace(wait_stream=lambda other: done.append((name, "waits")))

    cuda = {
        "device": noting("device"),
        "stream": lambda stream: nullcontext(),
        "graph": noting("graph"),
        "Stream": lambda: stream("side"),
        "current_stream": lambda: stream("current"),
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": lambda: SimpleNamespace(replay="replay"),
    }
    for name, part in cuda.items():
        monkeypatch.setattr(torch.cuda, name, part)
    device = torch.device("cuda:1")
    call = latency._in_mode(lambda: done.append("call"), "cuda_graph", device)
    assert call == "replay"
    kinds = [each if isinstance(each, str) else each[:2] for each in done]
    assert kinds[:2] == [("device", device), ("side", "waits")]
    assert kinds[2:5] == ["call"] * 3 and done[5][0] == "graph"
    assert kinds[6:] == ["call", ("current", "waits")]

    def fail():
        raise RuntimeError

    capture = CudaCapture()
    capture(lambda: None, device)
    (place,) = capture._places.values()
    capture(lambda: None, device)
    assert list(capture._places.values()) == [place]  # graphs of a device share their memory
    with pytest.raises(RuntimeError):
        capture(fail, device)
    assert capture._places == {}


def test_tables_of_all_scales_are_eager_though_models_are_compiled_then():
    order = []
    bench = SimpleNamespace(
        speed_table=lambda *given: order.append(given), hasten=lambda: order.append("compiled")
    )
    part = {
        "config": SimpleNamespace(latency_batch_sizes=(0, 2)),
        "store": SimpleNamespace(once=lambda name, make: make()),
        "bench": bench,
    }
    hasten_after_tables([SimpleNamespace(**part, conditions=scale) for scale in (1, 3)])
    assert order == [([2], 1, (True, False)), ([2], 3, (True, False)), "compiled"]


def test_no_batch_of_none_is_timed(tiny, tmp_path):
    for options in ({"quick": True}, {"latency_batch_sizes": (0,)}):
        config = BenchmarkConfig(arch=("dit",), device="cpu", **options).resolved()
        assert (0 in config.latency_batch_sizes) == ("quick" not in options)
    config = BenchmarkConfig(
        arch=("dit",), device="cpu", latency_batch_sizes=(0,), output_dir=tmp_path
    )
    entries = run_benchmark(config)["entries"]
    assert {entry["speed_ratio"] for entry in entries} == {"not measured"}


@pytest.mark.gpu
def test_cuda_graphs_are_measured(tiny):
    settings = LatencySettings(batch_sizes=(1,), modes=("cuda_graph",), repeats=2)
    entry = next(measure_architecture("unet", torch.device("cuda"), settings))
    assert entry["mode"] == "cuda_graph" and entry["speed_ratio"] > 0
