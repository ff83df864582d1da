"""What Morse may cost beside its evaluations: start-up, attaching, the switch, memory.

Times are CPU seconds, which other programs on the machine disturb little; bounds are generous.
"""

import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest
import torch
from attached import difference, planned, text_pipe, trained_dot
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, StableDiffusionPipeline
from diffusers.configuration_utils import register_to_config
from tiny_pipelines import loop_pipeline, stable_diffusion

from morse import MorseDot, enable_morse
from morse.dot import model
from morse.dot.lora import LowRank
from morse.evaluation.bench.architectures import ARCHITECTURES, build_architecture
from morse.evaluation.bench.latency import DOT_CHANNELS, DOT_LAYERS, DOT_RANK
from morse.sampling import JumpPoint

PAPERS_DOT = {
    "block_out_channels": DOT_CHANNELS,
    "layers_per_block": DOT_LAYERS,
    "lora_rank": DOT_RANK,
}


def cpu_seconds(call, repeats=1):
    """The least of some repeats."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return min(found)


def run_python(code):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_importing_takes_less_than_a_third_of_a_second():
    code = "import time; t = time.process_time(); import morse; print(time.process_time() - t)"
    assert run_python(code) < 0.3


class Nothing(ModelMixin, ConfigMixin):
    """A denoiser that takes no time."""

    @register_to_config
    def __init__(self, in_channels=1, sample_size=2):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # tells device and dtype

    def forward(self, sample, timestep, return_dict=True):
        return (sample,)


@pytest.mark.parametrize("plan", ["D" * 200, "Do" * 100])
def test_the_switch_takes_microseconds(plan):
    """Less than two steps of diffusers' loop without a denoiser, however busy the machine is."""
    pipe = loop_pipeline(Nothing(), DDIMScheduler(clip_sample=False))
    bare = cpu_seconds(lambda: pipe(num_inference_steps=len(plan)), repeats=5)
    enable_morse(pipe, lambda sample, timestep, jump: sample)
    switched = cpu_seconds(lambda: pipe(plan=plan), repeats=5)
    assert pipe.last_run.num_dot == plan.count("o")
    assert switched - bare < 2 * bare


def sd15(device, dtype=torch.float32):
    return build_architecture(ARCHITECTURES["sd15"], torch.device(device), dtype, False)


def num_bytes(module):
    return sum(each.nbytes for each in (*module.parameters(), *module.buffers()))


def test_an_unmerged_dot_holds_little_beside_stable_diffusion():
    dash = sd15("meta")
    dot = MorseDot.from_dash(dash, **PAPERS_DOT)
    own = {each.data_ptr() for each in dot.parameters() if not each.is_meta}
    assert not own and not set(map(id, dot.parameters())) & set(map(id, dash.parameters()))
    assert num_bytes(dot) / num_bytes(dash) < 0.15


@pytest.mark.slow
def test_attaching_to_stable_diffusion_takes_less_than_a_second():
    dash = sd15("meta", torch.float16).to_empty(device="cpu")
    for parameter in dash.parameters():
        parameter.fill_(0.01)
    dot = MorseDot.from_dash(dash, **PAPERS_DOT)
    with torch.device("meta"):  # where drawing weights takes no time
        saved = MorseDot.from_config(dot.config).half()  # as loaded: bound to no Dash
    saved.to_empty(device="cpu")
    pipe = stable_diffusion(StableDiffusionPipeline, dash)
    assert cpu_seconds(partial(enable_morse, pipe, saved)) < 1.0
    assert cpu_seconds(partial(enable_morse, pipe, saved)) < 1.0  # merged by then


class TestMemoryFormat:
    """A merged Dot runs channels last on a CPU: same values, fewer reordered weights."""

    @pytest.fixture
    def dash(self, build_unet):
        return build_unet(in_channels=3)

    @pytest.fixture
    def call(self, dash):
        dot = trained_dot(dash)
        sample = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        jump = JumpPoint(sample.flip(2), torch.tensor(700), sample.flip(3))
        return dot, torch.no_grad()(lambda: dot(sample, torch.tensor(400), jump))

    def test_values_stay(self, call, monkeypatch):
        dot, run = call
        found = run_merged(dot, run)
        assert found.is_contiguous()
        merge = LowRank.merge
        monkeypatch.setattr(LowRank, "merge", lambda *args: merge(*args).contiguous())
        monkeypatch.setattr(model, "place_channels_last", lambda tensor: tensor)
        torch.testing.assert_close(run_merged(dot, run), found, rtol=1e-5, atol=1e-6)

    def test_no_convolution_of_dash_reorders_its_weights(self, call, dash):
        dot, run = call
        run_merged(dot, run)
        weights = [m.weight for m in dot._tree[0].modules() if isinstance(m, torch.nn.Conv2d)]
        last = [w.is_contiguous(memory_format=torch.channels_last) for w in weights]
        # All but Dash's entry and exit, which do not run in Dot.
        assert sum(last) >= len(weights) - 2
        assert all(parameter.is_contiguous() for parameter in dash.parameters())

    def test_separate_lora_keeps_the_usual_order(self, call, monkeypatch):
        _, run = call
        monkeypatch.setattr(model, "place_channels_last", None)  # fails where it is called
        run()


def run_merged(dot, run):
    dot.merge_lora()
    return run()


def reusing_outputs(graph, example_inputs):
    """A backend that hands out the same output buffers each time, as CUDA graphs do.

    `mode="reduce-overhead"` replays graphs where there is CUDA; this needs neither CUDA nor a
    compiler.
    """
    buffers = {}

    def keep(place, value):
        if not isinstance(value, torch.Tensor):
            return value
        key = place, value.shape, value.dtype, value.stride()
        return buffers.setdefault(key, torch.empty_like(value)).copy_(value)

    return lambda *inputs: [keep(*each) for each in enumerate(graph(*inputs))]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
def test_both_halves_may_reuse_their_output_buffers():
    """What is kept of Dash outlives Dash's next evaluation."""
    pipe = text_pipe()
    enable_morse(pipe, trained_dot(pipe.unet))
    expected = planned(pipe)
    for half in (pipe.unet, pipe.dot):
        half.compile(backend=reusing_outputs, dynamic=False)
    found = planned(pipe)
    assert difference(found, expected) < 1e-4
    assert torch.equal(planned(pipe), found)
