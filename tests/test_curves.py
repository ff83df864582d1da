import pytest

from morse.evaluation.curves import (
    SpeedUp,
    best_of,
    cost_of_quality,
    matched_quality_speedups,
    mean_speedup,
)

# Linear interpolation of 1/n between points 0.1 apart is off by less than 1e-3 in cost.
DENSE = [(n / 10, 10 / n) for n in range(20, 601)]


def test_a_method_twice_as_fast_has_speedup_two():
    method = [(cost, 1 / (2 * cost)) for cost in (5, 8, 12, 20, 30)]
    speedups = matched_quality_speedups(DENSE, method, "lower")
    assert [point.value for point in speedups] == pytest.approx([2.0] * 5, rel=1e-3)
    assert all(point.bound is None for point in speedups)
    assert str(mean_speedup(speedups)) == "2.00x"


def test_higher_is_better_mirrors_lower_is_better():
    mirrored = [(cost, -quality) for cost, quality in DENSE]
    method = [(cost, -1 / (2 * cost)) for cost in (5, 30)]
    speedups = matched_quality_speedups(mirrored, method, "higher")
    assert [point.value for point in speedups] == pytest.approx([2.0, 2.0], rel=1e-3)


def test_the_baseline_itself_has_speedup_one_in_any_order():
    speedups = matched_quality_speedups(DENSE[::-1], DENSE, "lower")
    assert [point.value for point in speedups] == pytest.approx([1.0] * len(DENSE))
    assert all(point.bound is None for point in speedups)


def test_interpolation_is_linear():
    assert cost_of_quality([10, 20], [4.0, 2.0], 3.0, "lower") == (15.0, None)
    assert cost_of_quality([10, 20], [20.0, 40.0], 25.0, "higher") == (12.5, None)


def test_better_than_the_baseline_ever_was_is_a_lower_bound():
    (point,) = matched_quality_speedups([(5, 3.0), (50, 1.0)], [(10, 0.5)], "lower")
    assert point == SpeedUp(10, 5.0, "at least")
    assert str(point) == ">= 5.00x"


def test_worse_than_the_baseline_ever_was_is_an_upper_bound():
    (point,) = matched_quality_speedups([(5, 3.0), (50, 1.0)], [(10, 4.0)], "lower")
    assert point == SpeedUp(10, 0.5, "at most")


def test_a_curve_that_turns_back_counts_the_cheapest_place():
    costs, qualities = [1, 2, 3, 4], [4.0, 2.0, 3.0, 1.0]
    assert cost_of_quality(costs, qualities, 2.5, "lower") == (1.75, None)
    assert cost_of_quality(costs, qualities, 1.5, "lower") == (3.75, None)


def test_the_mean_counts_its_bounds_and_shows_their_direction():
    plain, low, high = SpeedUp(1, 2.0), SpeedUp(1, 4.0, "at least"), SpeedUp(1, 0.5, "at most")
    assert str(mean_speedup([plain, low])) == ">= 3.00x"
    assert str(mean_speedup([plain, high])) == "<= 1.25x"
    mixed = mean_speedup([plain, low, high])
    assert (mixed.num_points, mixed.num_at_least, mixed.num_at_most) == (3, 1, 1)
    assert str(mixed) == "~ 2.17x"


def test_best_of_takes_the_better_one_at_each_common_cost():
    first, second = [(5, 3.0), (10, 1.0), (20, 0.5)], [(5, 2.0), (10, 1.5)]
    assert best_of([first, second], "lower") == [(5, 2.0), (10, 1.0)]
    assert best_of([first, second], "higher") == [(5, 3.0), (10, 1.5)]


def test_clear_errors():
    with pytest.raises(ValueError, match="more budgets"):
        cost_of_quality([1], [1.0], 1.0, "lower")
    with pytest.raises(ValueError, match="increase strictly"):
        cost_of_quality([2, 1], [1.0, 2.0], 1.0, "lower")
    with pytest.raises(ValueError, match="more budgets"):
        matched_quality_speedups([], [(1, 1.0)], "lower")
    with pytest.raises(ValueError, match="empty"):
        mean_speedup([])
