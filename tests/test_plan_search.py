"""Searching plans, saving them with Dot, and spending a budget as they say."""

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler
from evaluation_fixtures import QUICK_PLAN, tiny_folder  # noqa: F401
from tiny_pipelines import loop_pipeline

from morse import LeapfrogScheduler, MorseDot, MorsePipeline, enable_morse
from morse.evaluation.bench.runs import Samples, reference_images
from morse.evaluation.planning import best_fit, budget, command, memory, mixture, results
from morse.evaluation.planning.best_fit import _worth_fitting, given_candidates, known_rows
from morse.evaluation.planning.command import PlanConfig, run_plan
from morse.evaluation.planning.fit import curves_to_rows, fit_curves, power_curves, refine_rows
from morse.evaluation.planning.memory import remembering
from morse.evaluation.planning.mixture import check_mixture
from morse.evaluation.planning.results import check_output, earlier_searches
from morse.evaluation.planning.search import Candidate, Found, Space, neighbours, search_plan
from morse.files import write_json
from morse.plan import MorsePlan
from morse.saved_plans import SavedPlan, find_saved_plan, scheduler_options
from morse.schedulers import make_scheduler


def worth(plan, wanted):
    """A score that is highest at `wanted` and falls with the edits away from it."""
    pairs = itertools.zip_longest(plan, wanted)
    return -float(sum(a != b for a, b in pairs))


def test_neighbours_cost_at_most_the_budget_and_start_with_dash():
    found = list(neighbours("DoDo", 3.0, 2.0))
    assert sorted(found) == ["DDo", "DDoo", "DoD", "DooD", "Dooo"]
    assert "DoDoo" in set(neighbours("DoDo", 3.5, 2.0))


def test_neighbours_of_a_plan_begun_by_a_mixture():
    found = set(neighbours("ggDo", 2.0, 2.0))
    assert found == {"gDo", "gggDo", "ggD", "ggDoo"}


def test_a_mixture_is_tried_before_every_plan_where_there_is_one():
    def evaluate(candidate, quick):
        plan = candidate.plan.lstrip("g")
        return worth(plan, "DoDD") - abs(len(candidate.plan) - len(plan) - 5)

    known = (Candidate("DoDD", (("fitted_steps", ((999, 0.5, 0.0, 0.0),)),)),)
    space = Space(lsd=4, speed_ratio=2.0)
    found = search_plan(evaluate, replace(space, with_mixture=True), known)
    assert found.best == Candidate("gggggDoDD") and "g" not in found.uniform.plan
    assert not any("g" in each.plan for each in search_plan(evaluate, space).tried)


@pytest.mark.parametrize("wanted", ["DDoDoDoo", "DDDDDD", "DoooDDDo"])
def test_the_best_plan_is_found(wanted):
    grids = [(("timestep_power", power),) for power in (1.0, 1.5)]

    def evaluate(candidate, quick):
        return worth(candidate.plan, wanted) - (candidate.options != grids[1])

    found = search_plan(evaluate, Space(lsd=6, speed_ratio=4.0, grids=grids), max_rounds=20)
    assert found.best == Candidate(wanted, grids[1]) and found.psnr == 0
    assert found.uniform_psnr <= found.psnr


def test_plans_with_dot_early_are_tried():
    space = Space(lsd=8, speed_ratio=4.0)
    plans = [each.plan for each in space.early()]
    assert plans == ["DoDoDoDDDD", "DoDoDoDoDDD"]
    assert all(MorsePlan.from_string(plan).cost(4.0) <= 8 for plan in plans)
    assert replace(space, lsd=1).early() == []
    judged = search_plan(lambda candidate, quick: worth(candidate.plan, plans[0]), space)
    assert judged.best.plan == plans[0] and judged.uniform.plan != plans[0]


def test_only_the_ratios_asked_for_are_tried():
    space = Space(lsd=8, speed_ratio=4.0, ratios=(1.5,))
    found = search_plan(lambda candidate, quick: 0.0, space, max_rounds=0)
    tried = {each.plan for each in found.tried} - {each.plan for each in space.early()}
    assert tried == {"D" * 8, str(MorsePlan.from_budget(8, 4.0, 1.5, 0.5))}


