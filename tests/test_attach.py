import copy
import pickle
import warnings
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from attached import latents, planned, text_pipe, trained_dot
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from morse import MorseDot, MorsePipeline, disable_morse, enable_morse
from morse.denoisers import Denoiser
from morse.plan import MorsePlan
from morse.saved_plans import SavedPlan
from morse.slot import CURRENT_RUN
from morse.summary import MorseRun, SpeedRatio, warn_unless_engaged
from morse.switch import Dispatcher


def sample(pipe, batch_size=2, seed=0, **kwargs):
    generator = [torch.Generator().manual_seed(seed + index) for index in range(batch_size)]
    return pipe(batch_size=batch_size, generator=generator, output_type="pt", **kwargs).images


def dispatcher(run, pipe, dot):
    return Dispatcher(run, [Denoiser("unet", pipe.unet, dot)], pipe.scheduler, lambda: 1.0)


@pytest.fixture
def pipe(make_pipe):
    return make_pipe()


@pytest.fixture
def dot(pipe, make_dot):
    return make_dot(pipe.unet)


@pytest.mark.parametrize(
    "scheduler", ["ddim", "ddpm", "dpmsolver++", "dpmsolver++1", "sde-dpmsolver++", "lcm"]
)
def test_without_a_plan_and_all_dash_are_bit_identical_to_the_bare_pipeline(
    make_pipe, make_dot, scheduler
):
    pipe = make_pipe(scheduler)
    expected = sample(pipe, num_inference_steps=6)
    MorsePipeline.from_pipe(pipe, make_dot(pipe.unet), scheduler=scheduler)
    assert torch.equal(sample(pipe, num_inference_steps=6), expected)
    assert pipe.last_run is None
    assert torch.equal(sample(pipe, plan="DDDDDD"), expected)
    assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (6, 0)
    with_dot = sample(pipe, plan="DooDoo")
    assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (2, 4)
    assert pipe.last_run.fallbacks == {}
    assert with_dot.isfinite().all() and not torch.equal(with_dot, expected)
    assert torch.equal(sample(pipe, plan="DooDoo"), with_dot)


def test_a_merged_dot_is_taken_apart_where_that_is_asked_for(pipe, dot):
    for merge_lora, merged in ((True, True), (None, True), (False, False), (None, False)):
        enable_morse(pipe, dot, merge_lora)
        assert dot.is_merged == merged


def test_enable_twice_and_disable_restore_the_pipeline(pipe, dot):
    classes, config = type(pipe), dict(pipe.config)
    expected = sample(pipe, num_inference_steps=4)
    enable_morse(enable_morse(pipe, dot), dot)
    with_dot = sample(pipe, plan="DoDo")
    assert isinstance(pipe, classes) and type(pipe).__name__ == classes.__name__
    disable_morse(disable_morse(pipe))
    assert type(pipe) is classes and dict(pipe.config) == config
    assert not hasattr(pipe, "dot") and "_compiled_call_impl" not in {
        key for key, value in vars(pipe.unet).items() if value is not None
    }
    assert torch.equal(sample(pipe, num_inference_steps=4), expected)
    assert torch.equal(sample(enable_morse(pipe, dot), plan="DoDo"), with_dot)


@pytest.mark.supports("pipeline", "DDPMPipeline")
def test_matches_the_reference_loop(pipe, dot):
    """The attached pipeline does what `morse_sample` does with the same solver."""
    from morse import morse_sample
    from morse.spaces import ddim_step, signal_and_noise

    enable_morse(pipe, dot)
    found = sample(pipe, batch_size=1, plan="DooDoo")

    def step(model_output, x, timestep, prev_timestep):
        rates = [
            signal_and_noise(pipe.scheduler.alphas_cumprod, torch.tensor(t), x)
            for t in (timestep, prev_timestep)
        ]
        return ddim_step(model_output, x, *rates)

    disable_morse(pipe)
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(6)
    timesteps = pipe.scheduler.timesteps.tolist()
    # DDIMScheduler.step guesses where a trailing step lands; ours is told, and by the same rule.
    stride = 1000 // 6
    ends = [t - stride for t in timesteps]
    landing = dict(zip(timesteps, [max(t, -1) for t in ends], strict=True))
    expected = morse_sample(
        lambda x, t: pipe.unet(x, t).sample,
        dot,
        lambda z, x, t, _: step(z, x, t, landing[t]),
        noise,
        timesteps,
        MorsePlan.from_string("DooDoo"),
    )
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)


