import numpy as np
import pytest

from morse.evaluation.stats.curves import Curve
from morse.evaluation.stats.lossless import lossless_test, margins_left_over, read_deltas

COSTS = np.arange(2.0, 101.0)
NUM_REPLICATES = 400


def noisy_case(seed=0, spread=0.01):
    """A baseline 1/cost and a method equal to it at 1.5 times the cost, at cost 10."""
    rng = np.random.default_rng(seed)
    shared = np.concatenate([[0.0], rng.normal(0, spread, NUM_REPLICATES)])
    own = np.concatenate([[0.0], rng.normal(0, spread / 10, NUM_REPLICATES)])
    curve = Curve(COSTS, 1 / COSTS + shared[:, None])
    seeds = np.array([[-spread], [0.0], [spread]]) * 15 / COSTS  # vary by `spread` at cost 15
    by_seed = Curve(COSTS, 1 / COSTS + seeds)
    return curve, by_seed, 1 / 15 + shared + own


def test_equal_at_one_and_a_half_is_lossless_there_and_not_beyond():
    curve, by_seed, errors = noisy_case()
    results = {s: lossless_test(curve, by_seed, 10, errors, s) for s in (1.0, 1.5, 2.5)}
    assert {s: result["lossless"] for s, result in results.items()} == {
        1.0: True,
        1.5: True,
        2.5: False,
    }
    assert results[1.0]["difference"] == pytest.approx(1 / 15 - 1 / 10)
    assert results[1.5]["difference"] == pytest.approx(0, abs=1e-12)
    assert results[2.5]["difference"] == pytest.approx(1 / 15 - 1 / 25)
    assert results[1.5]["delta"] == pytest.approx(0.01) and results[1.5]["delta_from"] == "seeds"
    # What both share cancels: 95 % of the rest lies under 1.645 of its deviations.
    assert results[1.5]["upper_bound"] == pytest.approx(1.645e-3, rel=0.2)
    errors[0] += 1  # is no replicate
    again = lossless_test(curve, by_seed, 10, errors, 1.5)
    assert again["upper_bound"] == results[1.5]["upper_bound"]


def test_one_seed_takes_the_bootstraps_error_and_says_so():
    curve, _, errors = noisy_case()
    result = lossless_test(curve, None, 10, errors, 1.5)
    assert result["delta_from"] == "bootstrap" and result["lossless"]
    assert result["delta"] == pytest.approx(0.01, rel=0.1)
    # A distance's is too wide to be a margin.
    result = lossless_test(curve, None, 10, errors, 1.5, is_mean=False)
    assert result["delta"] is result["delta_from"] is result["lossless"] is None


def test_a_given_margin_takes_the_place_of_both():
    curve, by_seed, errors = noisy_case()
    for seeds in (by_seed, None):
        loose, strict = (lossless_test(curve, seeds, 10, errors, 1.5, d) for d in (0.05, 1e-4))
        assert (loose["delta"], loose["delta_from"], loose["lossless"]) == (0.05, "given", True)
        assert (strict["delta"], strict["lossless"]) == (1e-4, False)
    bound = loose["upper_bound"]  # has to be under the margin
    for delta, expected in ((1.01 * bound, True), (bound, False), (0.99 * bound, False)):
        assert lossless_test(curve, None, 10, errors, 1.5, delta)["lossless"] is expected
    alone = lossless_test(Curve(COSTS, 1 / COSTS[None]), None, 10, np.array([1 / 15]), 1.5, 0.05)
    assert alone["delta"] == 0.05 and alone["lossless"] is None


def test_margins_are_named_by_axis():
    assert read_deltas(("PSNR=0.3", "frechet=2e-2")) == {"psnr": 0.3, "frechet": 0.02}
    for wrong in ("psnr", "psnr=", "psnr=0", "psnr=inf", "fid=1", "=1"):
        with pytest.raises(ValueError, match=f"lossless_delta has '{wrong}'.*kernel_to_reference"):
            read_deltas((wrong,))
    with pytest.raises(ValueError, match="each once"):
        read_deltas(("psnr=1", "PSNR=2"))


def test_margins_of_axes_that_are_not_measured_are_told():
    texts = ("psnr=0.3", "Kernel=1")
    assert margins_left_over(texts, ("psnr", "kernel")) == ""
    assert "for kernel, which is not measured here" in margins_left_over(texts, ("psnr", "ssim"))


def test_without_replicates_nothing_is_claimed():
    curve = Curve(COSTS, 1 / COSTS[None])
    result = lossless_test(curve, None, 10, np.array([1 / 15]), 1.5)
    assert result["difference"] == pytest.approx(0, abs=1e-12)
    assert [result[name] for name in ("upper_bound", "delta", "delta_from", "lossless")] == [
        None
    ] * 4


def test_a_cost_that_was_not_measured_is_refused():
    curve, by_seed, errors = noisy_case()
    with pytest.raises(ValueError, match="from 2 to 100"):
        lossless_test(curve, by_seed, 60, errors, 2.0)