def test_the_result_is_never_worse_than_all_dash_on_all_images():
    """Few images mislead; all of them, where all Dash is best, decide."""

    def evaluate(candidate, quick):
        dots = candidate.plan.count("o")
        return float(dots if quick else -dots)

    assert "o" not in search_plan(evaluate, Space(lsd=5, speed_ratio=4.0)).best.plan


def test_uniform_candidates_keep_the_budget():
    plans = [each.plan for each in Space(lsd=8, speed_ratio=5.0).uniform()]
    assert plans[0] == "D" * 8 and len(set(plans)) == len(plans) > 3
    assert all(MorsePlan.from_string(plan).cost(5.0) <= 8 for plan in plans)


def test_a_known_plan_is_tried_if_the_budget_allows_it():
    options = (("fitted_steps", ((999, 0.5, 0.0, 0.0),)),)
    known = (Candidate("DoDDoDo", options), Candidate("DoDDoDoDDD"))
    space = Space(lsd=6, speed_ratio=4.0)
    judged = search_plan(
        lambda candidate, quick: worth(candidate.plan, known[0].plan), space, known, max_rounds=0
    )
    assert judged.best == known[0] and known[1] not in judged.tried
    overdrawn = Candidate("DDDDDDo")  # 6.1 LSD at N = 10, which `lsd=6` runs
    space = Space(lsd=6, speed_ratio=10.0)
    judged = search_plan(lambda candidate, quick: 0.0, space, [overdrawn], max_rounds=0)
    assert overdrawn in judged.tried


def test_lengths_that_the_solver_cannot_make_are_not_tried():
    def shorten(plan):
        return str(MorsePlan.from_string(plan).shortened(len(plan) - 1 + len(plan) % 2))

    def evaluate(candidate, quick):
        return worth(candidate.plan, "DoDoDDD")

    space = Space(lsd=6, speed_ratio=4.0, shorten=shorten)
    found = search_plan(evaluate, space, max_rounds=20)
    assert found.psnr == 0 and found.best.plan == "DoDoDDD"
    assert {len(each.plan) % 2 for each in found.tried} == {1}
    assert "DDDDD" in {each.plan for each in found.tried}


def test_without_a_dot_grids_of_all_dash_are_compared():
    grids = [(("timestep_power", power),) for power in (1.0, 1.5)]
    space = Space(lsd=8, speed_ratio=1.0, grids=grids, with_dot=False)
    found = search_plan(lambda candidate, quick: 0.0, space)
    assert set(found.tried) == {Candidate("D" * 8, grid) for grid in grids}


class TestMemory:
    """Dash's calls are made once in a search."""

    @pytest.fixture
    def network(self):
        class Network(torch.nn.Module):
            calls = 0

            def forward(self, sample, timestep, conditions=None, return_dict=True):
                self.calls += 1
                return (sample * timestep, conditions)

        return Network()

    def test_the_same_call_is_made_once(self, network):
        sample = torch.randn(2, 3)
        with remembering(network):
            first = network(sample, torch.tensor(3), {"text": [torch.ones(1)]})
            again = network(sample.clone(), torch.tensor(3), {"text": [torch.ones(1)]})
        assert network.calls == 1 and torch.equal(first[0], again[0])

    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [
            ((torch.ones(2), 4), {}),
            ((torch.ones(2, dtype=torch.float64), 3), {}),
            ((torch.ones(2, 1), 3), {}),
            ((torch.ones(2) * 2, 3), {}),
            ((torch.ones(2), 3), {"conditions": {"text": torch.ones(1)}}),
            ((torch.ones(2), 3), {"return_dict": False}),
        ],
    )
    def test_other_arguments_are_another_call(self, network, args, kwargs):
        with remembering(network):
            network(torch.ones(2), 3)
            network(*args, **kwargs)
        assert network.calls == 2

    def test_nothing_is_remembered_afterwards(self, network):
        with pytest.raises(KeyError), remembering(network):
            raise KeyError
        network(torch.ones(2), 3)
        network(torch.ones(2), 3)
        assert network.calls == 2 and "forward" not in vars(network)

    def test_the_oldest_calls_are_forgotten(self, network, monkeypatch):
        monkeypatch.setattr(memory, "_MOST_CALLS", 2)
        with remembering(network):
            for timestep in (1, 2, 1, 3, 1, 2):
                network(torch.ones(2), timestep)
        assert network.calls == 4  # 2 was forgotten when 3 came, 1 was not