def test_pictures_do_not_depend_on_the_batch(pipe, dot):
    enable_morse(pipe, dot)
    batch = sample(pipe, batch_size=3, plan="DooDo")
    single = sample(pipe, batch_size=1, seed=2, plan="DooDo")
    torch.testing.assert_close(batch[2:], single, rtol=1e-3, atol=1e-4)


def test_an_interrupted_run_leaves_nothing_behind(pipe, dot):
    enable_morse(pipe, dot)
    first = sample(pipe, plan="DooDoo")
    step, calls = pipe.scheduler.step, []

    def breaking(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    pipe.scheduler.step = breaking
    with pytest.raises(KeyboardInterrupt):
        sample(pipe, plan="DooDoo")
    del pipe.scheduler.step
    assert CURRENT_RUN.get() is None
    assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (1, 2)
    assert torch.equal(sample(pipe, plan="DooDoo"), first)


def test_a_run_that_breaks_within_dash_still_tells_what_it_cost(pipe, dot):
    calls = []

    def out_of_memory(unet, arguments):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError

    enable_morse(pipe, dot)
    pipe.unet.register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        sample(pipe, plan="DDD")
    assert pipe.last_run.lsd == 1.0 and "1 Dash, 0 Dot" in pipe.morse_summary()


def test_a_run_lets_go_of_models_and_samples(pipe):
    kept = []

    def own(sample, timestep, jump):
        kept.append(weakref.ref(jump.sample))
        return torch.zeros_like(sample)

    enable_morse(pipe, own)
    sample(pipe, plan="DoDo")
    assert [reference() for reference in kept] == [None, None]
    assert pickle.loads(pickle.dumps(pipe.last_run)) == pipe.last_run


def test_only_a_timed_run_waits_for_the_accelerator(pipe, monkeypatch):
    """ "meta" stands for one."""
    waited, plan = [], MorsePlan.from_string("D")
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    runs = (MorseRun(plan, None, timings=timings) for timings in (None, []))
    plain, timed = (dispatcher(run, pipe, None) for run in runs)
    plain._now(torch.empty(1, device="meta"))
    timed._now(torch.empty(1))
    assert not waited
    timed._now(torch.empty(1, device="meta"))
    assert waited == [torch.device("meta")]


def test_the_denoiser_outside_the_pipeline_is_plain_dash(pipe, dot):
    x, t = torch.randn(1, 1, 16, 16), torch.tensor(500)
    expected = pipe.unet(x, t).sample
    enable_morse(pipe, dot)
    sample(pipe, plan="DooDoo")
    assert torch.equal(pipe.unet(x, t).sample, expected)


def test_two_pipelines_share_one_denoiser(make_pipe, pipe, dot):
    other = make_pipe("dpmsolver++", unet=pipe.unet)
    bare = sample(other, num_inference_steps=4)
    enable_morse(pipe, dot)
    first = sample(pipe, plan="DoDo")
    assert torch.equal(sample(other, num_inference_steps=4), bare)
    enable_morse(other, dot)
    second = sample(other, plan="DoDo")
    disable_morse(pipe)
    assert torch.equal(sample(other, plan="DoDo"), second)
    assert torch.equal(sample(enable_morse(pipe, dot), plan="DoDo"), first)


def test_copies_and_compiled_denoisers(pipe, dot):
    enable_morse(pipe, dot)
    expected = sample(pipe, plan="DoDo")
    twin = copy.deepcopy(pipe)
    assert torch.equal(sample(twin, plan="DoDo"), expected) and twin.last_run.num_dot == 2
    calls = []

    def compiled(*args, **kwargs):
        calls.append(1)
        return pipe.unet._call_impl(*args, **kwargs)

    pipe.unet._compiled_call_impl = compiled  # what `unet.compile()` does
    assert torch.equal(sample(pipe, plan="DoDo"), expected)
    assert len(calls) == 2
    disable_morse(pipe)
    assert pipe.unet._compiled_call_impl is compiled


class TestOwnDot:
    """Any callable can be the Dot."""

    def test_zeros_are_reuse(self, pipe):
        enable_morse(pipe, MorseDot.from_dash(pipe.unet, num_down_blocks=1, lora_rank=2))
        reuse = sample(pipe, plan="DoooDo")  # an untrained Dot's residuals are zero
        enable_morse(pipe, lambda x, t, jump: torch.zeros_like(x))
        assert torch.equal(sample(pipe, plan="DoooDo"), reuse)
        assert pipe.last_run.num_dot == 4
        assert not torch.equal(sample(pipe, plan="DDDDDD"), reuse)

    def test_dash_itself_as_an_independent_dot_changes_nothing(self, pipe):
        expected = sample(pipe, num_inference_steps=5)

        def dot(x, t, jump):
            return pipe.unet._call_impl(x, t, return_dict=False)[0]

        dot.independent = True
        enable_morse(pipe, dot)
        assert torch.equal(sample(pipe, plan="DooDo"), expected)

    def test_it_is_given_what_dash_is(self):
        seen = []

        def dot(sample, timestep, jump, **conditions):
            seen.append(conditions)
            return torch.zeros_like(jump.model_output)

        planned(enable_morse(text_pipe(), dot), "Doo")
        assert len(seen) == 2 and all("encoder_hidden_states" in each for each in seen)


class TestBudgets:
    def test_lsd_is_spent(self, pipe, dot):
        enable_morse(pipe, dot)
        pipe.speed_ratio = 5.0
        sample(pipe, lsd=6)
        run = pipe.last_run
        assert run.plan == MorsePlan.from_budget(6, 5.0, 2.0)
        assert run.lsd == pytest.approx(run.num_dash + run.num_dot / 5) and run.lsd <= 6
        assert run.seconds > 0

    def test_counts(self, pipe, dot):
        enable_morse(pipe, dot)
        sample(pipe, num_dash_steps=2, num_dot_steps=4)
        assert pipe.last_run.lsd is None  # N is not known
        assert str(pipe.last_run.plan) == "DooDoo"
        sample(pipe, num_dash_steps=2, num_inference_steps=5)
        assert str(pipe.last_run.plan) == "DoDoo"
        sample(pipe, plan=[True, False, True])
        assert str(pipe.last_run.plan) == "DoD"

    def test_speed_ratio_comes_from_the_config_else_is_measured(self, pipe, dot):
        enable_morse(pipe, dot)
        assert pipe.speed_ratio is None
        sample(pipe, lsd=4)
        assert pipe.speed_ratio > 0
        measured = pipe.measure_speed_ratio(batch_size=1, repeats=3)
        assert measured.speed_ratio == pipe.speed_ratio
        assert measured.dash_seconds[0] <= measured.dash_seconds[1] <= measured.dash_seconds[2]
        dot.register_to_config(speed_ratio=7.0, plan_ratio={"default": 3.0, "DDIMScheduler": 1.5})
        enable_morse(pipe, dot)
        assert (pipe.speed_ratio, pipe.plan_ratio(4)) == (7.0, 1.5)

    def test_the_plan_ratio_may_depend_on_the_budget_and_on_noise(self, pipe, dot):
        dot.register_to_config(
            speed_ratio=4.0, plan_ratio={"default": [[4, 2.0], [8, 1.5], [12, 1]]}
        )
        enable_morse(pipe, dot)
        ratios = {lsd: pipe.plan_ratio(lsd) for lsd in (3, 4, 7.9, 8, 11, 12, 40)}
        assert ratios == {3: 2, 4: 2, 7.9: 2, 8: 1.5, 11: 1.5, 12: 1, 40: 1}
        assert pipe.plan_for(12).plan == 12 * "D" and "o" in pipe.plan_for(11).plan
        # With fresh noise at each step nothing was gained: all Dash, unless the config says more.
        assert pipe.plan_ratio(4, eta=0.5) == 1
        dot.register_to_config(plan_ratio={"stochastic": 1.25})
        assert (pipe.plan_ratio(4, eta=0.5), pipe.plan_ratio(4)) == (1.25, 2)
        # Ratios by class are not for noise that settings or `eta` add to it.
        dot.register_to_config(plan_ratio={"DDIMScheduler": 3.0, "DDPMScheduler": 1.5})
        assert (pipe.plan_ratio(4, eta=0.5), pipe.plan_ratio(4)) == (1, 3)
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        assert pipe.plan_ratio(4) == 1.5
        dot.register_to_config(plan_ratio=None)
        with pytest.warns(UserWarning, match="DDPMScheduler adds noise at each step"):
            assert pipe.plan_for(4).plan == "DDDD"

    def test_a_saved_plan_is_not_run_with_noise_that_a_call_adds(self):
        """It was searched without."""
        pipe = text_pipe()
        dot = trained_dot(pipe.unet)
        saved = SavedPlan(4, "DooDoo").to_config()
        dot.register_to_config(speed_ratio=4.0, plans={"DDIMScheduler": [saved]})
        enable_morse(pipe, dot)
        latents(pipe, lsd=4)
        assert str(pipe.last_run.plan).startswith("DooDoo")
        with pytest.warns(UserWarning, match="DDIMScheduler adds noise at each step"):
            latents(pipe, lsd=4, eta=1.0)
        assert str(pipe.last_run.plan) == "DDDD"

    def test_n_is_measured_unnoticed_before_the_first_budget(self):
        pipe, steps = text_pipe(), []
        enable_morse(pipe, trained_dot(pipe.unet))
        before = torch.get_rng_state()
        found = latents(pipe, lsd=3, callback_on_step_end=lambda *args: steps.append(args[1]) or {})
        assert pipe.measured is not None and len(steps) == len(pipe.last_run.plan)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(latents(pipe, plan=str(pipe.last_run.plan)), found)

    @pytest.mark.parametrize(
        ("dash", "dot", "expected"),
        [
            ([9, 5, 6], [4, 1, 1], SpeedRatio(6, (5.5, 6, 7.5), (1, 1, 2.5))),
            ([2, 6], [1, 1], SpeedRatio(4, (3, 4, 5), (1, 1, 1))),
        ],
    )
    def test_n_is_the_ratio_of_medians_once_both_are_warm(
        self, pipe, monkeypatch, dash, dot, expected
    ):
        """Quartiles lie among the times, of which two are enough."""
        now, ticks = [0], {"dash": [100, 100, *dash], "dot": [100, 100, *dot]}

        def own(sample, timestep, jump):
            now[0] += ticks["dot"].pop(0)
            return torch.zeros_like(sample)

        def hook(unet, arguments):
            now[0] += ticks["dash"].pop(0)

        enable_morse(pipe, own)
        pipe.unet.register_forward_pre_hook(hook)
        clock = SimpleNamespace(perf_counter=lambda: now[0])
        monkeypatch.setattr("morse.switch.time", clock)
        found = pipe.measure_speed_ratio(repeats=len(dash))
        assert found == expected
        assert pipe.measured is found and pipe.speed_ratio == expected.speed_ratio

    def test_chosen_timesteps_are_spent_by_dash_where_it_can_be_afforded(self):
        pipe = text_pipe()
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        enable_morse(pipe, lambda sample, timestep, jump, **conditions: 0.1 * sample)
        timesteps = list(range(950, 0, -100))
        latents(pipe, lsd=10, timesteps=timesteps)  # N is measured on other ones
        pipe.speed_ratio = 3.0
        found = latents(pipe, lsd=10, timesteps=timesteps)
        assert str(pipe.last_run.plan) == "D" * 10 == pipe.plan_for(10, timesteps=timesteps).plan
        assert torch.equal(found, latents(disable_morse(pipe), timesteps=timesteps))

    def test_chosen_timesteps_are_the_number_that_counts_need(self):
        pipe = text_pipe()
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        enable_morse(pipe, lambda sample, timestep, jump, **conditions: 0.1 * sample)
        latents(pipe, num_dash_steps=2, timesteps=[900, 500, 100])
        assert str(pipe.last_run.plan) == "DDo"
        with pytest.raises(ValueError, match="num_dash_steps=4 is more than"):
            latents(pipe, num_dash_steps=4, timesteps=[900, 500, 100])

    def test_n_of_too_few_times_is_not_taken(self, pipe, dot, monkeypatch):
        enable_morse(pipe, dot)
        with pytest.raises(ValueError, match="repeats is 1, but must be 2 or more"):
            pipe.measure_speed_ratio(repeats=1)
        with monkeypatch.context() as patch:
            patch.setattr("morse.switch.scheduler_index", lambda scheduler, timestep: None)
            with (
                pytest.warns(UserWarning, match="made none"),
                pytest.raises(ValueError, match=r"8 evaluations gave .*'dot': 0\}.* not tell"),
            ):
                pipe.measure_speed_ratio(repeats=2)
        monkeypatch.setattr("morse.steps.find_steps", lambda pipe, arguments, length: (7, 7))
        with pytest.raises(ValueError, match=r"7 evaluations gave .*'dot': 1\}"):
            pipe.measure_speed_ratio(repeats=2)
        assert pipe.speed_ratio is None and pipe.measured is None

    def test_a_failed_measurement_is_not_the_latest_call(self, pipe, dot, monkeypatch):
        enable_morse(pipe, dot)
        sample(pipe, plan="Do")
        latest = pipe.last_run
        with monkeypatch.context() as patch:
            patch.setattr(pipe.scheduler, "step", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pipe.measure_speed_ratio()
        assert pipe.last_run is latest

    def test_without_a_dot_everything_is_dash(self, pipe):
        expected = sample(pipe, num_inference_steps=5)
        enable_morse(pipe, None)
        with pytest.warns(UserWarning, match="no dot"):
            assert torch.equal(sample(pipe, lsd=5), expected)
        with pytest.raises(ValueError, match="has no dot"):
            sample(pipe, plan="DoD")
        with pytest.raises(ValueError, match="no dot"):
            pipe.measure_speed_ratio()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"lsd": 0.5}, "lsd must be a finite number of at least 1"),
            ({"lsd": "5"}, "lsd must be .* got '5'"),
            ({"plan": "uniform"}, "give lsd= too"),
            ({"lsd": 5, "plan": "Do"}, "only one of"),
            ({"lsd": 5, "num_dash_steps": 3}, "only one of"),
            ({"num_dash_steps": 3}, "give both"),
            ({"num_dash_steps": 7, "num_inference_steps": 5}, "more than"),
            ({"num_dot_steps": 7, "num_inference_steps": 5}, "num_dot_steps=7 leaves no Dash"),
            ({"plan": "DoDo", "num_inference_steps": 5}, "plan has 4 evaluations"),
            ({"plan": "oD"}, "must start with"),
        ],
    )
    def test_contradictions(self, pipe, dot, arguments, message):
        enable_morse(pipe, dot)
        pipe.speed_ratio = 5.0
        with pytest.raises(ValueError, match=message):
            sample(pipe, **arguments)


