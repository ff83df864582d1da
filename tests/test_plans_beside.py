"""What `morse plan` saves beside the best plan of a budget."""

from dataclasses import replace

import pytest
from evaluation_fixtures import QUICK_PLAN
from tiny_text import text_pipeline

from morse import MorseDot, MorsePipeline, MorsePlan, enable_morse
from morse.evaluation.planning import budget, command
from morse.evaluation.planning.beside import bare_from, next_budget, without_dot
from morse.evaluation.planning.budget import make_spend
from morse.evaluation.planning.command import PlanConfig, run_plan
from morse.evaluation.planning.search import Candidate, Found

FITTED = (("fitted_steps", ((999.0, 0.0),)),)
GRID = (("timestep_power", 1.25),)


def spend(plan, budget, speed_ratio=2.0):
    """As `make_spend` gives it for a solver that can make plans of any length."""
    return plan + "D" * int(budget - MorsePlan.from_string(plan).cost(speed_ratio))


def found(plan, options=FITTED, **fitted):
    tried = {Candidate("DDDD"): 20.0, Candidate("DDDD", GRID): 21.0, Candidate("DoDo"): 22.0}
    best = Candidate(plan, options)
    return Found(best, 30.0, best, 25.0, tried, {Candidate(k): v for k, v in fitted.items()})


class TestBareFrom:
    @pytest.mark.parametrize("first", [5, 6, 7, 8])
    @pytest.mark.parametrize(("plan", "options"), [("DDDD", FITTED), ("DDoDo", ())])
    def test_it_is_the_least_budget_where_the_bare_solver_is_better(self, plan, options, first):
        asked = []

        def evaluate(candidate, quick):
            asked.append(candidate)
            assert quick
            if candidate.options == options:
                return 30.0
            assert candidate.options == GRID  # the best grid of all Dash
            return 31.0 if len(candidate.plan) >= first else 29.0

        assert bare_from(found(plan, options), evaluate, 4, 9, spend) == (
            first, Candidate("D" * first, GRID)
        )  # fmt: skip
        own = [each.plan for each in asked if each.options == options]
        if options == FITTED:
            assert set(own) == {plan}  # run as it is, whatever the budget
        else:
            assert own[0] == plan + "D" * 4  # 3 Dash and 2 Dot cost 4 of 8 LSD

    def test_where_it_never_is_nothing_is_saved(self):
        assert (
            bare_from(found("DDDD"), lambda each, _: float(each.options == FITTED), 4, 9, spend)
            is None
        )

    def test_what_is_the_bare_solver_itself_is_not_compared(self):
        assert bare_from(found("DDDD", GRID), None, 4, 9, spend) is None

    def test_fitted_steps_are_no_grid_of_the_bare_solver(self):
        """A second search of a budget tries those that the first one found."""
        known = found("DDoDo")
        known.tried[Candidate("DDDD", FITTED)] = 35.0
        _, bare = bare_from(known, lambda each, _: float(each.options == GRID), 4, 9, spend)
        assert bare.options == GRID

    def test_next_to_another_budget_there_is_none_between(self):
        assert bare_from(found("DDDD"), None, 4, 5, spend) is None


@pytest.mark.parametrize(("budgets", "expected"), [((4, 8), 6), ((4, 5), 5), ((), 6)])
def test_the_next_budget_is_saved_or_searched(budgets, expected):
    bare = {"lsd": 5, "plan": "DDDDD", "scheduler": {"timestep_power": 1.0}, "psnr": None}
    own = {"lsd": 6, "plan": "DoDDoD", "scheduler": {}, "psnr": 30.0}
    assert next_budget(4, [bare, own], budgets) == expected
    searched = bare | {"psnr": 28.0}
    assert next_budget(4, [searched, own], ()) == 5
    assert next_budget(4, [], ()) == 9