class TestFit:
    """Curves of a leapfrog run, fitted to data whose exact denoiser is known."""

    def problem(self, seed, count=16):
        """Noise, and a function from a scheduler's options to samples and errors.

        Every "image" is Gaussian with its own spread by pixel, so that no single run is exact.
        """
        generator = torch.Generator().manual_seed(seed)
        spread = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1
        noise = torch.randn(count, 1, 8, 8, generator=generator)

        def sample(evaluations, **options):
            scheduler = LeapfrogScheduler(**options)
            scheduler.set_timesteps(evaluations)
            current = noise
            for timestep in scheduler.timesteps:
                squared = scheduler.alphas_cumprod[timestep]
                variance = squared * spread**2 + 1 - squared
                output = current * (1 - squared).sqrt() / variance
                current = scheduler.step(output, timestep, current).prev_sample
            return current

        last = LeapfrogScheduler().alphas_cumprod[-1]
        return sample, noise * spread / (last * spread**2 + 1 - last).sqrt()

    @pytest.mark.parametrize(("power", "count"), [(1.5, 6), (1.5, 51), (2.0, 17), (3.0, 60)])
    def test_plain_curves_are_the_plain_grid(self, power, count):
        """Also where it is steep: timesteps at its end would round to one and fall below zero."""
        rows = curves_to_rows(power_curves(power), "D" * count)
        fitted = LeapfrogScheduler(fitted_steps=rows)
        plain = LeapfrogScheduler(timestep_power=power)
        for scheduler in (fitted, plain):
            scheduler.set_timesteps(count)
        assert fitted._grid == plain._grid and fitted._weights == [[0.0, 0.0]] * count

    def test_samples_of_other_noise_are_nearer_too(self):
        sample, exact = self.problem(seed=1)
        other, other_exact = self.problem(seed=2)

        def run(rows):
            return sample(5, fitted_steps=rows)

        curves = fit_curves(run, "D" * 5, exact, [power_curves(1.0), power_curves(2.0)], 2)
        rows = curves_to_rows(curves, "D" * 5)
        fitted = (other(5, fitted_steps=rows) - other_exact).square().mean()
        plain = min((other(5, timestep_power=p) - other_exact).square().mean() for p in (1.0, 2.0))
        assert fitted < plain / 10

    def test_rows_of_their_own_go_on_from_curves(self):
        """From one round: after three, curves may be as near as four digits of a row allow."""
        sample, exact = self.problem(seed=1)
        other, other_exact = self.problem(seed=2)

        def run(rows):
            return sample(5, fitted_steps=rows)

        curves = fit_curves(run, "DDDDD", exact, [power_curves(1.0)], 1)
        smooth = curves_to_rows(curves, "DDDDD")
        plain = curves_to_rows(power_curves(1.0), "DDDDD")
        refined = refine_rows(run, exact, [plain, smooth], 4)
        errors = [(other(5, fitted_steps=rows) - other_exact).square().mean()
                  for rows in (smooth, refined)]  # fmt: skip
        assert errors[1] < errors[0] / 10
        assert refined[0][0] == 999 and refined[-1][1] == 1

    def test_what_is_added_at_dots_evaluations_stays_there(self):
        curves = power_curves(1.0)
        curves[-2] += 0.25  # of the estimate's change, for the move of the sample itself
        rows = curves_to_rows(curves, "DoDDo")
        assert [row[2] for row in rows] == [0.0, 0.25, 0.0, 0.0, 0.25]

    def test_runs_that_cannot_be_are_passed_over(self):
        """Curves from which a step leads to rising timesteps are no error."""
        sample, exact = self.problem(seed=1)
        start = power_curves(1.0)
        start[5:9] = 0.97  # landings next to the following evaluation
        plain = (sample(4) - exact).square().mean()
        curves = fit_curves(lambda rows: sample(4, fitted_steps=rows), "DDDD", exact, [start], 2)
        found = sample(4, fitted_steps=curves_to_rows(curves, "DDDD"))
        assert (found - exact).square().mean() < plain

    def test_without_rounds_the_best_start_is_given(self):
        sample, exact = self.problem(seed=1)
        starts = [power_curves(power) for power in (4.0, 1.0)]
        curves = fit_curves(lambda rows: sample(4, fitted_steps=rows), "DDDD", exact, starts, 0)
        assert (curves == starts[1]).all()


