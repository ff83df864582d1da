import numpy as np
import pytest

from morse.evaluation.stats.curves import UNKNOWN, Curve, Place, matched_quality_speedup

INSIDE, BETTER, FLAT, WORSE = Place
COSTS = np.arange(2.0, 101.0)


def one_row(costs, errors):
    return Curve(np.array(costs), np.array([errors])).monotone()


def places(curve, *targets):
    found = [curve.cost_of(np.array([target])) for target in targets]
    return [(float(cost[0]), Place(place[0])) for cost, place in found]


def test_a_worse_point_that_costs_more_does_not_make_a_good_one_worse():
    curve = one_row([3, 4, 5, 10], [2.0, 1.0, 1.5, 0.5])
    assert curve.errors.tolist() == [[2.0, 1.0, 1.0, 0.5]]
    # As good as the baseline with 4, so no speed-up; pooled with its 5 it would be one.
    assert matched_quality_speedup(curve, 4, np.array([1.0 + 1e-9]))["value"] == pytest.approx(1)


def test_each_row_is_made_monotone_by_itself():
    errors = np.array([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]])
    curve = Curve(np.array([1.0, 2.0, 4.0]), errors).monotone()
    assert curve.costs.tolist() == [1.0, 2.0, 4.0]
    assert curve.errors.tolist() == [[3.0, 2.0, 1.0], [3.0, 1.0, 1.0]]


def test_interpolation_is_linear_in_log_cost_both_ways():
    curve = one_row([4, 16, 64], [3.0, 2.0, 0.0])
    assert curve.error_at(8)[0] == pytest.approx(2.5)
    assert curve.error_at(32)[0] == pytest.approx(1.0)
    assert [curve.error_at(cost)[0] for cost in (4, 16, 64)] == pytest.approx([3, 2, 0])
    assert places(curve, 2.5, 1.0) == [(pytest.approx(8), INSIDE), (pytest.approx(32), INSIDE)]


def test_the_curve_itself_is_met_where_it_was_measured():
    curve = one_row([4, 16, 64], [3.0, 2.0, 0.0])
    assert places(curve, 3.0, 2.0) == [(pytest.approx(4), INSIDE), (pytest.approx(16), INSIDE)]


def test_outside_of_the_improving_range():
    curve = one_row([4, 16, 64], [3.0, 2.0, 1.0])
    assert places(curve, 3.1, 1.0, 0.9) == [(0, WORSE), (np.inf, BETTER), (np.inf, BETTER)]
    flat = one_row([2, 4, 8, 16], [3.0, 2.0, 2.0, 1.0])
    assert places(flat, 2.0)[0] == (np.inf, FLAT)
    assert places(flat, 2.1)[0][0] < 4 and places(flat, 1.9)[0][0] > 8
    level = one_row([2, 4, 8], [3.0, 3.0, 1.0])
    assert places(level, 3.0, 2.0) == [(np.inf, FLAT), (pytest.approx(32**0.5), INSIDE)]
    nowhere = one_row([2, 4], [1.5, 2.0])  # gets worse: level at 1.5
    assert places(nowhere, 1.5, 1.6, 1.4) == [(np.inf, BETTER), (0, WORSE), (np.inf, BETTER)]


def test_rows_are_inverted_independently():
    curve = Curve(np.array([1.0, 10.0]), np.array([[2.0, 1.0], [4.0, 3.0], [2.0, 1.0]]))
    costs, found = curve.cost_of(np.array([1.5, 3.5, 3.5]))
    np.testing.assert_allclose(costs, [10**0.5, 10**0.5, 0])
    assert found.tolist() == [INSIDE, INSIDE, WORSE]


def test_twice_as_fast_is_two():
    curve = one_row(COSTS, 1 / COSTS)
    for cost in (5, 8, 20, 45):
        entry = matched_quality_speedup(curve, cost, np.array([1 / (2 * cost)]))
        assert entry["value"] == pytest.approx(2, rel=1e-3)
        assert (entry["status"], entry["interval"], entry["note"]) == ("measured", None, "")
    # The same errors against a dearer method: its cost counts, not its budget.
    assert matched_quality_speedup(curve, 10, np.array([0.05]))["value"] == pytest.approx(2)
    assert matched_quality_speedup(curve, 20, np.array([0.05]))["value"] == pytest.approx(1)


def speedup_at_10(errors):
    """Of a method that costs 10, over a baseline whose error is 1/cost in each row."""
    curve = Curve(COSTS, np.tile(1 / COSTS, (len(errors), 1)))
    return matched_quality_speedup(curve, 10, np.array(errors))


def test_the_interval_is_that_of_the_replicates():
    needed = np.linspace(15, 25, 1000)
    entry = speedup_at_10([1 / 20, *(1 / needed)])
    assert entry["value"] == pytest.approx(2) and entry["replicates_outside"] == 0
    assert entry["interval"] == pytest.approx([1.525, 2.475], abs=3e-3)
    assert entry["median"] == pytest.approx(2, abs=3e-3)


def test_replicates_outside_are_counted_and_too_many_leave_no_interval():
    entry = speedup_at_10([1 / 20] * 981 + [0.001] * 20)
    assert entry["replicates_outside"] == 20
    assert entry["interval"] == pytest.approx([2, 2]) and entry["note"] == ""
    entry = speedup_at_10([1 / 20] * 971 + [0.001] * 20 + [0.9] * 10)
    assert entry["value"] == pytest.approx(2) and entry["interval"] is None
    assert entry["replicates_outside"] == 30 and "3.0% of the replicates" in entry["note"]
    # Better than the baseline ever is, is cheaper; worse than it ever is, is not.
    assert entry["cheaper"] == pytest.approx(0.99)
    assert speedup_at_10([1 / 20] * 2)["cheaper"] == 1 and speedup_at_10([0.05])["cheaper"] is None


def test_as_good_for_as_much_is_not_cheaper():
    """A plan of Dash alone gives the bare solver's images, also where dearer ones are worse."""
    level = Curve(np.array([4, 5, 10]), np.array([[1.0, 1.5, 0.5]] * 3)).monotone()
    for cost, errors, share in ((4, 1.0, 0), (3.9, 1.0, 1), (10, 0.5, 0), (9, 0.5, 1)):
        assert matched_quality_speedup(level, cost, np.array([errors] * 3))["cheaper"] == share
    # Better than the baseline ever was, but also dearer: nobody knows.
    assert matched_quality_speedup(level, 10, np.array([0.4] * 3))["cheaper"] == 1
    assert matched_quality_speedup(level, 11, np.array([0.4] * 3))["cheaper"] == 0


def test_points_without_a_speedup_keep_their_status_and_say_why():
    curve = one_row(COSTS, 1 / COSTS)
    saturated = matched_quality_speedup(curve, 10, np.array([0.001]))
    assert saturated["status"] == "saturated" and "largest budget" in saturated["note"]
    worse = matched_quality_speedup(curve, 10, np.array([0.9]))
    assert worse["status"] == "out of range" and "smallest budget" in worse["note"]
    flat = matched_quality_speedup(one_row([1, 2, 3, 4], [3.0, 2, 2, 1]), 1, np.array([2.0]))
    assert flat["status"] == "saturated" and "does not make the baseline better" in flat["note"]
    for entry in (saturated, worse, flat):
        assert entry["value"] is entry["interval"] is entry["median"] is None
        assert entry["replicates_outside"] == 0  # there are none
        assert set(entry) == set(UNKNOWN)


def test_a_cost_beyond_the_curve_is_named():
    with pytest.raises(ValueError, match="from 1 to 2"):
        one_row([1, 2], [1.0, 0.5]).error_at(3)
