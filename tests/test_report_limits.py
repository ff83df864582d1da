"""What the report claims of Morse, and where it says that Morse does not win."""

import copy
import math

import pytest
from report_fixtures import BUDGETS, full_result, paired_result
from report_tables import all_text, find, find_claims, find_headline, tables_of

from morse.evaluation.bench.methods import BEST_TRAINING_FREE, BEST_WITH_MIXTURE
from morse.evaluation.report.data import (
    best_training_free_row,
    headline_axes,
    read_axes,
)
from morse.evaluation.report.scores import Axis, Score, compare
from morse.evaluation.report.sections import quality_table, report_sections

LOWER = Axis("Fréchet distance (features) to real images", "", "lower", "distribution", "frechet")
HIGHER = Axis("Same-noise PSNR to the reference", "dB", "higher", "fidelity", "psnr")


@pytest.fixture(scope="module")
def result():
    return full_result()


def test_verdicts_follow_the_errors():
    assert compare(Score(1.0), Score(2.0), LOWER) == "better"
    assert compare(Score(1.0), Score(2.0), HIGHER) == "worse"
    assert compare(Score(1.0), Score(1.0), LOWER) == "within noise"
    # 1.96 * sqrt(0.3^2 + 0.4^2) = 0.98
    for gap, verdict in ((0.97, "within noise"), (0.99, "better")):
        assert compare(Score(1.0, 0.3), Score(1.0 + gap, 0.4), LOWER) == verdict
        assert compare(Score(1.0 + gap, 0.3), Score(1.0, 0.4), HIGHER) == verdict
    assert compare(Score(1.0, 0.5), Score(1.1), LOWER) == "better"


def test_limits_are_those_that_the_figures_give(result):
    rows = {(row["label"], row["budget"]): row["scores"] for row in result["rows"]}
    counts = {"better": 0, "within noise": 0, "worse": 0}
    table = next(t for title, t in tables_of(result) if title == "Where Morse does not win")
    listed = {row[:2]: row[2:5] for row in table.rows}
    for axis in read_axes(result):
        sign = 1 if axis.better == "higher" else -1
        for label in ("Morse-DDIM r2", "Morse-DPM++ 2M r1.75"):
            expected = {"worse": [], "within noise": [], "better": []}
            for budget in BUDGETS:
                best = max(
                    (rows[solver, budget][axis.name] for solver in ("DDIM", "DPM++ 2M")),
                    key=lambda score, sign=sign: sign * score["value"],
                )
                own = rows[label, budget][axis.name]
                gain = sign * (own["value"] - best["value"])
                noise = 1.96 * math.hypot(own["standard_error"], best["standard_error"])
                verdict = "within noise" if abs(gain) <= noise else "worse"
                verdict = "better" if gain > noise else verdict
                expected[verdict].append(str(budget))
                counts[verdict] += 1
            cells = tuple(", ".join(budgets) or "–" for budgets in expected.values())
            assert listed[label, axis.short_title] == cells
    assert min(counts.values()) > 0
    wanted = "better in {better}, within noise in {within noise} and worse in {worse}"
    assert wanted.format(**counts) in report_sections(result)[0].text[0]


def test_a_gain_in_lsd_that_is_none_in_seconds_is_listed(result):
    table = next(t for title, t in tables_of(result) if title == "Where Morse does not win")
    slow = {row[:2]: row[5] for row in table.rows}
    # 1.27, 1.01 and 0.83 times the LSD are 1.14, 0.91 and 0.74 times the seconds.
    # At 30 LSD both are out of range, and before schema 4 nobody knows whether "saturated" is sure.
    assert slow["Morse-DDIM r2", "Same-noise PSNR to the reference"] == "8, 12, 20, 30"
    assert slow["Morse-DPM++ 2M r1.75", "Same-noise PSNR to the reference"] == "20, 30"
    unmeasured = result | {"speedups": []}
    table = next(t for title, t in tables_of(unmeasured) if title == "Where Morse does not win")
    assert {row[5] for row in table.rows} == {"not measured"}
    assert not find_claims(unmeasured)


def test_paired_gains_come_before_single_errors(result):
    """Schema 4 has them: as the single errors, each larger than the gain, do not tell."""
    changed = copy.deepcopy(result)
    for row in changed["rows"]:
        row["against_best"] = {
            axis: {"gain": 1e-3, "interval": interval}
            for axis, interval in (("frechet", [-2e-3, -1e-3]), ("psnr", [1e-3, 2e-3]))
            if row["kind"] == "morse"
        }
    text = report_sections(changed)[0].text[0]
    assert "of 20 comparisons" in text
    assert "better in 10, within noise in 0 and worse in 10" in text