class TestUse:
    """A pipeline whose Dot has saved plans."""

    @pytest.fixture
    def pipe(self, build_unet):
        torch.manual_seed(0)
        unet = build_unet(channels=(8, 16), sample_size=8)
        saved = SavedPlan(4, "DDoDoo", {"timestep_power": 2.0})
        dot = MorseDot.from_dash(
            unet,
            num_down_blocks=1,
            lora_rank=2,
            speed_ratio=4.0,
            plans={"LeapfrogScheduler": [saved.to_config()]},
        )
        return enable_morse(loop_pipeline(unet, LeapfrogScheduler()), dot)

    def call(self, pipe, **kwargs):
        return pipe(generator=torch.Generator().manual_seed(0), **kwargs).images

    def test_a_saved_plan_is_used(self, pipe):
        with scheduler_options(pipe, {"timestep_power": 2.0}):
            expected = self.call(pipe, plan="DDoDoo")
        before = pipe.scheduler
        assert torch.equal(self.call(pipe, lsd=4), expected)
        assert str(pipe.last_run.plan) == "DDoDoo" and pipe.scheduler is before
        assert pipe.plan_for(4).plan == "DDoDoo"
        self.call(pipe, lsd=4, plan="uniform")
        assert pipe.last_run.plan == MorsePlan.from_budget(4, 4.0)
        pipe.speed_ratio = 2.0  # now it would cost 4.5
        self.call(pipe, lsd=4)
        assert pipe.last_run.plan == MorsePlan.from_budget(4, 2.0)

    def test_what_is_told_of_a_plan_is_of_its_own_grid(self, pipe):
        """With Dot DDIM's trailing steps make 40 evaluations, not 42 (`shorten_plan`)."""
        pipe.scheduler = DDIMScheduler(clip_sample=False)
        saved = SavedPlan(14, str(MorsePlan.uniform(4, 38)), {"timestep_spacing": "trailing"})
        pipe.dot.register_to_config(plans={"DDIMScheduler": [saved.to_config()]})
        assert len(pipe.plan_for(14).plan) == 40

    @pytest.mark.parametrize(
        ("lsd", "plan"), [(4.5, "DDoDoo"), (5, "DDoDooD"), (7.5, "DDoDooDDD"), (8, "DDoDooDDDD")]
    )
    def test_a_budget_between_adds_dash_to_a_saved_plan(self, pipe, lsd, plan):
        with scheduler_options(pipe, {"timestep_power": 2.0}):
            expected = self.call(pipe, plan=plan)
        assert torch.equal(self.call(pipe, lsd=lsd), expected)
        assert str(pipe.last_run.plan) == plan and pipe.last_run.plan.cost(4.0) <= lsd

    @pytest.mark.parametrize("lsd", [3, 9])
    def test_a_budget_far_from_saved_ones_is_spent_uniformly(self, pipe, lsd):
        assert pipe.plan_for(lsd) == SavedPlan(lsd, str(MorsePlan.from_budget(lsd, 4.0)))
        self.call(pipe, lsd=lsd)
        assert str(pipe.last_run.plan) == pipe.plan_for(lsd).plan

    def test_the_next_smaller_plan_is_taken(self, pipe):
        plans = {"LeapfrogScheduler": [{"lsd": lsd, "plan": "D" * lsd} for lsd in (4, 6, 5)]}
        found = find_saved_plan(plans, pipe.scheduler, 7, 4.0)
        assert (found.lsd, found.plan) == (6, "DDDDDDD")

    @pytest.mark.parametrize(("speed_ratio", "found"), [(3.0, True), (2.6, True), (2.4, False)])
    def test_a_plan_may_cost_little_more_where_dot_is_slower(self, pipe, speed_ratio, found):
        plans = {"LeapfrogScheduler": [SavedPlan(4, "DDoDoo").to_config()]}
        saved = find_saved_plan(plans, pipe.scheduler, 4, speed_ratio)
        assert (saved is not None) == found
        assert saved is None or saved.plan == "DDoDoo"

    @pytest.mark.parametrize(
        ("solver", "saved", "found"),
        [
            ("leapfrog", {}, True),
            ("leapfrog-dense", {}, True),
            ("pfdiff", {}, False),
            ("pfdiff", {"solver_options": {"clean_above": 1e9}}, True),
            ("leapfrog", {"solver_options": {"clean_above": 1e9}}, False),
            ("dpmsolver++", {}, True),
            ("dpmsolver++1", {}, False),
            ("sde-dpmsolver++", {}, False),
            ("dpmsolver++1", {"solver_options": {"solver_order": 1}}, True),
            ("dpmsolver++", {"solver_options": {"solver_order": 1}}, False),
        ],
    )
    def test_a_plan_is_for_one_solver_of_a_class(self, solver, saved, found):
        scheduler = make_scheduler(solver, {})
        plans = {type(scheduler).__name__: [{"lsd": 4, "plan": "DDDD", **saved}]}
        assert (find_saved_plan(plans, scheduler, 4, 4.0) is not None) == found

    @pytest.mark.parametrize(
        ("scheduler", "options", "reset"),
        [
            (
                LeapfrogScheduler(
                    timestep_power=1.5, fitted_steps=curves_to_rows(power_curves(2), "DD")
                ),
                {"timestep_power": 2.0},
                {"fitted_steps": None},
            ),
            (LeapfrogScheduler(timestep_power=1.5), {}, {"timestep_power": 1.0}),
            *(
                (DPMSolverMultistepScheduler(**{name: True}), {}, {name: False})
                for name in (
                    "use_karras_sigmas",
                    "use_exponential_sigmas",
                    "use_beta_sigmas",
                    "use_lu_lambdas",
                )
            ),
            (DPMSolverMultistepScheduler(use_karras_sigmas=True), {"use_karras_sigmas": True}, {}),
            (DPMSolverMultistepScheduler(), {"use_karras_sigmas": True}, {}),
        ],
    )
    def test_a_plan_is_run_on_its_own_grid(self, scheduler, options, reset):
        """What it does not name of the grid is as the class has it, whatever the pipeline has."""
        pipe = loop_pipeline(torch.nn.Identity(), scheduler)
        plans = {type(scheduler).__name__: [SavedPlan(4, "DDDD", options).to_config()]}
        found = find_saved_plan(plans, scheduler, 4, 4.0)
        assert found.scheduler == {**options, **reset}
        with scheduler_options(pipe, found.scheduler):
            pipe.scheduler.set_timesteps(4)
            own = type(scheduler)(**options)
            own.set_timesteps(4)
            assert torch.equal(pipe.scheduler.timesteps, own.timesteps)

    def test_the_embedded_plans_are_leapfrogs(self):
        for solver in ("leapfrog", "pfdiff"):
            pipe = MorsePipeline.from_pretrained("fashion-mnist", scheduler=solver)
            assert ("fitted_steps" in pipe.plan_for(8).scheduler) == (solver == "leapfrog")

    def test_a_slow_dot_leaves_a_budget_to_dash(self):
        """At 5 LSD one plan with Dot is saved, and one without for those that can't afford it."""
        pipe = MorsePipeline.from_pretrained("fashion-mnist", scheduler="leapfrog")
        for speed_ratio, num_dot in ((6.0, 6), (4.8, 6), (4.0, 0)):
            pipe.speed_ratio = speed_ratio
            assert MorsePlan.from_string(pipe.plan_for(5).plan).num_dot == num_dot

    @pytest.mark.parametrize("plan", ["DDDD", "DDoDoo"])
    def test_fitted_steps_are_run_as_they_are(self, pipe, plan):
        rows = curves_to_rows(power_curves(1.2), plan)
        saved = SavedPlan(4, plan, {"fitted_steps": rows})
        found = find_saved_plan({"LeapfrogScheduler": [saved.to_config()]}, pipe.scheduler, 6, 4.0)
        assert found.plan == plan and found.grid == "fitted steps"
        pipe.dot.register_to_config(plans={"LeapfrogScheduler": [saved.to_config()]})
        self.call(pipe, lsd=6)
        assert str(pipe.last_run.plan) == plan

    def test_arguments_that_choose_timesteps_leave_saved_plans_aside(self, pipe):
        uniform = str(MorsePlan.from_budget(4, 4.0))
        found = pipe.plan_for(4, num_inference_steps=len(uniform))
        assert (found.plan, found.scheduler) == (uniform, {})

    def test_a_step_count_that_the_budget_does_not_give(self, pipe):
        """The call raises, and so does what tells of it."""
        for tell in (pipe.plan_for, lambda lsd, **given: self.call(pipe, lsd=lsd, **given)):
            with pytest.raises(ValueError, match="=6 makes 6 evaluations but the plan has 7"):
                tell(4, num_inference_steps=6)

    def test_it_is_saved_with_the_dot(self, pipe, tmp_path):
        pipe.dot.save_pretrained(tmp_path)
        plans = MorseDot.from_pretrained(tmp_path).config.plans
        assert find_saved_plan(plans, pipe.scheduler, 4, 4.0).scheduler == {"timestep_power": 2.0}
        assert find_saved_plan(None, pipe.scheduler, 4, 4.0) is None

    def test_unknown_options(self, pipe):
        with (
            pytest.raises(ValueError, match=r"'speed'.* are not LeapfrogScheduler's; it has"),
            scheduler_options(pipe, {"speed": 1}),
        ):
            pass