def test_the_summary_tells_what_was_planned_and_what_happened(pipe, dot, monkeypatch):
    enable_morse(pipe, dot)
    assert "not planned by Morse" in pipe.morse_summary()
    sample(pipe, plan="DooDoo")
    rows = dict(line.split(maxsplit=1) for line in pipe.morse_summary().splitlines())
    assert rows["plan"] == "DooDoo" and rows["evaluations"] == "2 Dash, 4 Dot"
    assert rows["N"] == rows["LSD"] == "not known" and rows["fallbacks"] == "none"
    assert float(rows["measured"].split()[0]) == pytest.approx(pipe.last_run.seconds, abs=1e-3)
    measured = pipe.measure_speed_ratio(batch_size=2, repeats=3)
    sample(pipe, plan="DooDoo")
    rows = dict(line.split(maxsplit=1) for line in pipe.morse_summary().splitlines())
    expected = 2 * measured.dash_seconds[1] + 4 * measured.dot_seconds[1]
    assert float(rows["expected"].split()[0]) == pytest.approx(expected, abs=1e-3)
    assert float(rows["LSD"]) == pytest.approx(2 + 4 / measured.speed_ratio, abs=0.01)
    monkeypatch.setattr("morse.switch.scheduler_index", lambda scheduler, timestep: None)
    with pytest.warns(UserWarning, match="made none"):
        sample(pipe, plan="DoDo")
    assert "the scheduler does not tell its step (4x)" in pipe.morse_summary()
    disable_morse(pipe)
    assert not hasattr(pipe, "morse_summary") and not hasattr(pipe, "measured")


