"""A Dot whose norms relay (DNR): states across its blocks and steps, in runs and on its own."""

import copy
import functools
from dataclasses import replace
from itertools import groupby, pairwise

import attached
import diffusers
import pytest
import torch
from accelerate import cpu_offload
from attached import text_pipe
from tiny_pipelines import LoopPipeline, loop_pipeline, text_inputs, text_unet
from tiny_transformers import conditions, sample_shapes, tiny_dit
from torch.testing import assert_close

from morse import MorseDot, MorsePlan, disable_morse, enable_morse, morse_sample
from morse.modules import DynamicNormRelay
from morse.sampling import JumpPoint

SETTINGS = {"num_down_blocks": 2, "block_out_channels": (8, 8), "layers_per_block": 2}


@pytest.fixture(scope="module")
def dash(build_unet):
    return build_unet(channels=(8, 8), sample_size=16, num_class_embeds=3)


def make(dash, norm="dnr", opened=True, **options):
    """A Dot as after some training; one whose norms are not `opened` is as with norm="group"."""
    torch.manual_seed(1)
    dot = MorseDot.from_dash(dash, lora_rank=2, norm=norm, **SETTINGS | options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in dot.named_parameters():
            if not name.startswith("relay") and not name.endswith(".a"):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in dot.named_parameters():
            if opened and (name.startswith("relay") or name.endswith(".a")):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return dot.eval()


@functools.cache
def trained(dash):
    return make(dash)


def labels(batch_size=2):
    return {"class_labels": torch.arange(batch_size)}


def jump_point(batch_size=2, seed=0, shape=(1, 16, 16), out_shape=None):
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch_size, *shape, generator=generator)
    output = torch.randn(batch_size, *(out_shape or shape), generator=generator)
    return JumpPoint(sample, torch.tensor([900] * batch_size), output)


def walk(dot, jump, num_steps=3, **conditions):
    """Residuals of Dot steps after one jump point, whose own sample they start from."""
    steps = range(1, num_steps + 1)
    return torch.stack([dot(*at(step, jump), jump, **conditions) for step in steps])


def at(step, jump):
    """Sample and timestep of a walk."""
    return 0.9**step * jump.sample, jump.timestep - 100 * step


def input_maps(dot):
    return [cell.w_ih[0] for cells in dot.relay for cell in cells.values()]


def anew(jump):
    return replace(jump, memory={})