QUICK = {**QUICK_PLAN, "speed_ratio": 6.0}


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [("fashion-mnist-text", 1024, "works on latents"), ("fashion-mnist", 5, "at least 20")],
)
def test_no_mixture_of_latents_or_of_few_images(name, count, message):
    with pytest.raises(ValueError, match=f"mixture_images is {count}.*{message}"):
        check_mixture(MorsePipeline.from_pretrained(name), count)


def test_the_scheduler_saved_is_the_best_judged_on_all_images(tmp_path):
    rows = tuple(map(tuple, curves_to_rows(power_curves(1.0), "DD")))
    fitted = Candidate("DD", (("fitted_steps", rows),))
    plain = Candidate("DD", (("timestep_power", 1.25),))
    found = Found(plain, 30.0, plain, 30.0, {plain: 35.0}, {plain: 30.0, fitted: 29.0})
    for worst, has_steps in ((29.0, False), (31.0, True)):
        found.fitted[fitted] = worst
        results.save_scheduler(tmp_path / "leapfrog-2", LeapfrogScheduler(), found)
        saved = LeapfrogScheduler.from_pretrained(tmp_path / "leapfrog-2")
        assert bool(saved.config.fitted_steps) == has_steps
    results.save_scheduler(tmp_path / "leapfrog-2", LeapfrogScheduler(), Found(plain, 1, plain, 1))
    assert not (tmp_path / "leapfrog-2").exists()


