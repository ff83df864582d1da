import pytest

from morse.plan import MorsePlan


def test_dash_is_first_and_spread_uniformly():
    assert str(MorsePlan.uniform(2, 4)) == "DooDoo"
    assert str(MorsePlan.uniform(3, 4)) == "DoDoDoo"
    assert str(MorsePlan.uniform(4, 0)) == "DDDD"
    for num_dash in range(1, 12):
        for num_dot in range(0, 40):
            plan = MorsePlan.uniform(num_dash, num_dot)
            assert (plan.num_dash, plan.num_dot) == (num_dash, num_dot)
            runs = [len(run) for run in str(plan).split("D")[1:]]
            assert plan[0] == "dash" and max(runs) - min(runs) <= 1


@pytest.mark.parametrize("speed_ratio", [1.5, 4, 6, 8.6])
@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0, 3.0])
def test_a_budget_is_never_exceeded_and_never_buys_fewer_evaluations(speed_ratio, ratio):
    for lsd in [1, 1.33, 2, 3.5, 5, 8, 12, 20, 50]:
        plan = MorsePlan.from_budget(lsd, speed_ratio, ratio)
        assert plan.cost(speed_ratio) <= lsd + 1e-9
        assert len(plan) >= int(lsd)


def test_the_ratio_of_the_paper():
    # (n - k + N k) / n = 2 with n = 10 and N = 6 gives k = 2: 8 Dash and 12 Dot evaluations.
    plan = MorsePlan.from_budget(10, 6, ratio=2)
    assert (plan.num_dash, plan.num_dot) == (8, 12)
    assert plan.cost(6) == pytest.approx(10)


def test_a_slow_dot_gets_a_limited_share():
    # Unlimited, ratio 2 with N = 2.2 would leave Dash 2 of 10 evaluations.
    plan = MorsePlan.from_budget(10, 2.2)
    assert (plan.num_dash, plan.num_dot) == (7, 6)
    assert MorsePlan.from_budget(10, 2.2, max_dot_share=1).num_dash == 2
    assert str(MorsePlan.from_budget(10, 2.2, max_dot_share=0)) == "D" * 10


def test_a_fast_dot_gets_one_dash_evaluation_at_least():
    # k = 0.33 for ratio 1.5 and N = 10; rounded, Dot would have no part.
    plan = MorsePlan.from_budget(6, 10, ratio=1.5)
    assert (plan.num_dash, plan.num_dot) == (5, 10)
    assert MorsePlan.from_budget(4.02, 10, ratio=1.5).num_dash == 3


@pytest.mark.parametrize("ratio", [2, 3, 5])
def test_a_very_fast_dot_makes_no_more_evaluations_than_help(ratio):
    assert len(MorsePlan.from_budget(5, 1000, ratio)) == 5 * max(ratio, 3)


def test_all_dash_where_nothing_can_be_traded():
    assert str(MorsePlan.from_budget(1, 6)) == "D"
    assert str(MorsePlan.from_budget(3, 6, ratio=1.5)) == "DDD"  # one is over 30 % of it
    assert str(MorsePlan.from_budget(7.9, 0.8)) == "D" * 7
    assert str(MorsePlan.from_budget(5, 6, ratio=1)) == "DDDDD"
    assert str(MorsePlan.from_budget(2, 1.2)) == "DD"  # "Do" is as long


def test_a_fraction_of_lsd_is_spent_on_dot():
    assert str(MorsePlan.from_budget(1.5, 6)) == "Dooo"
    assert str(MorsePlan.from_budget(1.9, 6)) == "Doooo"


def test_forms_of_a_plan_are_equal():
    plan = MorsePlan.uniform(2, 4)
    assert MorsePlan.from_string(str(plan)) == plan
    assert MorsePlan.from_mask([model == "dash" for model in plan]) == plan
    assert MorsePlan.parse(plan) is plan
    assert MorsePlan.parse("DooDoo") == plan == MorsePlan.parse([True, False, False] * 2)
    assert MorsePlan.parse(model == "dash" for model in plan) == plan
    assert MorsePlan.from_counts(2, None, 6) == plan == MorsePlan.from_counts(None, 4, 6)
    assert MorsePlan.from_counts(2, 4, None) == plan