class TestFallbacks:
    def test_a_scheduler_that_does_not_tell_its_step_runs_dash_and_warns(
        self, pipe, dot, monkeypatch
    ):
        expected = sample(pipe, num_inference_steps=4)
        enable_morse(pipe, dot)
        monkeypatch.setattr("morse.switch.scheduler_index", lambda scheduler, timestep: None)
        with pytest.warns(UserWarning, match="made none"):
            assert torch.equal(sample(pipe, plan="DoDo"), expected)
        assert pipe.last_run.fallbacks["the scheduler does not tell its step"] == 4

    def test_no_warning_when_dot_ran(self, pipe, dot):
        enable_morse(pipe, dot)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sample(pipe, plan="DoDo")

    def test_a_pipeline_that_ends_before_the_plan_warns(self, pipe, dot, monkeypatch):
        enable_morse(pipe, dot)
        monkeypatch.setattr("morse.plan_choice.find_exact_steps", lambda pipe, arguments, length: 3)
        with pytest.warns(
            UserWarning, match="planned 4 evaluations but the pipeline ended after 3"
        ):
            sample(pipe, plan="DoDo")

    def test_evaluations_beyond_the_plan_are_dash_and_counted(self, pipe, dot, monkeypatch):
        enable_morse(pipe, dot)
        monkeypatch.setattr("morse.plan_choice.find_exact_steps", lambda pipe, arguments, length: 5)
        sample(pipe, plan="DoD")
        assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (4, 1)
        assert pipe.last_run.fallbacks == {"the plan has ended": 2}

    def test_another_shape_falls_back(self, pipe, dot):
        run = MorseRun(MorsePlan.from_string("Doo"), 5.0)
        answer = dispatcher(run, pipe, dot).answer
        pipe.scheduler.set_timesteps(3)
        for index, size in enumerate((16, 16, 8)):
            x = torch.randn(1, 1, size, size)
            answer(pipe.unet, pipe.unet._call_impl, (x, pipe.scheduler.timesteps[index]), {})
        assert (run.num_dash, run.num_dot) == (2, 1)
        assert run.fallbacks == {"the sample changed its shape": 1}

    def test_a_second_pass_over_the_timesteps_starts_anew(self, pipe, dot):
        run = MorseRun(MorsePlan.from_string("Do"), 5.0)
        answer = dispatcher(run, pipe, dot).answer
        pipe.scheduler.set_timesteps(2)
        x = torch.randn(1, 1, 16, 16)
        for index in (0, 1, 0, 1):
            answer(pipe.unet, pipe.unet._call_impl, (x, pipe.scheduler.timesteps[index]), {})
        assert (run.num_dash, run.num_dot) == (2, 2)

    def test_separate_branches_of_a_step_have_their_own_jump_points(self, pipe, dot):
        run = MorseRun(MorsePlan.from_string("Do"), 5.0)
        seen = []

        def own(x, t, jump):
            seen.append(jump.sample)
            return torch.zeros_like(x)

        answer = dispatcher(run, pipe, own).answer
        pipe.scheduler.set_timesteps(2)
        branches = torch.randn(2, 1, 1, 16, 16)
        for index in range(2):
            for x in branches:
                answer(pipe.unet, pipe.unet._call_impl, (x, pipe.scheduler.timesteps[index]), {})
        assert torch.equal(torch.stack(seen), branches)