def test_a_plan_without_free_numbers_is_left_as_it_is():
    reference = torch.rand(2, 1, 4, 4)
    start = power_curves(1.0)
    found = fit_curves(lambda rows: reference + 0.1, "D", reference, [start], 1)
    assert np.array_equal(found, start)


def test_a_reference_that_is_not_finite_is_refused():
    samples = Samples(torch.zeros(3, 1, 4, 4), 1, 0, 1.0, "", {}, num_broken=2)
    with pytest.raises(ValueError, match="2 of the 3 reference images are not finite; compute"):
        reference_images(samples)


def test_saved_rows_that_a_fit_may_start_from():
    def entry(plan, rows=None):
        return {"plan": plan, "scheduler": {"fitted_steps": rows} if rows else {}}

    rows = curves_to_rows(power_curves(1.0), "DDDD")
    known = [entry("DDDD", rows), entry("DoDo", rows), entry("DDDDD")]
    assert known_rows([entry("gDDD", rows)], "DDDDDD") == []
    assert known_rows(known, "DDDD") == [rows]
    assert known_rows(known, "DoDo") == known_rows(known, "DDoo") == [rows]
    assert np.shape(known_rows(known, "DoDoDo")) == (1, 6, 4)
    (longer,) = known_rows(known, "DDDDDD")
    assert [row[0] for row in longer] == pytest.approx(
        [row[0] for row in curves_to_rows(power_curves(1.0), "DDDDDD")]
    )
    plain, stretched = given_candidates(["DDDDDD"], [(("timestep_power", 1.0),)], known[:1])
    assert plain == Candidate("DDDDDD", (("timestep_power", 1.0),))
    assert stretched.plan == "DDDDDD"
    assert dict(stretched.options) == {"fitted_steps": tuple(map(tuple, longer))}