def test_heuns_plans_have_lengths_that_it_can_make(make_pipe):
    run = make_spend(enable_morse(make_pipe("heun"), None), 2.0)
    assert run("D", 10) == "D" * 9
    # 3 Dash and 2 Dot, and 4 of 8 LSD for more Dash: of 9 evaluations 7 can be Dash's.
    assert len(run("DDoDo", 8)) == 9 and MorsePlan.from_string(run("DDoDo", 8)).cost(2.0) <= 8


def test_a_slow_dot_gets_the_best_fit_without_it():
    fits = {"DoDoDo": 30.0, "DDDD": 27.0, "gDDDD": 28.0}
    assert without_dot(found("DoDoDo", **fits)).plan == "gDDDD"
    assert without_dot(found("DDDD", DDDD=27.0)) is None
    assert without_dot(found("DoDoDo")) is None


def test_they_are_saved_and_run(tmp_path, monkeypatch):
    pipe = text_pipeline()
    dot = MorseDot.from_dash(pipe.unet, num_down_blocks=1, block_out_channels=(8,), lora_rank=2)
    MorsePipeline.from_pipe(pipe, dot).save_pretrained(tmp_path / "pipeline")
    plain = Candidate("DDDD", (("timestep_power", 1.0),))
    best = Candidate("DDoDo", (("timestep_power", 1.25),))
    result = Found(best, 30.0, plain, 25.0, {plain: 20.0, best: 30.0}, {plain: 25.0, best: 30.0})
    monkeypatch.setattr(budget, "search_plan", lambda *args: result)
    monkeypatch.setattr(command, "follow", lambda *args: None)
    better_from = [6]
    monkeypatch.setattr(budget, "make_judge", lambda *args: lambda each, _: float(
        len(each.plan) >= better_from[0] if set(each.plan) == {"D"} else 0.5
    ))  # fmt: skip
    settings = {**QUICK_PLAN, "lsd": (4,), "prompts": ("cat",), "speed_ratio": 2.0, "device": "cpu"}
    settings |= {"pipeline": str(tmp_path / "pipeline"), "output_dir": tmp_path / "found"}
    run_plan(PlanConfig(**settings))
    pipe = MorsePipeline.from_pretrained(
        settings["pipeline"], dot=tmp_path / "found", scheduler="leapfrog"
    )
    pipe.speed_ratio = 2.0
    assert [pipe.plan_for(lsd).plan for lsd in (4, 5, 6, 7)] == [
        "DDoDo", "DDoDoD", "D" * 6, "D" * 7
    ]  # fmt: skip
    pipe.speed_ratio = 1.0
    assert pipe.plan_for(4).plan == "DDDD" and pipe.plan_for(4).scheduler["timestep_power"] == 1.0
    # A second search finds the bare solver better from elsewhere on.
    better_from[0] = 8
    run_plan(PlanConfig(**{**settings, "dot": str(tmp_path / "found")}))
    plans = MorseDot.from_pretrained(tmp_path / "found").config.plans["LeapfrogScheduler"]
    assert [(each["lsd"], each["plan"]) for each in plans] == [
        (4, "DDoDo"), (4, "DDDD"), (8, "D" * 8)
    ]  # fmt: skip
    # One for a slower Dot leaves what a faster one runs.
    better_from[0], wanted = 6, Candidate("DDDo", best.options)
    slow = replace(result, best=wanted, tried={**result.tried, wanted: 29.0})
    monkeypatch.setattr(budget, "search_plan", lambda *args: slow)
    run_plan(PlanConfig(**{**settings, "dot": str(tmp_path / "found"), "speed_ratio": 1.0}))
    plans = MorseDot.from_pretrained(tmp_path / "found").config.plans["LeapfrogScheduler"]
    assert [(each["lsd"], each["plan"]) for each in plans] == [
        (4, "DDoDo"), (4, "DDDo"), (4, "DDDD"), (8, "D" * 8)
    ]  # fmt: skip