def test_schema_4_says_that_pairs_are_compared_and_older_ones_do_not(result):
    text, older = all_text(paired_result()), all_text(result)
    for words in ("At equal LSD, of 30 comparisons", "of pairs from the same noise, includes 0"):
        assert words in text and words not in older
    older_words = "At the same budget", "1.96 standard errors", "Measured by an earlier version"
    for words in older_words:
        assert words in older and words not in text
    # Better on one axis, within noise on one, worse on one, at each of 2 x 5.
    assert "better in 10, within noise in 10 and worse in 10" in text
    claim = find_claims(paired_result())["Morse-DPM++ 2M r1.75", "Same-noise PSNR"]
    assert claim[0] == "1.27–1.60× (3 of 5, surely 1)"


def test_a_gain_that_is_no_number_is_no_comparison():
    changed = paired_result()
    for row in changed["rows"]:
        if row["kind"] == "morse":
            row["against_best"]["psnr"] = {"gain": math.nan, "interval": None}
    assert "of 20 comparisons" in all_text(changed)


def test_budgets_without_dot_are_named(result):
    changed = copy.deepcopy(result)
    for row in changed["rows"]:
        if row["label"] == "Morse-DDIM r2" and row["budget"] in (20, 30):
            row["num_dot"] = 0
    assert "the steps' or the mixture's: Morse-DDIM r2 at 20, 30 LSD." in all_text(changed)
    assert "Without Dot" not in all_text(result)


def test_a_gain_without_an_interval_is_not_sure(result):
    changed = copy.deepcopy(result)
    for entry in changed["speedups"]:
        entry["cheaper"] = 0.96 if entry["budget"] == 5 else 1.0
    claim = find_claims(changed)["Morse-DPM++ 2M r1.75", "Same-noise PSNR"]
    assert claim == ("1.27–1.60× (3 of 5, surely 4)", "1.14–1.44× (3 of 5, surely 4)")
    for number, sure in ((40, 4), (39, 0)):  # of fewer than 40 replicates nothing is sure
        changed["settings"]["num_replicates"] = number
        claim = find_claims(changed)["Morse-DPM++ 2M r1.75", "Same-noise PSNR"]
        assert claim[0] == f"1.27–1.60× (3 of 5, surely {sure})"


def test_methods_ahead_of_morse_are_named(result):
    changed = copy.deepcopy(result)
    for row in changed["rows"]:
        if row["kind"] == "deepcache" and row["budget"] in (12, 20) and row["engaged"]:
            row["scores"]["psnr"]["value"] = 60.0
    (section,) = (s for s in report_sections(changed) if s.title == "Where Morse does not win")
    assert section.text == (
        "DeepCache-DDIM interval 3 is better than every Morse method at 12, 20 LSD "
        "(Same-noise PSNR to the reference).",
    )


@pytest.mark.parametrize("kind", ["pfdiff", "ays"])
def test_a_training_free_solver_ahead_is_in_the_table_alone(result, kind):
    """It counts as the best training-free solver, so it is no control or peer."""
    changed = copy.deepcopy(result)
    for row in changed["rows"]:
        if row["kind"] == "deepcache" and row["engaged"]:
            row["kind"] = kind
            row["scores"]["psnr"]["value"] = 60.0
    (section,) = (s for s in report_sections(changed) if s.title == "Where Morse does not win")
    assert section.text == ()
    worse = {row[2] for row in section.tables[0].rows if "PSNR" in row[1]}
    assert worse == {"5, 8, 12, 20, 30"}


def test_the_best_training_free_solver_is_named_at_each_budget(result):
    table = {row[0]: row[1:] for row in find_headline(result)[0].rows}
    assert table["best training-free solver: DPM++ 2M"] == table["DPM++ 2M"]
    changed = copy.deepcopy(result)
    for row in changed["rows"]:
        if row["label"] == "DDIM" and row["budget"] == 5:
            row["scores"]["frechet"]["value"] = 0.25
    axis = headline_axes(changed)[0]
    assert best_training_free_row(changed, axis, 5)["label"] == "DDIM"
    first = quality_table(changed, axis, [5, 8]).rows[0]
    assert first == ("best training-free solver", "0.25 ± 0.10 (DDIM)", "1.18 ± 0.06 (DPM++ 2M)")


def test_of_many_morse_methods_those_with_most_wins_are_claimed(result):
    rows, speedups = list(result["rows"]), list(result["speedups"])
    for i in (3, 4):
        name = f"Morse-DDIM r{i}"
        rows += [r | {"label": name} for r in rows if r["label"] == "Morse-DDIM r2"]
        speedups += [e | {"method": name} for e in speedups if e["method"] == "Morse-DDIM r2"]
    changed = result | {"rows": rows, "speedups": speedups}
    claims = find_claims(changed)
    assert len(claims) == 2 * 3 and next(iter(claims))[0] == "Morse-DPM++ 2M r1.75"
    assert "These 3 of 4 Morse methods win most" in all_text(changed)


