import dataclasses

import numpy as np
import pytest
import torch

from morse.evaluation.bench.methods import BEST_TRAINING_FREE, BEST_WITH_MIXTURE, Method
from morse.evaluation.bench.store import Cell
from morse.evaluation.fid.feature_sets import FeatureSet
from morse.evaluation.metrics import feature_statistics, frechet_distance
from morse.evaluation.scoring import ImageScores, axes_of
from morse.evaluation.stats.summary import Statistics, rounded, summarize

NUM_IMAGES, SIZE = 64, 2
REAL = FeatureSet("real", torch.zeros(SIZE), torch.eye(SIZE), 60_000)
AXES = ("frechet", "frechet_to_reference", "psnr", "ssim")
STATISTICS = Statistics(num_replicates=60)
DDIM, SOLVER, FAST = Method("ddim"), Method("dpmsolver++"), Method("ddim", "morse", 2.0)
RATES = {DDIM: 1.0, SOLVER: 1.5, FAST: 3.0}


def whitened(seed):
    """Features with mean 0 and covariance 1 exactly, so that a shift v has distance |v|^2."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(NUM_IMAGES, SIZE, generator=generator, dtype=torch.float64)
    features = features - features.mean(dim=0)
    factor = torch.linalg.cholesky(torch.cov(features.T))
    return torch.linalg.solve_triangular(factor, features.T, upper=False).T


def quality_cell(method, budget, error, seed=0, **options):
    """A cell with the error on each axis: the distances themselves, PSNR and SSIM its negative."""
    shift = torch.tensor([error**0.5, 0.0])
    noise = torch.randn(NUM_IMAGES, generator=torch.Generator().manual_seed(seed)) * 1e-3
    noise -= noise.mean()
    scores = ImageScores((whitened(seed) + shift).float(), noise - error, noise - error)
    num_dot = 0 if method.kind == "baseline" else budget
    rest = {"seconds": budget / 10, "fallbacks": {}, "scores": scores, **options}
    return Cell(method, budget, seed, "", budget, num_dot, float(budget), **rest)


def references(*seeds):
    return {seed: whitened(seed).float() for seed in seeds}


def make_cells(baseline=range(2, 61), fast=(5, 10, 15), seeds=(0,)):
    return [
        quality_cell(method, budget, 1 / (rate * budget), seed)
        for seed in seeds
        for method, rate in RATES.items()
        for budget in (baseline if method.kind == "baseline" else fast)
    ]


@pytest.fixture(scope="module")
def result():
    return summarize(make_cells(), REAL, references(0), STATISTICS)


def select(entries, **wanted):
    return [e for e in entries if all(e[name] == value for name, value in wanted.items())]


def test_a_method_twice_as_fast_shows_as_two_on_every_axis_and_cost(result):
    for axis in AXES:
        for cost in ("lsd", "seconds"):
            found = select(result["speedups"], method=FAST.label, axis=axis, cost=cost)
            for name, value in ((BEST_TRAINING_FREE, 2.0), (SOLVER.label, 2.0), (DDIM.label, 3.0)):
                points = select(found, baseline=name)
                assert [point["budget"] for point in points] == [5, 10, 15]
                assert all(point["status"] == "measured" for point in points)
                speedups = [point["value"] for point in points]
                assert speedups == pytest.approx([value] * 3, rel=5e-3)
                spent = [5, 10, 15] if cost == "lsd" else [0.5, 1, 1.5]
                assert [point["spent"] for point in points] == pytest.approx(spent)
    # PSNR's noise is common to all methods here, so the speed-up does not spread.
    (point,) = select(
        result["speedups"],
        method=FAST.label,
        baseline=BEST_TRAINING_FREE,
        axis="psnr",
        cost="lsd",
        budget=10,
    )
    assert point["interval"] == pytest.approx([2, 2], rel=5e-3)


def test_training_free_solvers_are_compared_with_each_other_where_another_method_was_measured(
    result,
):
    points = select(
        result["speedups"], method=SOLVER.label, baseline=DDIM.label, axis="psnr", cost="lsd"
    )
    assert [point["budget"] for point in points] == [5, 10, 15]
    assert [point["value"] for point in points] == pytest.approx([1.5] * 3, rel=5e-3)
    assert not select(result["speedups"], method=SOLVER.label, baseline=BEST_TRAINING_FREE)
    assert not select(result["speedups"], method=DDIM.label, baseline=DDIM.label)


def test_morse_is_compared_with_the_better_of_bare_solvers_and_what_a_mixture_begins():
    begun = Method("ddim", "mixture")
    errors = {b: 1 / (2 * b) if b <= 10 else 1 / b for b in range(5, 61)}  # ahead up to 10
    cells = make_cells() + [quality_cell(begun, b, error) for b, error in errors.items()]
    speedups = summarize(cells, REAL, references(0), STATISTICS)["speedups"]
    points = select(speedups, baseline=BEST_WITH_MIXTURE, axis="psnr", cost="lsd")
    assert {point["method"] for point in points} == {FAST.label}
    assert [point["value"] for point in points] == pytest.approx([1.5, 2, 2], rel=5e-3)
    assert select(speedups, method=begun.label, baseline=BEST_TRAINING_FREE)  # it is none of them


def test_rows_carry_values_errors_and_intervals(result):
    (row,) = select(result["rows"], label=FAST.label, budget=5)
    assert (row["kind"], row["ratio"], row["setting"]) == ("morse", 2.0, "")
    assert row["images_per_second"] == pytest.approx(NUM_IMAGES / 0.5)
    assert row["engaged"] and row["note"] == "" and row["peak_memory_mib"] is None
    for axis, sign in (("frechet", 1), ("psnr", -1), ("ssim", -1), ("frechet_to_reference", 1)):
        score = row["scores"][axis]
        assert score["value"] == pytest.approx(sign / 15, rel=1e-5)
        low, high = score["interval"]
        assert low <= score["value"] <= high and score["standard_error"] < high - low
        assert score["by_seed"] == {"0": score["value"]} and score["seed_deviation"] is None
    deviation = row["scores"]["psnr"]["standard_error"]
    assert deviation == pytest.approx(1e-3 / NUM_IMAGES**0.5, rel=0.3)


def test_the_row_of_measured_features_is_the_plain_distance():
    features = torch.randn(NUM_IMAGES, SIZE, generator=torch.Generator().manual_seed(5))
    cell = quality_cell(DDIM, 5, 1.0, scores=ImageScores(features, *torch.zeros(2, NUM_IMAGES)))
    reference = references(0)
    (row,) = summarize([cell], REAL, reference, STATISTICS)["rows"]
    statistics = feature_statistics(features)
    expected = frechet_distance(*statistics, *feature_statistics(reference[0]))
    assert row["scores"]["frechet"]["value"] == pytest.approx(
        frechet_distance(*statistics, REAL.mean, REAL.covariance)
    )
    assert row["scores"]["frechet_to_reference"]["value"] == pytest.approx(expected)


def test_seeds_are_averaged():
    options = [
        {"note": "slow start", "peak_memory_mib": 5.0, "fallbacks": {"shape": 1}},
        {"engaged": False, "peak_memory_mib": 7.0, "fallbacks": {"shape": 2}},
    ]
    options[0]["seconds"], options[1]["seconds"] = 0.5, 1.5
    cells = [
        quality_cell(DDIM, 5, error, seed, **extra)
        for (seed, error), extra in zip(((0, 1.0), (90, 3.0)), options, strict=True)
    ]
    cells[1] = dataclasses.replace(cells[1], num_dash=7, num_dot=1, lsd=7.25)
    (row,) = summarize(cells, REAL, references(0, 90), STATISTICS)["rows"]
    assert (row["num_dash"], row["num_dot"], row["lsd"]) == (6, 0.5, 6.125)
    score = row["scores"]["psnr"]
    assert score["value"] == pytest.approx(-2)
    assert score["by_seed"] == {"0": pytest.approx(-1), "90": pytest.approx(-3)}
    assert score["seed_deviation"] == pytest.approx(2**0.5)
    assert (row["note"], row["engaged"]) == ("slow start", False)
    assert (row["seconds"], row["images_per_second"]) == (1.0, NUM_IMAGES)
    assert row["fallbacks"] == {"shape": 3} and row["peak_memory_mib"] == 7.0
    # Repetitions resample independently, so two halve the variance of one.
    (lone,) = summarize(cells[:1], REAL, references(0), Statistics(num_replicates=2000))["rows"]
    (both,) = summarize(cells, REAL, references(0, 90), Statistics(num_replicates=2000))["rows"]
    errors = [row["scores"]["psnr"]["standard_error"] for row in (lone, both)]
    assert errors[0] / errors[1] == pytest.approx(2**0.5, rel=0.2)


def test_the_baseline_curve_leaves_out_what_is_no_better_than_something_cheaper():
    errors = {DDIM: {5: 1.0, 10: 0.5, 20: 0.1}, SOLVER: {5: 0.9, 10: 0.2, 20: 0.3, 40: 0.3}}
    cells = [
        quality_cell(method, budget, error)
        for method, table in errors.items()
        for budget, error in table.items()
    ]
    curves = summarize(cells, REAL, references(0), STATISTICS)["baseline_curves"]
    for axis, sign in (("frechet", 1), ("psnr", -1)):
        labels = [point["label"] for point in curves[axis]]
        assert labels == [SOLVER.label, SOLVER.label, DDIM.label, DDIM.label]
        value = [sign * point["value"] for point in curves[axis]]
        assert value == pytest.approx([0.9, 0.2, 0.1, 0.1], rel=1e-4)
        assert [point["cost"] for point in curves[axis]] == [5, 10, 20, 40]
        assert [point["budget"] for point in curves[axis]] == [5, 10, 20, 20]


def test_a_budget_at_which_only_a_weak_solver_was_measured_is_no_level_stretch():
    """As with Heun, whose numbers of evaluations are odd."""
    weak = Method("heun")
    errors = {(SOLVER, 6): 0.5, (weak, 7): 0.9, (SOLVER, 8): 0.25, (FAST, 4): 0.375}
    cells = [quality_cell(method, budget, error) for (method, budget), error in errors.items()]
    speedups = summarize(cells, REAL, references(0), STATISTICS)["speedups"]
    (point,) = select(speedups, baseline=BEST_TRAINING_FREE, axis="psnr", cost="lsd")
    # Half of the way from 6 to 8, not from 7 on.
    assert point["value"] == pytest.approx(48**0.5 / 4, rel=1e-3)


def test_in_seconds_the_baseline_is_what_is_best_for_the_time():
    """The better solver at each budget may be the slower way to a quality."""
    cells = [quality_cell(SOLVER, n, 0.9 / n, seconds=float(n)) for n in (5, 10, 20, 40)]
    cells += [quality_cell(DDIM, n, 1 / n, seconds=n / 4) for n in (5, 10, 20, 40)]
    cells += [quality_cell(FAST, 5, 1 / 15, seconds=2.5)]
    speedups = summarize(cells, REAL, references(0), STATISTICS)["speedups"]
    (point,) = select(speedups, baseline=BEST_TRAINING_FREE, axis="psnr", cost="seconds")
    # DDIM reaches it between 10 and 20 evaluations, 2.5 and 5 seconds; the other one takes 13.
    assert point["value"] == pytest.approx(2 ** (2 / 3), rel=1e-3)


def test_gains_over_the_best_solver_are_of_pairs():
    """What the noise does to both cancels, so that a small difference is no noise."""
    cells = [quality_cell(DDIM, n, 1 / n) for n in (5, 10)]
    cells += [dataclasses.replace(quality_cell(FAST, 7, 0.1999), lsd=5.0)]  # what was spent counts
    cells += [quality_cell(FAST, 10, 0.1001)]
    rows = summarize(cells, REAL, references(0), STATISTICS)["rows"]
    assert all(row["against_best"] == {} for row in select(rows, label=DDIM.label))
    for budget, gain in ((7, 1e-4), (10, -1e-4)):
        (row,) = select(rows, label=FAST.label, budget=budget)
        found = row["against_best"]["psnr"]
        assert abs(gain) < row["scores"]["psnr"]["standard_error"]
        assert [found["gain"], *found["interval"]] == pytest.approx([gain] * 3, rel=1e-2)


def test_what_costs_less_than_every_solver_is_compared_with_the_cheapest():
    cells = [quality_cell(DDIM, n, 1 / n) for n in (5, 10)]
    cells += [quality_cell(FAST, 4, 0.21)]
    rows = summarize(cells, REAL, references(0), STATISTICS)["rows"]
    (row,) = select(rows, label=FAST.label)
    assert row["against_best"]["psnr"]["gain"] == pytest.approx(-0.01, rel=1e-3)


def test_points_without_a_speedup_are_listed():
    errors = {2: 0.5, 5: 0.2, 10: 0.1, 20: 0.1, 30: 0.05}
    cells = [quality_cell(DDIM, budget, error) for budget, error in errors.items()]
    cells += [quality_cell(FAST, n, e) for n, e in ((5, 0.01), (10, 0.1), (20, 0.7), (30, 0.07))]
    speedups = summarize(cells, REAL, references(0), STATISTICS)["speedups"]
    points = select(speedups, baseline=BEST_TRAINING_FREE, axis="psnr", cost="lsd")
    assert [point["status"] for point in points] == [
        "saturated",
        "measured",
        "out of range",
        "measured",
    ]
    assert "largest budget" in points[0]["note"] and "smallest" in points[2]["note"]
    # As good as the baseline with 10, which has no more with 20.
    assert points[1]["value"] == pytest.approx(1, rel=1e-3)
    assert [point["value"] is None for point in points] == [True, False, True, False]


def test_a_baseline_of_one_budget_gives_no_speedup_but_the_point_is_listed():
    cells = [quality_cell(DDIM, 5, 0.5), quality_cell(FAST, 5, 0.4)]
    result = summarize(cells, REAL, references(0), STATISTICS)
    for point in result["speedups"]:
        assert point["status"] == "out of range" and "fewer than two" in point["note"]
    assert len(result["speedups"]) == 2 * 2 * len(AXES)
    assert result["lossless"] == []
    assert result["baseline_curves"]["psnr"][0]["value"] == pytest.approx(-0.5)


@pytest.mark.parametrize("seeds", [(0,), (0, 90, 180)])
def test_equal_to_the_baseline_at_one_and_a_half_is_lossless_there_and_not_beyond(seeds):
    rng = np.random.default_rng(1)
    cells = []
    for seed in seeds:
        offset = rng.normal(0, 1e-3)
        for budget in (5, 10, 15, 20, 25, 30):
            cells.append(quality_cell(DDIM, budget, 1 / budget + offset, seed))
        cells.append(quality_cell(FAST, 10, 1 / 15 + offset, seed))
    result = summarize(cells, REAL, references(*seeds), STATISTICS)
    tests = {test["factor"]: test for test in select(result["lossless"], axis="psnr")}
    assert tests[1.0]["lossless"] and tests[1.5]["lossless"] and not tests[2.5]["lossless"]
    assert {test["delta_from"] for test in tests.values()} == {
        "bootstrap" if len(seeds) == 1 else "seeds"
    }
    if len(seeds) == 1:  # by its bootstrap a distance would pass too easily
        distances = select(result["lossless"], axis="frechet")
        assert {(test["delta_from"], test["lossless"]) for test in distances} == {(None, None)}
    assert tests[1.5]["difference"] == pytest.approx(0, abs=1e-6)
    assert tests[2.5]["difference"] == pytest.approx(1 / 15 - 1 / 25, rel=1e-3)
    assert set(tests) == {1.0, 1.25, 1.5, 2.0, 2.5, 3.0}
    assert tests[1.5]["method"] == FAST.label and tests[1.5]["budget"] == 10
    # At factors beyond the baseline's largest budget nothing is tested.
    fast = [quality_cell(FAST, 15, 1 / 22, seed) for seed in seeds]
    tests = summarize([*cells, *fast], REAL, references(*seeds), STATISTICS)["lossless"]
    factors = [test["factor"] for test in select(tests, axis="psnr", budget=15)]
    assert factors == [1.0, 1.25, 1.5, 2.0]
    if len(seeds) > 1:  # those count that all of the baseline's budgets were measured with
        few = [cell for cell in cells if cell.budget != 30 or cell.seed == 0]
        tests = summarize(few, REAL, references(*seeds), STATISTICS)["lossless"]
        assert {test["delta_from"] for test in select(tests, axis="psnr")} == {"bootstrap"}


def test_the_reference_is_no_point_of_its_own_fidelity_curve():
    cells = [quality_cell(SOLVER, budget, 1 / budget) for budget in (25, 50, 100)]
    result = summarize(cells, REAL, references(0), STATISTICS)
    rows = {row["budget"]: row["scores"] for row in result["rows"]}
    for axis in ("psnr", "ssim", "frechet_to_reference"):
        assert rows[100][axis] is None and rows[50][axis] is not None
        assert [point["budget"] for point in result["baseline_curves"][axis]] == [25, 50]
    assert rows[100]["frechet"]["value"] == pytest.approx(0.01, rel=1e-3)


def test_a_method_that_did_not_engage_has_a_row_and_is_in_nothing_else():
    cells = [quality_cell(DDIM, n, 1 / n) for n in (5, 10)]
    for method in (FAST, SOLVER):  # as good as nothing else is
        cells.append(dataclasses.replace(quality_cell(method, 5, 0.01), engaged=False))
    result = summarize(cells, REAL, references(0), STATISTICS)
    assert [row["engaged"] for row in result["rows"]] == [True, True, False, False]
    assert result["speedups"] == result["lossless"] == []
    assert {each["label"] for each in result["baseline_curves"]["psnr"]} == {DDIM.label}


def test_without_replicates_there_are_no_errors_and_no_claims():
    result = summarize(make_cells(), REAL, references(0), Statistics(num_replicates=0))
    score = result["rows"][0]["scores"]["frechet"]
    assert score["standard_error"] is score["interval"] is None
    assert all(point["interval"] is None for point in result["speedups"])
    assert all(test["lossless"] is None for test in result["lossless"])


def test_the_same_cells_give_the_same_figures(result):
    assert rounded(summarize(make_cells(), REAL, references(0), STATISTICS)) == rounded(result)


def test_figures_are_rounded():
    options = {"fitted_steps": [[999.123456789, 0.5]]}
    assert rounded({"a": [1.23456789, (2, None)], "b": True, "scheduler_options": options}) == {
        "a": [1.23457, [2, None]],
        "b": True,
        "scheduler_options": options,
    }


def test_rows_carry_what_their_steps_were_laid_with():
    options = {"fitted_steps": [[999.123456789, 0.5]]}
    told = [{"scheduler_options": options}, {"scheduler_options": {}}]
    cells = [quality_cell(DDIM, 4 + i, 1.0, **each) for i, each in enumerate(told)]
    rows = summarize(cells, REAL, references(0), Statistics(num_replicates=0))["rows"]
    assert [{k: v for k, v in row.items() if k == "scheduler_options"} for row in rows] == told


def test_a_given_margin_is_of_its_axis_alone():
    cells = make_cells((4, 6, 8, 12), (4,))
    tests = summarize(cells, REAL, references(0), STATISTICS, deltas={"psnr": 0.5})["lossless"]
    found = {(e["axis"], e["delta_from"]) for e in tests}
    assert ("psnr", "given") in found and ("ssim", "bootstrap") in found
    assert {e["delta"] for e in select(tests, axis="psnr")} == {0.5}


def test_without_real_images_there_is_the_distance_to_the_reference():
    result = summarize(make_cells((4, 8), (4,)), None, references(0), STATISTICS)
    assert list(result["axes"]) == list(result["rows"][0]["scores"]) == list(AXES[1:])
    bare = ImageScores(torch.empty(NUM_IMAGES, 0), *torch.rand(2, NUM_IMAGES))
    cells = [quality_cell(DDIM, 4, 1.0, scores=bare)]
    for real in (None, REAL):  # images that have no features are not compared with real ones
        result = summarize(cells, real, {0: torch.empty(NUM_IMAGES, 0)}, STATISTICS)
        assert list(result["axes"]) == list(AXES[2:])


def test_many_features_are_compared_by_their_kernels():
    """Under the names that the extractor gives."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, NUM_IMAGES, 150, generator=generator)
    real = FeatureSet("real", *feature_statistics(features[0]), NUM_IMAGES, features[0])
    cells = [
        quality_cell(DDIM, budget, 1.0, scores=ImageScores(each, *torch.rand(2, NUM_IMAGES)))
        for budget, each in ((4, features[2] + 0.2), (8, features[3]))
    ]
    titles = {"frechet": "FID", "kernel_distance": "KID"}
    few = Statistics(num_replicates=20)
    result = summarize(cells, real, {0: features[1]}, few, axes_of(titles))
    assert list(result["axes"]) == ["kernel", "kernel_to_reference", "psnr", "ssim"]
    assert result["axes"]["kernel"]["title"] == "KID to real images"
    assert result["axes"]["kernel_to_reference"]["title"] == "KID to the reference's images"
    first, second = (row["scores"] for row in result["rows"])
    for axis in ("kernel", "kernel_to_reference"):
        assert first[axis]["value"] > second[axis]["value"] and first[axis]["interval"]
    with pytest.raises(ValueError, match="150 or 151 features, so they, or the real ones"):
        summarize(cells, real, {0: torch.zeros(NUM_IMAGES, 151)}, few)


def test_clear_errors():
    with pytest.raises(ValueError, match="lacks seed 0"):
        summarize(make_cells(), REAL, {}, STATISTICS)
    with pytest.raises(ValueError, match="num_replicates is -1"):
        Statistics(num_replicates=-1)