def test_a_pipeline_without_denoiser_is_refused():
    from diffusers import DiffusionPipeline

    class Empty(DiffusionPipeline):
        def __init__(self):
            super().__init__()

    with pytest.raises(ValueError, match="Empty has no unet or transformer"):
        enable_morse(Empty(), None)


def test_a_dot_for_another_dash_is_refused(pipe, build_unet):
    with pytest.raises(ValueError, match="another Dash"):
        enable_morse(pipe, MorseDot.from_dash(build_unet(seed=3)))
    assert sample(pipe, num_inference_steps=2).isfinite().all()


def test_a_refused_dot_leaves_the_one_in_use(pipe, dot, build_unet):
    enable_morse(pipe, dot)
    expected = sample(pipe, plan="DoDo")
    with pytest.raises(ValueError, match="another Dash"):
        enable_morse(pipe, MorseDot.from_dash(build_unet(seed=3)))
    with pytest.raises(TypeError, match=r"dot is 'runs/dot', but must be .*from_pipe\."):
        enable_morse(pipe, "runs/dot")
    assert pipe.dot is dot and torch.equal(sample(pipe, plan="DoDo"), expected)


def test_a_refused_dot_is_not_rounded_to_the_precision_of_the_wrong_dash(pipe, build_unet):
    dot = MorseDot.from_dash(build_unet(seed=3))
    before = {name: value.clone() for name, value in dot.state_dict().items()}
    pipe.to(torch.float16)
    with pytest.raises(ValueError, match="another Dash"):
        enable_morse(pipe, dot)
    after = dot.state_dict()
    assert dot.dtype == torch.float32 and set(before) == set(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_one_fingerprint_is_made_of_a_dash(pipe, dot, monkeypatch):
    """It reads whole weights, which takes long where Dash is large or offloaded."""
    made, loaded = [], MorseDot.from_config(dot.config)
    monkeypatch.setattr("morse.dot.sharing.check_fingerprint", lambda *args: made.append(args))
    enable_morse(enable_morse(pipe, loaded), loaded)
    sample(pipe, plan="Do")
    assert [args[0] for args in made] == [pipe.unet]


def test_another_dot_brings_its_own_speed_ratio(pipe, make_dot):
    first, second = make_dot(pipe.unet), make_dot(pipe.unet)
    second.register_to_config(speed_ratio=6.0)
    enable_morse(pipe, first)
    found = SpeedRatio(5.0, (5.0, 5.0, 5.0), (1.0, 1.0, 1.0))
    pipe.speed_ratio, pipe.measured = 5.0, found
    pipe.dot = first
    assert (pipe.speed_ratio, pipe.measured) == (5.0, found)
    pipe.dot = second
    assert (pipe.speed_ratio, pipe.measured) == (6.0, None)
    pipe.dot = None
    assert pipe.speed_ratio is None
    pipe.dot = second
    assert pipe.speed_ratio == 6.0


@pytest.mark.parametrize("first", [None, lambda sample, *_, **conditions: 0.1 * sample])
def test_a_dot_is_assigned_where_there_was_none_or_a_callable(first, tmp_path):
    expected = planned(enable_morse(text_pipe(), trained_dot(text_pipe().unet), merge_lora=False))
    pipe = enable_morse(text_pipe(), first)
    bare = latents(pipe, num_inference_steps=3)
    pipe.dot = trained_dot(pipe.unet)
    assert torch.equal(planned(pipe), expected)
    assert torch.equal(latents(pipe, num_inference_steps=3), bare)
    assert pipe.components["dot"] is pipe.to("cpu").dot
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "dot" / "config.json").exists()
    pipe.dot = first  # and back
    latents(pipe, plan="DDD" if first is None else "DoD")
    assert disable_morse(pipe).components.keys() == text_pipe().components.keys()