def test_solvers_of_one_class_keep_their_plans(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    plan, known = Candidate("DDD"), []

    def search(evaluate, space, starts, max_rounds):
        assert space.shorten("DDDD") == "DDDD"
        known.append(starts)
        return Found(plan, 1.0, plan, 1.0)

    monkeypatch.setattr(budget, "search_plan", search)
    monkeypatch.setattr(command, "follow", lambda *args: None)
    settings = {**QUICK, "pipeline": str(tiny_folder), "output_dir": tmp_path}
    for dot in (None, str(tmp_path)):
        run_plan(PlanConfig(solver=("dpmsolver++", "dpmsolver++1"), dot=dot, **settings))
    saved = MorseDot.from_pretrained(tmp_path).config.plans["DPMSolverMultistepScheduler"]
    assert [entry["solver_options"]["solver_order"] for entry in saved] == [2, 1]
    assert known == [[], [], [plan], [plan]]
    report = json.loads((tmp_path / "plan_search.json").read_text())
    assert [each["solver"] for each in report["searches"]] == ["dpmsolver++", "dpmsolver++1"]


def test_the_solver_shortens_plans(make_pipe):
    shorten = budget.make_shorten(enable_morse(make_pipe("heun"), None))
    assert [shorten(plan) for plan in ("DDDD", "DoDo", "DoD", "D")] == ["DDD", "DDo", "DoD", "D"]


def test_a_search_runs_in_the_precision_asked_for(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    seen = []

    def search(config, pipes):
        enabled = torch.is_autocast_enabled("cpu")
        seen.append(torch.get_autocast_dtype("cpu") if enabled else None)

    monkeypatch.setattr(command, "_search", search)
    settings = {"pipeline": str(tiny_folder), "output_dir": tmp_path, "device": "cpu"}
    for precision in ("no", "bf16"):
        run_plan(PlanConfig(mixed_precision=precision, **settings))
    assert seen == [None, torch.bfloat16]


def test_a_plan_brings_its_grid_with_it(tmp_path):
    config = PlanConfig(output_dir=tmp_path, timestep_power=(1.0, 2.0))
    grids = {solver: config.grids(solver) for solver in ("leapfrog", "leapfrog-dense", "ddim")}
    assert grids == {
        "leapfrog": [(("timestep_power", 1.0),), (("timestep_power", 2.0),)],
        "leapfrog-dense": [(("timestep_power", 1.5),)],
        "ddim": [()],
    }


@pytest.fixture(scope="module")
def searched(tiny_folder, tmp_path_factory):  # noqa: F811
    found = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(best_fit, "REFERENCE_STEPS", 20)
        run_plan(PlanConfig(pipeline=str(tiny_folder), output_dir=found, fit_margin=99.0, **QUICK))
    return found


@pytest.mark.slow
def test_command(tiny_folder, searched):  # noqa: F811
    report = json.loads((searched / "plan_search.json").read_text())
    (search,) = report["searches"]
    assert search["psnr"] >= search["uniform_psnr"] and len(search["tried"]) > 5
    fitted = {fit["plan"] for fit in search["fits"] if "fitted_steps" in fit["scheduler"]}
    assert len(fitted) == 2 and set(fitted) <= {each["plan"] for each in search["tried"]}
    pipe = MorsePipeline.from_pretrained(tiny_folder, dot=searched, scheduler="leapfrog")
    pipe.set_progress_bar_config(disable=True)
    pipe.speed_ratio = 6.0
    pipe(lsd=3, generator=torch.Generator().manual_seed(0))
    assert str(pipe.last_run.plan) == search["plan"]
    scheduler = LeapfrogScheduler.from_pretrained(searched / "leapfrog-3")
    best = next(fit["scheduler"] for fit in search["fits"] if fit["plan"] == "DDD")
    assert {name: scheduler.config[name] for name in best} == best


@pytest.mark.slow
def test_a_mixture_is_fitted_and_saved_with_the_dot(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(best_fit, "REFERENCE_STEPS", 20)
    monkeypatch.setattr(mixture, "_STEPS", 5)
    settings = {**QUICK, "lsd": (2,), "mixture_images": 20, "max_rounds": 0, "fit_margin": 99.0}
    settings |= {"timestep_power": (1.0,), "refine_rounds": 0}
    run_plan(PlanConfig(pipeline=str(tiny_folder), output_dir=tmp_path, **settings))
    report = json.loads((tmp_path / "plan_search.json").read_text())
    fitted = {fit["plan"] for fit in report["searches"][0]["fits"]}
    assert {"DD", "gggDD"} < fitted and any(set(plan) == set("gDo") for plan in fitted)
    pipe = MorsePipeline.from_pretrained(tiny_folder, dot=tmp_path, scheduler="leapfrog")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.dot.mixture.means.shape[0] > 1
    pipe(plan="gggDD", generator=torch.Generator().manual_seed(0))
    assert pipe.last_run.num_gaussian == 3 and not pipe.last_run.fallbacks


@pytest.mark.slow
def test_a_second_search_goes_on_from_the_first(tiny_folder, searched, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(best_fit, "REFERENCE_STEPS", 20)
    again = shutil.copytree(searched, tmp_path / "again")
    settings = {**QUICK, "max_rounds": 0, "fit_rounds": 0, "refine_rounds": 0}
    run_plan(PlanConfig(pipeline=str(tiny_folder), dot=str(again), output_dir=again, **settings))
    first, second = (
        json.loads((folder / "plan_search.json").read_text())["searches"][0]
        for folder in (searched, again)
    )
    assert "fitted_steps" in first["scheduler"]
    assert [fit["scheduler"] for fit in second["fits"]] == [first["scheduler"]]
    for name in ("plan", "scheduler", "psnr"):
        assert second[name] == first[name]


def test_plans_from_outside_are_fitted_however_far_behind(tmp_path):
    plain, steep = ((("timestep_power", power),) for power in (1.0, 1.5))
    tried = {
        Candidate("DDDD", plain): 40.0, Candidate("DDDD", steep): 39.0,
        Candidate("DoDo", plain): 38.0, Candidate("DooD", plain): 37.0,
        Candidate("DooD", steep): 37.5, Candidate("gDDo", plain): 20.0,
    }  # fmt: skip
    given = {"output_dir": tmp_path, "start_plans": ("DooD", "DDDo")}
    best, dot, other = Candidate("DDDD", plain), Candidate("DoDo", plain), Candidate("DooD", steep)
    assert _worth_fitting(PlanConfig(fit_margin=3.0, **given), tried) == [best, dot, other]
    assert _worth_fitting(PlanConfig(fit_margin=-1.0, **given), tried) == [other]
    assert _worth_fitting(PlanConfig(fit_margin=0.0, output_dir=tmp_path), tried) == [best]


@pytest.mark.slow
def test_a_pipeline_without_a_dot_gets_schedulers(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(best_fit, "REFERENCE_STEPS", 20)
    bare = tmp_path / "bare"
    DDPMPipeline.from_pretrained(tiny_folder).save_pretrained(bare)
    with pytest.raises(ValueError, match=r"has no Dot.* solver is \('ddim',\).* give a Dot"):
        run_plan(PlanConfig(pipeline=str(bare), output_dir=tmp_path, solver=("ddim",), **QUICK))
    with pytest.raises(ValueError, match="mixture_images is 24, but the pipeline has no Dot"):
        run_plan(PlanConfig(pipeline=str(bare), output_dir=tmp_path, mixture_images=24, **QUICK))
    run_plan(PlanConfig(pipeline=os.path.relpath(bare), output_dir=tmp_path / "found", **QUICK))
    monkeypatch.chdir(bare.parent)  # from where it has another name
    check_output(PlanConfig(pipeline=bare.name, output_dir=tmp_path / "found"))
    files = {str(file.relative_to(tmp_path / "found")) for file in tmp_path.rglob("*.json")
             if "found" in file.parts}  # fmt: skip
    assert files == {"leapfrog-3/scheduler_config.json", "plan_search.json"}
    pipe = MorsePipeline.from_pretrained(bare)
    scheduler = LeapfrogScheduler.from_pretrained(tmp_path / "found/leapfrog-3")
    assert len(scheduler.config.fitted_steps) == 3
    pipe = MorsePipeline.from_pretrained(bare, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=3)
    fitted = [round(timestep) for timestep, *_ in scheduler.config.fitted_steps]
    assert pipe.scheduler.timesteps.tolist() == fitted


def test_searches_for_two_pipelines_are_not_mixed(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path)
    folder, facts = tmp_path / "found", {"settings": {"pipeline": "one"}, "searches": [{"lsd": 3}]}
    write_json(folder / "plan_search.json", facts)
    config = PlanConfig(pipeline=str(Path("one").resolve()), output_dir=folder)
    check_output(config)
    assert earlier_searches(config) == [{"lsd": 3}]
    check_output(replace(config, pipeline="two", dot=str(folder)))  # whose Dot knows its Dash
    with pytest.raises(FileExistsError, match=r"output_dir is .* pipeline 'one', .* name another"):
        check_output(replace(config, pipeline="two"))
