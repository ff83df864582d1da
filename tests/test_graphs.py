"""Graphs of Dash's and Dot's calls, on a CPU with what stands for CUDA's capturing."""

import copy
import dataclasses
import gc
import time
import warnings
import weakref
from collections import deque

import pytest
import torch
from attached import difference, in_two_threads, latents, planned, text_pipe, trained_dot
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn

from morse import (
    LeapfrogScheduler,
    MorseDot,
    disable_cuda_graphs,
    disable_morse,
    enable_cuda_graphs,
    enable_morse,
)
from morse.capture import (
    ModelState,
    UnknownKindError,
    _mended_generator,
    describe,
    identify,
    map_tensors,
)
from morse.dot.mixture import _precision
from morse.evaluation.bench.architectures import ARCHITECTURES, build_architecture
from morse.graphed import GraphedCall, Shared
from morse.graphs import graphed_call
from morse.sampling import JumpPoint
from morse.training.graphs import GraphedDot


class Rerun:
    """Makes a call again at each replay, from the same inputs into the same outputs."""

    device_type = "cpu"

    def __init__(self, error=None):
        self.devices, self.error, self.is_busy = [], error, False

    def __call__(self, call, device):
        assert not self.is_busy, "a capture within a capture"
        self.devices.append(device)
        if self.error is not None:
            raise self.error
        self.is_busy = True
        try:
            output = call()
        finally:
            self.is_busy = False

        def replay():
            held, fresh = [], []
            describe(output, held)
            describe(call(), fresh)
            for own, new in zip(held, fresh, strict=True):
                own.copy_(new)

        return replay, output