def test_a_class_of_the_users_own_stays_as_dots_change(pipe, dot):
    enable_morse(pipe, None)
    pipe.__class__ = type("Own", (type(pipe),), {"extra": 1})
    pipe.dot = dot
    assert pipe.extra == 1
    sample(pipe, plan="Do")
    assert pipe.last_run.num_dot == 1


def test_without_its_denoiser_a_pipeline_lets_go_of_dot_and_saves(pipe, dot, tmp_path):
    enable_morse(pipe, dot)
    pipe.unet = None
    pipe.save_pretrained(tmp_path)
    pipe.dot = None
    assert pipe.dot is None and (tmp_path / "dot").is_dir()


def test_a_saved_plan_is_no_argument(pipe, dot):
    dot.register_to_config(plans={"DDIMScheduler": [SavedPlan(10, "DDD").to_config()]})
    enable_morse(pipe, dot)
    for name in ("num_dash_steps", "num_dot_steps"):
        with pytest.raises(ValueError, match=f"lsd=10, plan=None, .*{name}=5"):
            sample(pipe, lsd=10, **{name: 5})
    assert pipe.speed_ratio is None  # nothing was measured for a call that can't be


def test_a_wrapped_dot_is_refused(pipe, dot):
    message = r"dot is a OptimizedModule.*pipe\.dot\.compile"
    with pytest.raises(TypeError, match=message):
        enable_morse(pipe, torch.compile(dot, backend="eager"))
    enable_morse(pipe, dot)
    with pytest.raises(TypeError, match=message):
        pipe.dot = torch.compile(dot, backend="eager")
    assert pipe.dot is dot