def test_speedups_have_intervals_and_every_status(result):
    cells = find(
        result, "Matched-quality speed-ups", "PSNR to the reference, cost in LSD, over the"
    )
    assert cells["Morse-DPM++ 2M r1.75"]["5"] == "1.60× [1.57, 1.64]"
    assert cells["Morse-DPM++ 2M r1.75"]["20"] == "saturated"
    assert cells["Morse-DPM++ 2M r1.75"]["30"] == "out of range"
    single = find(
        result,
        "Matched-quality speed-ups",
        "Fréchet distance to real images, cost in LSD, over each",
    )
    assert single["Morse-DDIM r2"]["5"] == "1.90× [1.87, 1.94]"
    assert "out of range: worse than the baseline at its smallest budget" in all_text(result)
    claim = find_claims(result)
    assert claim["Morse-DPM++ 2M r1.75", "Same-noise PSNR"] == (
        "1.27–1.60× (3 of 5, surely 3)",
        "1.14–1.44× (3 of 5, surely 3)",
    )


def test_speedups_over_what_a_mixture_begins_too_have_a_table(result):
    begun = [
        entry | {"baseline": BEST_WITH_MIXTURE, "value": entry["value"] and entry["value"] / 2}
        for entry in result["speedups"]
        if entry["baseline"] == BEST_TRAINING_FREE
    ]
    changed = result | {"speedups": [*result["speedups"], *begun]}
    section, title = "Matched-quality speed-ups", "PSNR to the reference, cost in LSD, over the "
    cells = find(changed, section, title + BEST_WITH_MIXTURE)["Morse-DPM++ 2M r1.75"]
    assert cells["5"].startswith("0.80×") and cells["20"] == "saturated"
    assert find(changed, section, title + BEST_TRAINING_FREE) == find(result, section, title)


def test_a_speedup_without_interval_says_so(result):
    entry = next(e for e in result["speedups"] if e["axis"] == "psnr" and e["cost"] == "lsd")
    odd = entry | {"interval": None, "note": "no interval: 4.0% of the replicates lie outside"}
    changed = result | {"speedups": [odd]}
    cells = find(changed, "Matched-quality speed-ups", "PSNR")
    assert cells[entry["method"]]["5"] == "1.27× (no interval)"


def test_the_largest_factor_that_passed_is_lossless(result):
    cells = find(result, "Lossless factors", "PSNR")["Morse-DPM++ 2M r1.75"]
    assert list(cells.values()) == [
        "2× (δ 0.05)",
        "2× (δ 0.05)",
        "2× (δ 0.05)",
        "none (δ 0.05)",
        "none (δ 0.05)",
    ]
    text = all_text(result)
    assert "between this run's own 3 seeds: it comes from the run itself and was not fixed" in text
    untested = [e | {"lossless": None, "delta": None} for e in result["lossless"]]
    cells = find(result | {"lossless": untested}, "Lossless factors", "PSNR")
    assert set(cells["Morse-DPM++ 2M r1.75"].values()) == {"not tested"}


def test_where_margins_come_from_is_told(result):
    own = [entry | {"delta_from": "bootstrap"} for entry in result["lossless"]]
    given = [entry | {"axis": "ssim", "delta_from": "given"} for entry in result["lossless"]]
    text = all_text(result | {"lossless": own})
    assert "δ is the bootstrap's standard error of that solver's own figure" in text
    assert "lossless_delta" not in text
    text = all_text(result | {"lossless": own + given})
    assert "δ (Same-noise SSIM to the reference: 0.05) was fixed before anything" in text
    assert "δ (Same-noise PSNR to the reference) is the bootstrap's" in text
    assert "Of no use" not in text
    settings = result["settings"] | {"lossless_delta": ["psnr=1", "kernel=1"]}
    text = all_text(result | {"settings": settings})
    assert "Of no use is the margin given for kernel, which is not measured here" in text


def test_distances_of_one_seed_are_not_tested(result):
    """Nothing tells their margin, whatever an earlier version took for it."""
    name, other = "frechet_to_reference", "psnr"
    tests = [
        e | {"axis": a, "delta_from": "bootstrap"}
        for a in (name, other)
        for e in result["lossless"]
    ]
    one = result | {"lossless": tests, "settings": result["settings"] | {"seeds": [0]}}
    text = all_text(one)
    assert "Not tested: Fréchet" in text and "give several --seeds, or --lossless_delta" in text
    assert find(one, "Lossless factors", "PSNR")
    given = one | {"lossless": [e | {"delta_from": "given"} for e in tests]}
    assert find(given, "Lossless factors", "to the reference's images")