class Add(nn.Module):
    """A model that notes where its inputs lie."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(2)), deque()  # no list: not a setting

    def forward(self, sample, timestep, by=1.0, more=None):
        self.seen.append((sample.data_ptr(), sample.device, timestep.device))
        return (sample * self.weight + timestep * by,)


@pytest.fixture
def graphed():
    module = Add()
    call = GraphedCall(module, None, Shared(Rerun()), 2)
    vars(module)["_compiled_call_impl"] = call
    with torch.no_grad():
        yield module, call


def counts(module):
    call = graphed_call(module)
    return call.num_captures, call.num_replays


@pytest.fixture
def pipe():
    return text_pipe()


def with_graphs(pipe, dot=None, merge_lora=True, **options):
    if dot is not None:
        enable_morse(pipe, dot, merge_lora)
    return enable_cuda_graphs(pipe, capture=Rerun(), **options)


class TestPipelines:
    @pytest.mark.parametrize("merge_lora", [True, False])
    def test_images_are_the_eager_ones(self, pipe, merge_lora):
        dot = trained_dot(pipe.unet)
        enable_morse(pipe, dot, merge_lora)
        expected = planned(pipe, "DooDo")
        with_graphs(pipe)
        for run in range(1, 3):
            assert torch.equal(planned(pipe, "DooDo"), expected)
            assert counts(pipe.unet) == (1, 2 * run) and counts(dot) == (1, 3 * run)
        assert graphed_call(pipe.unet).reasons == graphed_call(dot).reasons == set()

    def test_without_a_dot(self, pipe):
        expected = latents(pipe, num_inference_steps=3)
        assert with_graphs(pipe) is pipe
        assert torch.equal(latents(pipe, num_inference_steps=3), expected)
        assert counts(pipe.unet) == (1, 3)
        enable_morse(pipe, lambda sample, timestep, jump, **conditions: 0 * sample)
        planned(pipe)
        assert counts(pipe.unet)[1] == 5
        disable_morse(pipe)
        assert torch.equal(latents(pipe, num_inference_steps=3), expected)
        assert counts(pipe.unet)[1] == 8

    def test_taken_off_again(self, pipe):
        with_graphs(with_graphs(pipe, trained_dot(pipe.unet)))
        expected = planned(pipe)
        assert graphed_call(pipe.dot) is not None
        disable_cuda_graphs(disable_cuda_graphs(pipe))
        assert graphed_call(pipe.unet) is graphed_call(pipe.dot) is None
        assert torch.equal(planned(pipe), expected)
        disable_morse(pipe)
        assert vars(pipe.unet)["_compiled_call_impl"] is None

    @pytest.mark.parametrize("enable_again", [False, True])
    def test_taken_off_an_earlier_dot(self, pipe, enable_again):
        dots = trained_dot(pipe.unet), trained_dot(pipe.unet)
        with_graphs(pipe, dots[0])
        disable_morse(pipe)
        if enable_again:
            with_graphs(pipe, dots[1])
            assert graphed_call(dots[1]) is not None
        else:
            disable_cuda_graphs(pipe)
        assert graphed_call(dots[0]) is None

    def test_pipelines_with_a_dot_of_one_another_keep_their_graphs(self, pipe):
        with_graphs(pipe, trained_dot(pipe.unet))
        other, dot = with_graphs(text_pipe(), pipe.dot), pipe.dot
        assert graphed_call(pipe.unet) is not None
        disable_cuda_graphs(pipe)
        assert graphed_call(pipe.unet) is None
        disable_cuda_graphs(disable_morse(other))
        assert graphed_call(other.unet) is graphed_call(dot) is None

    def test_history_has_a_graph_with_and_one_without_a_line(self, pipe):
        torch.manual_seed(1)
        dot = MorseDot.from_dash(pipe.unet, 1, lora_rank=2, history=1)
        nn.init.normal_(dot.conv_out.weight, std=0.05)
        enable_morse(pipe, dot.eval())
        expected = planned(pipe, "DoDoDo")
        with_graphs(pipe)
        assert torch.equal(planned(pipe, "DoDoDo"), expected)
        assert counts(dot) == (2, 3)

    def test_earlier_estimates_are_not_copied(self, pipe):
        with_graphs(pipe, trained_dot(pipe.unet))
        planned(pipe, "DoDo")
        assert counts(pipe.dot) == (1, 2)  # with an earlier one and without

    def test_another_batch_is_another_graph(self, pipe):
        with_graphs(pipe, trained_dot(pipe.unet))
        one = {name: value[:1] for name, value in text_inputs_of(pipe).items()}
        for given in ({}, one, {}, one):
            planned(pipe, **given)
        assert counts(pipe.unet) == (2, 8) and counts(pipe.dot) == (2, 4)

    def test_what_was_compiled_is_captured(self, pipe):
        called, plain = [], pipe.unet._call_impl

        def compiled(*args, **kwargs):
            called.append(1)
            return plain(*args, **kwargs)

        vars(pipe.unet)["_compiled_call_impl"] = compiled
        with_graphs(pipe, trained_dot(pipe.unet))
        planned(pipe)
        assert called and counts(pipe.unet)[1] == 2
        disable_cuda_graphs(pipe)
        disable_morse(pipe)
        assert vars(pipe.unet)["_compiled_call_impl"] is compiled

    def test_two_threads(self, pipe):
        with_graphs(pipe, trained_dot(pipe.unet))
        expected = [planned(pipe, seed=seed) for seed in range(2)]
        found = [None, None]

        def work(index):
            found[index] = latents(pipe, index, plan="DoD")

        in_two_threads(work)
        assert all(map(torch.equal, found, expected))

    def test_copies_and_saved_files_have_none(self, pipe, tmp_path):
        with_graphs(pipe, trained_dot(pipe.unet))
        planned(pipe)
        assert graphed_call(copy.deepcopy(pipe.unet)) is None
        pipe.dot.save_pretrained(tmp_path)
        assert graphed_call(MorseDot.from_pretrained(tmp_path)) is None

    def test_no_graphs_at_all(self, pipe):
        with pytest.raises(ValueError, match="max_graphs is 0"):
            enable_cuda_graphs(pipe, max_graphs=0)


def text_inputs_of(pipe):
    from tiny_pipelines import text_inputs

    return text_inputs()


class TestReplays:
    def test_inputs_are_copied_to_one_place_and_outputs_are_cloned(self, graphed):
        module, call = graphed
        first = module(torch.zeros(2), torch.tensor(1.0))
        second = module(torch.ones(2), torch.tensor(2.0))
        assert first[0].tolist() == [1, 1] and second[0].tolist() == [3, 3]
        assert len({place for place, *_ in module.seen}) == 1
        assert (call.num_captures, call.num_replays) == (1, 2)

    @pytest.mark.parametrize(
        "changed",
        [
            {"sample": torch.zeros(1, 2)},
            {"sample": torch.zeros(2).double()},
            {"sample": torch.zeros(4)[::2]},
            {"by": 2.0},
            {"by": 1},
            {"more": {"text": torch.zeros(1)}},
            {"more": [torch.zeros(1)]},
            {"more": (torch.zeros(1),)},
        ],
    )
    def test_each_kind_of_call_has_a_graph(self, graphed, changed):
        module, call = graphed
        usual = {"sample": torch.zeros(2), "timestep": torch.tensor(1.0), "by": 1.0}
        for given in (usual, {**usual, **changed}, usual):
            module(**given)
        assert (call.num_captures, call.num_replays) == (2, 3)

    def test_modes_have_graphs_of_their_own(self, graphed):
        module, call = graphed
        call._max_graphs = 3
        given = torch.zeros(2), torch.tensor(1.0)
        module(*given)
        with torch.autocast("cpu", torch.bfloat16):
            module(*given)
        with torch.inference_mode():
            module(*given)
        module(*given)
        assert (call.num_captures, call.num_replays) == (3, 4)

    def test_the_one_not_used_for_longest_goes(self, graphed):
        module, call = graphed

        def run(size):
            module(torch.zeros(size, 2), torch.tensor(1.0))
            return call.num_captures

        assert [run(size) for size in (1, 2, 1, 3, 1, 2)] == [1, 2, 2, 3, 3, 4]

    def test_timesteps_on_the_cpu_are_moved(self, graphed, monkeypatch):
        """ "meta" stands for the accelerator."""
        module, call = graphed
        monkeypatch.setattr("morse.graphed.describe_modes", lambda device_type: ())
        call.shared.capture.device_type = "meta"
        module.to("meta")(torch.empty(2, device="meta"), torch.tensor(1.0))
        assert module.seen[-1][1:] == (torch.device("meta"),) * 2
        assert call.shared.capture.devices == [torch.device("meta")]

    def test_containers_are_new_in_each_call(self):
        """As diffusers' UNet empties its list of an adapter's features."""

        class Pops(nn.Module):
            def forward(self, sample, more):
                return (sample + more.pop(0) if more else sample,)

        module = Pops()
        vars(module)["_compiled_call_impl"] = GraphedCall(module, None, Shared(Rerun()), 2)
        with torch.no_grad():
            for number in (2.0, 3.0):
                found = module(torch.ones(1), [torch.full((1,), number)])
                assert found[0].tolist() == [1 + number]

    def test_identities(self):
        state = torch.zeros(1)
        assert identify([{"a": state}]) == identify([{"a": state}])
        for other in ({}, {"a": state.clone()}, {"a": state, "b": 1}, {"a": object()}):
            assert identify([{"a": state}]) != identify([other])

    def test_containers(self):
        point = JumpPoint(torch.zeros(1), torch.ones(1), torch.ones(2), memory={"a": None})
        value = (UNet2DConditionOutput(sample=torch.ones(3)), [point, {"b": 1.5}], "c")
        tensors = []
        described = describe(value, tensors)
        assert hash(described) == hash(describe(copy.deepcopy(value), []))
        mapped = map_tensors(value, lambda tensor: tensor + 1)
        again = []
        assert describe(mapped, again) == described
        assert [each.tolist() for each in again] == [(each + 1).tolist() for each in tensors]
        assert type(mapped[0]) is UNet2DConditionOutput and type(mapped[1][0]) is JumpPoint
        with pytest.raises(UnknownKindError, match="given or returns a Generator"):
            describe({"generator": torch.Generator()}, [])


CHANGES = {
    "moved": lambda pipe: pipe.unet.double().float(),
    "another weight": lambda pipe: setattr(pipe.unet.conv_in, "bias", nn.Parameter(torch.ones(8))),
    "another layer": lambda pipe: setattr(pipe.unet, "conv_act", nn.Tanh()),
    "attention": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    "FreeU": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.1, 1.2),
    "unmerged": lambda pipe: pipe.dot.unmerge_lora(),
    "gate": lambda pipe: pipe.dot.set_gate(
        {"gap_edges": [], "timestep_edges": [], "alpha": [[0.5]]}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_graphs_are_captured_anew_where_something_changed(pipe, change):
    with_graphs(pipe, trained_dot(pipe.unet))
    before = planned(pipe)
    CHANGES[change](pipe)
    found = planned(pipe)
    assert (counts(pipe.unet)[0], counts(pipe.dot)[0]) == {
        "unmerged": (1, 2),
        "gate": (1, 2),
    }.get(change, (2, 2))
    if change not in ("moved", "unmerged", "attention"):
        assert difference(found, before) > 1e-4
    again = planned(pipe)
    disable_cuda_graphs(pipe)
    assert torch.equal(found, again) and torch.equal(planned(pipe), found)


def test_weights_changed_in_place_are_read_where_they_are(graphed):
    module, call = graphed
    module(torch.ones(2), torch.tensor(0.0))
    module.weight.mul_(3)
    assert module(torch.ones(2), torch.tensor(0.0))[0].tolist() == [3, 3]
    assert call.num_captures == 1


def test_older_graphs_go_where_a_capture_changed_the_model(graphed):
    module, call = graphed
    plain = module.forward

    class Sets(type(module)):
        def forward(self, sample, timestep):
            if len(sample) == 2:
                self.setting = 5
            return plain(sample, timestep)

    module.__class__ = Sets
    for size in (1, 2, 1, 2):
        module(torch.zeros(size, 2), torch.tensor(1.0))
    assert call.num_captures == 3


DROPS = {
    "unmerged": lambda pipe: pipe.dot.unmerge_lora(),
    "merged anew": lambda pipe: pipe.dot.merge_lora(),
    "another precision": lambda pipe: pipe.to(torch.float64),
    "fused": lambda pipe: [
        weight.data.mul_(1.01) for weight in pipe.unet.parameters() if weight.ndim > 1
    ],
}


@pytest.mark.parametrize("change", DROPS)
def test_merged_weights_are_let_go_of_before_there_are_others(pipe, change):
    with_graphs(pipe, trained_dot(pipe.unet))
    planned(pipe)
    shared = {*pipe.unet.parameters(), *pipe.dot.parameters()}
    merged = next(each for each in pipe.dot._tree[0].parameters() if each not in shared)
    merged = weakref.ref(merged)
    DROPS[change](pipe)
    if change == "fused":
        pipe.dot.bind(pipe.unet)
    assert graphed_call(pipe.dot)._state is None and not graphed_call(pipe.dot)._graphs
    gc.collect()
    assert merged() is None


def test_graphs_go_with_weights_moved_to_another_device(graphed):
    """ "meta" stands for the CPU."""
    module, call = graphed
    module(torch.ones(2), torch.tensor(1.0))
    with pytest.warns(UserWarning, match="not given tensors on cpu"):
        module.to("meta")(torch.ones(2, device="meta"), torch.tensor(1.0, device="meta"))
    assert not call._graphs and call._state is None


@pytest.mark.parametrize("is_broken", [False, True])
def test_the_default_generator_goes_on_after_a_failed_capture(monkeypatch, is_broken):
    class Generator:
        state = "captured"

        def clone_state(self):
            if is_broken:
                raise RuntimeError("device-side assert")
            return "free"

        def graphsafe_set_state(self, state):
            self.state = state

    generators = Generator(), Generator()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    with _mended_generator():
        pass
    assert generators[1].state == "captured"
    with pytest.raises(ValueError, match="of the call"), _mended_generator():
        raise ValueError("of the call")
    expected = ["captured", "captured" if is_broken else "free"]
    assert [each.state for each in generators] == expected


def test_a_replay_never_reads_what_was_freed(graphed):
    module, call = graphed
    module(torch.ones(2), torch.tensor(0.0))
    replays = []
    (graph,) = call._graphs.values()
    call._graphs = type(call._graphs)(
        (key, dataclasses.replace(graph, replay=lambda: replays.append(1))) for key in call._graphs
    )
    module.weight.data = torch.full((2,), 5.0)
    assert module(torch.ones(2), torch.tensor(0.0))[0].tolist() == [5, 5]
    assert not replays and call.num_captures == 2


def test_state_is_looked_at_in_little_time():
    """That of Stable Diffusion's UNet, in CPU time; the device works meanwhile."""
    unet = build_architecture(ARCHITECTURES["sd15"], torch.device("meta"), torch.float32, False)
    state = ModelState((unet,))
    seconds = []
    for look in (state.has_moved, state.has_changed):
        started = time.process_time()
        for _ in range(5):
            assert not look()
        seconds.append((time.process_time() - started) / 5)
    print(f"has_moved {seconds[0] * 1e3:.2f} ms, has_changed {seconds[1] * 1e3:.2f} ms")
    assert seconds[0] < 0.002 and seconds[1] < 0.02