def test_a_quantized_dash_is_refused(pipe, dot):
    config = SimpleNamespace(quant_method="bitsandbytes_4bit")
    pipe.unet.hf_quantizer = SimpleNamespace(quantization_config=config)
    message = r"UNet2DModel is quantized \(bitsandbytes_4bit\), .*without quantization_config"
    for make in (
        lambda: enable_morse(pipe, MorseDot.from_config(dot.config)),
        lambda: MorseDot.from_dash(pipe.unet),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    del pipe.unet.hf_quantizer  # as `dequantize` does
    pipe.unet.register_to_config(quantization_config={"quant_method": "bitsandbytes_4bit"})
    with pytest.raises(ValueError, match=message):
        MorseDot.from_dash(pipe.unet)
    pipe.unet.is_quantized = False
    MorseDot.from_dash(pipe.unet)


def test_a_replaced_denoiser_is_let_go(make_pipe, pipe, dot):
    before, other = pipe.unet, make_pipe(unet=pipe.unet)
    enable_morse(pipe, dot)
    enable_morse(other, dot)
    other.unet = copy.deepcopy(before)
    sample(pipe, plan="Do")
    assert pipe.last_run.num_dot == 1
    pipe.unet = copy.deepcopy(before)
    assert vars(before)["_compiled_call_impl"] is None


def test_dot_looks_at_dash_again_where_a_callback_may_change_it(monkeypatch):
    pipe, bound = text_pipe(), []
    enable_morse(pipe, trained_dot(pipe.unet))
    bind = MorseDot.bind
    monkeypatch.setattr(MorseDot, "bind", lambda dot, dash: bound.append(1) or bind(dot, dash))
    latents(pipe, plan="DoDo")
    assert len(bound) == 1
    latents(pipe, plan="DoDo", callback_on_step_end=lambda *args: {})
    assert len(bound) == 3


@pytest.mark.parametrize(
    ("steps", "made"),
    [
        ([{"dash": 1}] * 6 + [{"dot": 1}] * 2, "2"),
        ([{"dash": 2}] * 6 + [{"dot": 2}] * 2, "2"),  # guidance's branches one by one
        ([{"dash": 2}] * 3 + [{"dash": 1, "dot": 1}] * 5, r"2\.5"),
    ],
)
def test_much_less_of_dot_than_planned_is_told(steps, made):
    """Planned are steps, of which branches are shares."""
    counts = {f"num_{name}": sum(step.get(name, 0) for step in steps) for name in ("dash", "dot")}
    run = MorseRun(MorsePlan.from_string("DoooDooo"), 4.0, **counts, num_steps=8)
    run.steps = [Counter(step) for step in steps]
    run.fallbacks = Counter({"other conditions": 4})
    with pytest.warns(UserWarning, match=f"6 Dot evaluations and made {made}: .*other conditions"):
        warn_unless_engaged(run)


def test_a_bare_call_from_a_callback_is_bare():
    pipe = text_pipe()
    other = text_pipe()
    other.register_modules(unet=pipe.unet)
    dot = trained_dot(pipe.unet)
    enable_morse(other, None)
    enable_morse(pipe, dot)
    expected, found = latents(other, num_inference_steps=3), []

    def call(*args):
        found.append(latents(other, num_inference_steps=3))
        return {}

    latents(pipe, plan="DoDo", callback_on_step_end=call)
    assert len(found) == 4 and all(torch.equal(each, expected) for each in found)
    assert (pipe.last_run.num_dash, pipe.last_run.num_dot) == (2, 2)