class TestBeginning:
    @pytest.mark.parametrize("m", [1, 2])
    def test_an_untrained_dot_is_exactly_reuse(self, dash, m):
        widths = {"num_down_blocks": m, "block_out_channels": (8, 4)[:m]}
        dot = MorseDot.from_dash(dash, norm="dnr", **widths)
        assert (walk(dot, jump_point(), **labels()) == 0).all()

    def test_it_begins_as_group_norm_to_the_last_bit(self, dash):
        drawn = []
        for norm in ("group", "dnr"):
            torch.manual_seed(0)
            drawn.append(MorseDot.from_dash(dash, norm=norm, **SETTINGS).state_dict())
        assert all(torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())
        group, relay = make(dash, "group"), make(dash, opened=False)
        missing, unexpected = relay.load_state_dict(group.state_dict(), strict=False)
        assert {name.split(".")[-1] for name in missing if not name.startswith("relay.")} == {"a"}
        assert unexpected == []
        jump = jump_point()
        assert torch.equal(walk(relay, jump, **labels()), walk(group, jump, **labels()))
        assert (walk(trained(dash), anew(jump), **labels()) - walk(group, jump, **labels())).any()

    def test_training_opens_it(self, dash):
        """conv_out starts at zero, then a: each learns once the one before has."""
        dot = MorseDot.from_dash(dash, norm="dnr", lora_rank=2, **SETTINGS).train()
        optimizer, reached = torch.optim.AdamW(dot.parameters(), lr=1e-2), []
        for _ in range(3):
            optimizer.zero_grad()
            (walk(dot, jump_point(), **labels()) - 1).square().mean().backward()
            openings = [p for name, p in dot.named_parameters() if name.endswith(".a")]
            cells = [maps.seq[2].weight for maps in input_maps(dot)]
            parts = ([dot.conv_out.weight], openings, cells)
            reached.append([all(bool(p.grad.any()) for p in part) for part in parts])
            optimizer.step()
        assert reached == [[True, False, False], [True, True, False], [True, True, True]]

    def test_gradients_reach_the_cells_after_one_update_of_a_trained_dot(self, dash):
        dot = make(dash, opened=False).train()
        optimizer = torch.optim.AdamW(dot.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            walk(dot, jump_point(), **labels()).square().mean().backward()
            optimizer.step()
        assert all(bool(p.grad.any()) for p in dot.relay.parameters())
        assert [name for name, p in dot.named_parameters() if p.grad is None] == []

    def test_the_option_is_checked(self, dash):
        with pytest.raises(ValueError, match=r"norm must be one of \('group', 'dnr'\), got 'layer"):
            MorseDot.from_dash(dash, norm="layer", **SETTINGS)


class TestStates:
    def test_they_go_from_norm_to_norm_and_on_to_the_next_step(self, dash):
        dot, calls = trained(dash), []

        def record(norm, given, output):
            calls.append((norm, given[1], output[1]))

        norms = [module for module in dot.modules() if isinstance(module, DynamicNormRelay)]
        hooks = [norm.register_forward_hook(record) for norm in norms]
        walk(dot, jump_point(), 2, **labels())
        for hook in hooks:
            hook.remove()
        # Two levels with two blocks of two norms each on the way down and on the way up.
        assert len(norms) == len(set(norms)) == 16 and len(calls) == 32
        assert [norm for norm, *_ in calls[:16]] == [norm for norm, *_ in calls[16:]]
        # Per level: that after the skip connection is twice as wide as the others.
        assert [sorted(cells) for cells in dot.relay] == [["16", "8"], ["16", "8"]]
        by_cell = sorted(calls, key=lambda call: id(call[0].cell))
        for cell, group in groupby(by_cell, key=lambda call: call[0].cell):
            chain = list(group)
            assert len(chain) == {8: 14, 16: 2}[cell.channels]
            assert chain[0][1] is None
            assert all(given is before for (*_, before), (_, given, _) in pairwise(chain))

    def test_a_later_step_depends_on_the_earlier_ones_and_never_the_other_way(self, dash):
        dot, jump = trained(dash), jump_point()
        found = walk(dot, jump, **labels())
        assert torch.equal(walk(dot, anew(jump), **labels()), found)
        alone = dot(*at(2, jump), anew(jump), **labels())
        assert (alone - found[1]).abs().max() > 1e-3
        here = anew(jump)
        first, timestep = at(1, here)
        one = dot(first.requires_grad_(), timestep, here, **labels())
        two = dot(*at(2, here), here, **labels())
        assert torch.equal(torch.stack([one, two]), found[:2])
        assert torch.autograd.grad(two.sum(), first)[0].abs().max() > 0

    def test_two_trajectories_in_turns_do_not_mix(self, dash):
        dot, jumps = trained(dash), (jump_point(), jump_point(1, seed=5))
        each = [walk(dot, anew(jump), **labels(len(jump.sample))) for jump in jumps]
        for step in range(3):
            for jump, expected in zip(jumps, each, strict=True):
                found = dot(*at(step + 1, jump), jump, **labels(len(jump.sample)))
                assert torch.equal(found, expected[step])

    def test_two_dots_with_one_jump_point_do_not_mix(self, dash):
        dots, jump = (trained(dash), copy.deepcopy(trained(dash)).bind(dash)), jump_point()
        alone = walk(dots[0], anew(jump), **labels())
        for dot in dots:
            assert torch.equal(walk(dot, jump, **labels()), alone)

    def test_a_call_that_fails_midway_moves_no_state(self, dash):
        dot, jump = trained(dash), jump_point()
        expected = walk(dot, anew(jump), **labels())

        def fail(*_):
            raise KeyboardInterrupt

        hook = dot.up_blocks[-1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            walk(dot, jump, **labels())
        hook.remove()
        assert torch.equal(walk(dot, jump, **labels()), expected)

    def test_plain_norms_leave_the_memory_alone(self, dash):
        jump = jump_point()
        walk(make(dash, "group"), jump, **labels())
        assert jump.memory == {}


class TestDenoisers:
    def check(self, dot, jump, **conditions):
        """A batch equals its images one by one, and steps depend on those before."""
        batch = walk(dot, jump, **conditions)
        assert (batch[1] - walk(dot, anew(jump), 1, **conditions)[0]).abs().max() > 1e-4
        for row in range(2):
            rows = slice(row, row + 1)
            own = {name: value[rows] for name, value in conditions.items()}
            first = JumpPoint(jump.sample[rows], jump.timestep[rows], jump.model_output[rows])
            alone = walk(dot, first, **own)
            assert_close(alone, batch[:, rows], rtol=1e-3, atol=1e-4)
        assert_close(walk(dot.merge_lora(), anew(jump), **conditions), batch, rtol=1e-3, atol=1e-3)
        assert torch.equal(walk(dot.unmerge_lora(), anew(jump), **conditions), batch)

    def test_unet(self, dash):
        self.check(make(dash), jump_point(), **labels())

    def test_conditional_unet(self):
        text = text_inputs()["prompt_embeds"]
        jump = jump_point(shape=(4, 16, 16))
        self.check(make(text_unet()), jump, encoder_hidden_states=text)

    def test_dit(self):
        shape, out_shape = sample_shapes("dit")
        jump = jump_point(shape=shape[1:], out_shape=out_shape[1:])
        self.check(make(tiny_dit()), jump, **conditions("dit"))


class TestSaving:
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    def test_round_trip(self, dash, tmp_path, low_cpu_mem_usage):
        dot = trained(dash)
        dot.save_pretrained(tmp_path)
        loaded = MorseDot.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert loaded.config.norm == "dnr"
        self.check_twin(loaded.bind(dash), dot)

    def test_copy(self, dash):
        self.check_twin(copy.deepcopy(trained(dash)).bind(dash), trained(dash))

    def check_twin(self, twin, dot):
        jump = jump_point()
        assert torch.equal(walk(twin, jump, **labels()), walk(dot, anew(jump), **labels()))
        norms = [module for module in twin.modules() if isinstance(module, DynamicNormRelay)]
        own = {cell for cells in twin.relay for cell in cells.values()}
        assert {norm.cell for norm in norms} == own
        assert own.isdisjoint(cell for cells in dot.relay for cell in cells.values())

    def test_double_precision(self, dash):
        jump = jump_point()
        expected = walk(trained(dash), anew(jump), **labels())
        double = copy.deepcopy(dash).double()
        dot = copy.deepcopy(trained(dash)).double().bind(double)
        jump = JumpPoint(jump.sample.double(), jump.timestep, jump.model_output.double())
        found = walk(dot, jump, **labels())
        assert found.dtype == torch.float64
        assert_close(found.float(), expected, rtol=1e-3, atol=1e-4)

    def test_states_under_autocast(self, dash):
        jump = jump_point()
        expected = walk(trained(dash), anew(jump), **labels())
        with torch.autocast("cpu", torch.bfloat16):
            found = walk(trained(dash), jump, **labels())
        assert (found - expected).square().mean() < 0.01 * expected.square().mean()


class Recorded:
    """A Dot that notes what it was asked and what it said."""

    def __init__(self, dot):
        self.dot, self.calls = dot, []

    def __call__(self, sample, timestep, jump, **conditions):
        output = self.dot(sample, timestep, jump, **conditions)
        self.calls.append((sample.clone(), timestep, jump, conditions, output.clone()))
        return output


def check_segments(calls, dot, plan="DooDoo"):
    """Dot's outputs follow from the latest Dash step on; nothing before it has a part in them."""
    for segment in plan.split("D")[1:]:
        now, calls = calls[: len(segment)], calls[len(segment) :]
        fresh = anew(now[0][2])
        for sample, timestep, jump, given, output in now:
            assert jump.timestep == fresh.timestep
            assert torch.equal(dot(sample, timestep, fresh, **given), output)
        sample, timestep, jump, given, output = now[1]
        assert (dot(sample, timestep, anew(jump), **given) - output).abs().max() > 1e-4
    assert calls == []


class TestRuns:
    def test_a_pipeline_equals_the_reference_loop(self, build_unet):
        unet = build_unet(channels=(8, 8), sample_size=16)
        dot = make(unet)
        scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        pipe = enable_morse(loop_pipeline(unet, scheduler), dot, merge_lora=False)
        found = pipe(2, torch.Generator().manual_seed(0), plan="DooDoo").images
        assert pipe.last_run.num_dot == 4 and not pipe.last_run.fallbacks
        disable_morse(pipe)
        recorded = Recorded(dot)
        expected = morse_sample(
            lambda x, t: unet(x, t).sample,
            recorded,
            lambda z, x, t, _: scheduler.step(z, t, x).prev_sample,
            torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)),
            scheduler.timesteps.tolist(),
            MorsePlan.from_string("DooDoo"),
        )
        assert torch.equal(found, expected)
        with torch.no_grad():
            check_segments(recorded.calls, dot)

    def test_guidance_in_one_batch(self):
        pipe = text_pipe()
        dot = make(pipe.unet, num_down_blocks=1, block_out_channels=(8,))
        recorded = Recorded(dot)
        enable_morse(pipe, recorded)
        call = {**text_inputs(), "output_type": "latent", "height": 16, "width": 16}

        def run():
            generator = torch.Generator().manual_seed(0)
            return pipe(**call, plan="DooDoo", generator=generator).images

        found = run()
        with torch.no_grad():
            check_segments(recorded.calls, dot)
        assert torch.equal(run(), found)

    def test_branches_in_separate_calls_have_their_own_states(self, dash):
        scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        pipe = InTurns(dash, scheduler)
        pipe.set_progress_bar_config(disable=True)
        enable_morse(pipe, trained(dash), merge_lora=False)
        both = pipe([0, 2], plan="DooDoo")
        assert pipe.last_run.num_dot == 8 and not pipe.last_run.fallbacks
        for index, label in enumerate([0, 2]):
            assert torch.equal(pipe([label], plan="DooDoo")[0], both[index])

    @pytest.mark.parametrize("by", ["layers", "groups"])
    def test_offloaded(self, monkeypatch, by):
        def treat(pipe):
            modules = [pipe.components[name] for name in ("unet", "dot") if name in pipe.components]
            if by == "layers":
                for module in [*modules, pipe.vae]:
                    if not hasattr(module, "_hf_hook"):
                        cpu_offload(module, torch.device("cpu"))
            else:
                pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")

        def small(unet):
            return make(unet, num_down_blocks=1, block_out_channels=(8,), layers_per_block=1)

        monkeypatch.setattr(attached, "trained_dot", small)
        found = attached.check_treated(treat, merge_lora=False)
        assert torch.equal(found, attached.check_treated(lambda pipe: None, False, after=False))

    def test_an_interrupted_run_leaves_nothing_behind(self, dash):
        scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        pipe = InTurns(dash, scheduler)
        pipe.set_progress_bar_config(disable=True)
        enable_morse(pipe, trained(dash), merge_lora=False)
        expected = pipe([1], plan="DooDoo")[0]
        hook = dash.conv_in.register_forward_pre_hook(interrupt_at_second_dash())
        with pytest.raises(KeyboardInterrupt):
            pipe([1], plan="DooDoo")
        hook.remove()
        assert torch.equal(pipe([1], plan="DooDoo")[0], expected)


def interrupt_at_second_dash():
    calls = []

    def interrupt(*_):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    return interrupt


class InTurns(LoopPipeline):
    """Draws a picture for each label, from the same noise, with one call for each at a step."""

    @torch.no_grad()
    def __call__(self, classes, num_inference_steps=6):
        self.scheduler.set_timesteps(num_inference_steps)
        noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        samples, given = [noise] * len(classes), [torch.tensor([label]) for label in classes]
        for timestep in self.scheduler.timesteps:
            outputs = [
                self.unet(sample, timestep, class_labels=label).sample
                for sample, label in zip(samples, given, strict=True)
            ]
            samples = [
                self.scheduler.step(output, timestep, sample).prev_sample
                for output, sample in zip(outputs, samples, strict=True)
            ]
        return samples