class TestFallbacks:
    """The model is called as it is, and why is told once."""

    def check(self, module, call, reason, *given, **more):
        given = given or (torch.ones(2), torch.tensor(1.0))
        with pytest.warns(UserWarning, match=f"without a CUDA graph: .*{reason}") as told:
            for _ in range(2):
                assert module(*given, **more)[0].tolist() == [2, 2]
        assert len(told) == 1 and call.num_replays == 0 and len(call.reasons) == 1

    def test_gradients(self, graphed):
        with torch.enable_grad():
            self.check(*graphed, "gradients are enabled")

    def test_other_devices(self, graphed):
        graphed[1].shared.capture.device_type = "cuda"
        self.check(*graphed, "not given tensors on cuda")

    def test_objects(self, graphed):
        self.check(*graphed, "is given or returns a Generator", more=torch.Generator())

    def test_hooks(self, graphed):
        handle = graphed[0].register_forward_hook(lambda *given: None)
        self.check(*graphed, "its Add has a hook")
        handle.remove()
        graphed[0](torch.ones(2), torch.tensor(1.0))
        assert graphed[1].num_replays == 1

    def test_replaced_forward_methods(self, graphed):
        module, call = graphed
        module(torch.ones(2), torch.tensor(1.0))
        forward = module.forward
        module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
        with pytest.warns(UserWarning, match="another forward method"):
            module(torch.ones(2), torch.tensor(1.0))
        module.forward = forward  # as accelerate leaves it
        module(torch.ones(2), torch.tensor(1.0))
        assert call.num_captures == call.num_replays == 2

    def test_failed_captures(self, graphed):
        error = RuntimeError("operation not permitted when stream is capturing\nmore of it")
        graphed[1].shared.capture.error = error
        self.check(*graphed, "operation not permitted when stream is capturing")
        assert len(graphed[1].shared.capture.devices) == 1

    def test_failed_captures_leave_other_calls_theirs(self, graphed):
        module, call = graphed
        capture = call.shared.capture
        capture.error = torch.OutOfMemoryError("out of memory")
        with pytest.warns(UserWarning, match="capturing it failed .out of memory"):
            module(torch.ones(9, 2), torch.tensor(1.0))
        capture.error = None
        for size in (1, 9, 1):
            assert module(torch.ones(size, 2), torch.tensor(1.0))[0].shape == (size, 2)
        assert (call.num_captures, call.num_replays, len(capture.devices)) == (1, 2, 2)

    def test_after_many_failed_captures_no_other_is_tried(self, graphed):
        module, call = graphed
        module(torch.ones(2), torch.tensor(1.0))
        call.shared.capture.error = RuntimeError("it looks at values")
        with pytest.warns(UserWarning, match="without a CUDA graph: capturing"):
            for number in range(20):
                module(torch.ones(2), torch.tensor(1.0), by=float(2 + number))
        assert "capturing others of its calls failed" in call.reasons
        assert len(call.shared.capture.devices) == 1 + 8
        module(torch.ones(2), torch.tensor(1.0))
        assert call.num_replays == 2

    def test_errors_of_the_caller_stay(self, graphed):
        module, call = graphed
        with pytest.raises(RuntimeError, match="size of tensor"), warnings.catch_warnings():
            warnings.simplefilter("error")
            module(torch.ones(3), torch.tensor(1.0))
        assert not call.reasons and not call._failures
        module(torch.ones(2), torch.tensor(1.0))
        assert call.num_replays == 1

    def test_a_dot_that_keeps_a_state(self, pipe):
        class Sums(nn.Module):
            def forward(self, sample, timestep, jump, **conditions):
                return 0.1 * jump.memory.setdefault("sum", torch.zeros_like(sample)).add_(sample)

        enable_morse(pipe, Sums())
        expected = planned(pipe, "DoooDo")
        with_graphs(pipe)
        with pytest.warns(UserWarning, match="Sums .* writes to its jump point's memory"):
            found = planned(pipe, "DoooDo")
        assert torch.equal(found, expected) and counts(pipe.dot) == (0, 0)
        assert len(graphed_call(pipe.dot).reasons) == 1

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"norm": "dnr"}, "writes to its jump point's memory"),
            (
                {"conv": "odconv", "conv_options": {"condition": "time"}},
                "look at the values of the time",
            ),
        ],
    )
    def test_dots(self, pipe, options, reason):
        dot = MorseDot.from_dash(pipe.unet, 1, lora_rank=2, **options).eval()
        enable_morse(pipe, dot)
        expected = planned(pipe, "DooD")
        with_graphs(pipe)
        with pytest.warns(UserWarning, match=f"MorseDot is called without .*{reason}"):
            found = planned(pipe, "DooD")
        assert torch.equal(found, expected) and counts(dot) == (0, 0)
        assert len(graphed_call(dot).reasons) == 1
        assert counts(pipe.unet) == (1, 2)

    def test_offloading(self, pipe):
        from accelerate import cpu_offload

        with_graphs(pipe, trained_dot(pipe.unet))
        expected = planned(pipe)
        cpu_offload(pipe.unet, torch.device("cpu"))
        with pytest.warns(UserWarning, match="has a hook or another forward method"):
            found = planned(pipe)
        assert difference(found, expected) < 1e-4
        assert counts(pipe.unet) == (1, 2) and counts(pipe.dot) == (1, 1)

    def test_within_another_capture(self, pipe):
        """A Dot that runs Dash is captured with it."""

        class Twice(nn.Module):
            def __init__(self, dash):
                super().__init__()
                self.dash = dash

            def forward(self, sample, timestep, jump, **conditions):
                return self.dash(sample, timestep, **conditions).sample - jump.model_output

        dot = Twice(pipe.unet)
        with_graphs(pipe, dot)
        found = planned(pipe, "DoD")
        assert counts(dot) == (1, 1)
        assert difference(found, latents(pipe, num_inference_steps=3)) < 1e-4

    def test_where_there_is_no_accelerator(self, pipe):
        expected = latents(pipe, num_inference_steps=2)
        enable_cuda_graphs(pipe)
        with pytest.warns(UserWarning, match="UNet2DConditionModel is called without a CUDA"):
            assert torch.equal(latents(pipe, num_inference_steps=2), expected)