def test_shortened_keeps_dash_where_it_can():
    plan = MorsePlan.uniform(3, 6)
    assert plan.shortened(9) is plan and plan.shortened(20) is plan
    assert plan.shortened(8) == MorsePlan.uniform(3, 5)
    assert plan.shortened(3) == MorsePlan.uniform(3, 0) and str(plan.shortened(2)) == "DD"
    begun = MorsePlan.from_string("gggDDoD")
    assert [str(begun.shortened(n)) for n in (6, 5, 2)] == ["gggDDD", "gggDD", "gD"]
    with pytest.raises(ValueError, match="num_dash"):
        begun.shortened(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MorsePlan.from_budget(0.9, 6), "lsd must be a finite number of at least 1"),
        (lambda: MorsePlan.from_budget(float("nan"), 6), "lsd must be .* got nan"),
        (lambda: MorsePlan.from_budget(float("inf"), 6), "lsd must be .* got inf"),
        (lambda: MorsePlan.from_budget("5", 6), "lsd must be .* got '5'"),
        (lambda: MorsePlan.from_budget(True, 6), "lsd must be .* got True"),
        (lambda: MorsePlan.from_budget(5, 0), "speed_ratio"),
        (lambda: MorsePlan.from_budget(5, -1), "speed_ratio"),
        (lambda: MorsePlan.from_budget(5, 6, ratio=0.5), "ratio"),
        (lambda: MorsePlan.from_budget(5, 6, max_dot_share=2), "max_dot_share"),
        (lambda: MorsePlan.from_counts(5, None, 4), "num_dash_steps=5 is more than num_inference"),
        (lambda: MorsePlan.from_counts(0, None, 4), "num_dash_steps must be .* at least 1, got 0"),
        (
            lambda: MorsePlan.from_counts(None, 7, 5),
            "num_dot_steps=7 leaves no Dash evaluation of num_inference_steps=5; lower the one or",
        ),
        (lambda: MorsePlan.from_counts(None, -1, 5), "num_dot_steps must be .* at least 0, got -1"),
        (lambda: MorsePlan.from_counts(None, None, 5), "give both, or one of them and"),
        (lambda: MorsePlan.from_counts(3, None, None), "give both, or one of them and"),
        (lambda: MorsePlan.uniform(0, 4), "num_dash"),
        (lambda: MorsePlan.uniform(2, -1), "num_dot"),
        (lambda: MorsePlan.uniform(2.5, 1), "num_dash"),
        (lambda: MorsePlan.from_string("oD"), "must start with"),
        (lambda: MorsePlan.from_string("DxD"), "x"),
        (lambda: MorsePlan.parse(5), "plan must be a MorsePlan, .* got 5"),
        (lambda: MorsePlan.parse(["D", "o"]), "plan must be a MorsePlan, .* got .'D', 'o'."),
        (lambda: MorsePlan.parse([True, "o"]), "plan must be a MorsePlan, .* got .True, 'o'."),
        (lambda: MorsePlan(()), "must start with"),
        (lambda: MorsePlan.uniform(2, 2).cost(0), "speed_ratio"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_left_of_a_budget_goes_to_dash():
    plan = MorsePlan.uniform(7, 9).shortened(10)
    assert plan.filled(10, 3.0) == MorsePlan.uniform(10, 0)
    assert plan.filled(8.5, 3.0) == MorsePlan.uniform(7, 3)
    assert str(MorsePlan.from_string("gDooo").filled(3, 4.0)) == "gDoDo"
    for speed_ratio in (1.0, 0.5):  # what is saved by a Dot that is no faster is nothing
        assert plan.filled(10, speed_ratio) == plan
    for lsd in (4.0, 5.5, 7.0):
        filled = MorsePlan.uniform(2, 8).filled(lsd, 5.0)
        assert lsd - 0.8 < filled.cost(5.0) <= lsd and len(filled) == 10


def test_what_a_plan_leaves_is_dashs_at_its_end():
    plan = MorsePlan.from_string("gDoo")
    for lsd, expected in ((5.0, "gDooDDD"), (2.4, "gDoo"), (1.0, "gDoo")):
        assert str(plan.extended(lsd, 4.0)) == expected
    assert len(MorsePlan.from_string("Dooo").extended(5, 3.0)) == 4 + 3  # of 3 * (1 / 3) too