class TestReusedMemory:
    """What is kept of a model's output outlives its next call."""

    def test_leapfrog_copies_estimates_of_clean_samples(self):
        rows = [[900, 0.5, 0.5, 0.5], [500, 0.5, 0.5, 0.5], [100, 0.5, 0.5, 0.5]]
        generator = torch.Generator().manual_seed(0)
        estimates = torch.randn(3, 1, 1, 2, 2, generator=generator)

        def run(buffer):
            scheduler = LeapfrogScheduler(fitted_steps=rows, prediction_type="sample")
            scheduler.set_timesteps(3)
            sample = torch.ones(1, 1, 2, 2)
            for timestep, estimate in zip(scheduler.timesteps, estimates, strict=True):
                output = estimate if buffer is None else buffer.copy_(estimate)
                sample = scheduler.step(output, timestep, sample).prev_sample
            return sample

        assert torch.equal(run(torch.empty(1, 1, 2, 2)), run(None))


def test_training_graphs_take_a_dot_as_it_is():
    with pytest.raises(ValueError, match="this one is in a Linear"):
        GraphedDot(nn.Linear(1, 1))


def test_mixtures_are_exact_where_products_may_be_rounded():
    precisions = [_precision(torch.device(name)) for name in ("cuda", "cpu", "mps")]
    assert precisions == [torch.float64, torch.float32, torch.float32]


@pytest.mark.gpu
class TestOnAnAccelerator:
    @pytest.fixture
    def pipe(self):
        pipe = text_pipe().to("cuda")
        return enable_morse(pipe, trained_dot(pipe.unet))

    def test_images_are_the_eager_ones(self, pipe):
        expected = planned(pipe, "DooDo")
        enable_cuda_graphs(pipe)
        for run in range(1, 3):
            torch.testing.assert_close(planned(pipe, "DooDo"), expected, rtol=1e-4, atol=1e-4)
            assert counts(pipe.unet) == (1, 2 * run) and counts(pipe.dot) == (1, 3 * run)

    def test_another_precision_and_shape(self, pipe):
        enable_cuda_graphs(pipe)
        planned(pipe)
        pipe.to(torch.float16)
        one = {name: value[:1].half().cuda() for name, value in text_inputs_of(pipe).items()}
        found = planned(pipe, **one)
        disable_cuda_graphs(pipe)
        torch.testing.assert_close(found, planned(pipe, **one), rtol=1e-2, atol=1e-2)

    def test_autocast(self, pipe):
        with torch.autocast("cuda", torch.bfloat16):
            expected = planned(pipe)
            enable_cuda_graphs(pipe)
            found = planned(pipe)
        with torch.autocast("cuda", torch.bfloat16):
            torch.testing.assert_close(planned(pipe), found)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)

    def test_a_failed_capture_leaves_the_stream(self, pipe):
        class Looks(nn.Module):
            def forward(self, sample, timestep, jump, **conditions):
                return sample * float(sample.sum() > 0)

        enable_morse(pipe, Looks())
        enable_cuda_graphs(pipe)
        stream = torch.cuda.current_stream()
        with pytest.warns(UserWarning, match="capturing it failed"):
            planned(pipe)
        assert torch.cuda.current_stream() == stream
        assert torch.randn(1, device="cuda").isfinite()
        assert planned(pipe).isfinite().all()
