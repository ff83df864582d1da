"""Single figures of the report: times and their spread, what is not finite, seeds left out."""

import copy
import json
import math

import pytest
from report_fixtures import BUDGETS, bare_result, full_result, paired_result
from report_tables import all_text, find, find_headline, tables_of

from morse.evaluation.report.curves import quality_panels
from morse.evaluation.report.render import markdown_report, render


def test_times_have_no_exponents():
    result = full_result()
    for row in result["rows"]:
        row |= {"seconds": 999.7, "peak_memory_mib": 999.6}
    result["settings"]["num_images"] = 810
    table = next(t for _, t in tables_of(result) if "time and memory at 5, 8" in t.title)
    for row in table.rows:
        assert row[4:] == ("1,000", "1,234", "0.81", "1,000")
    for row in result["rows"]:  # of several seeds, as an earlier version averaged them
        row["images_per_second"] *= 2
    assert next(t for _, t in tables_of(result) if t.title == table.title) == table
    slow = bare_result()
    slow["speed_ratios"][0]["dash_seconds"] = [0.9994, 0.99951, 1.234]
    assert "| 999 / 1,000 / 1,234 |" in all_text(slow)


def test_the_spread_of_batches_stands_beside_the_median():
    result = paired_result()
    cells = find(result, "What it costs", "Wall time, ms an image")
    # 250 images a batch of 8 / 4 seconds; bare solvers were not measured so, and keep the mean.
    assert cells["Morse-DDIM r2"]["8"] == "8 [7.2, 9.6]"
    assert cells["DDIM"]["8"] == "3.2"
    text = all_text(result)
    assert "The median of the first seed's full batches of 250 images, with their quartiles" in text
    table = next(t for _, t in tables_of(result) if "time and memory at 5, 8" in t.title)
    row = next(row for row in table.rows if row[:2] == ("Morse-DDIM r2", "8"))
    told = dict(zip(table.header, row, strict=True))
    assert told["ms an image (batches' median [quartiles])"] == "8 [7.2, 9.6]"
    assert told["seconds"] == "7.2" and "quartiles in brackets" not in all_text(full_result())
    others = next(t for _, t in tables_of(result) if "time and memory at 3, 4" in t.title)
    assert "ms an image" in others.header


def test_averages_of_evaluations_are_cut():
    result = full_result()
    result["rows"][-2] |= {"num_dash": 10 / 3, "num_dot": 4.0}
    assert "| 3.333 + 4 |" in all_text(result)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_said_and_stops_nothing(value, tmp_path):
    result = full_result()
    first, second, third = (row["scores"] for row in result["rows"][:3])
    first["frechet"]["value"] = first["psnr"]["value"] = value
    second["frechet"] |= {"standard_error": value, "interval": [value, value]}
    third["frechet"] |= {"standard_error": None, "interval": [0.1, value]}
    result = json.loads(json.dumps(result))  # Python's JSON has both
    render(result, tmp_path)
    cells = {row[0]: row[1:] for row in find_headline(result)[0].rows}
    assert cells["DDIM"][:3] == ("not finite", "2.27", "1.23")
    assert "nan" not in markdown_report(result) and "inf " not in markdown_report(result)
    drawn = {curve.label: curve for curve in quality_panels(result)[0].curves}["DDIM"]
    assert 5 not in {point.cost for point in drawn.points}
    assert all(point.above == 0 for point in drawn.points if point.cost in (8, 12))


def test_only_budgets_with_a_score_have_a_tick():
    result = full_result()
    distances, fidelity = quality_panels(result)[:2]
    assert distances.ticks == (3, 4, *(5, 6, 8, 10, 12, 15, 20, 30), 50, 100)
    for row in result["rows"]:
        if row["budget"] == 100:
            row["scores"]["psnr"] = None
    fidelity = quality_panels(result)[1]
    assert fidelity.ticks == distances.ticks[:-1]
    assert max(point.cost for curve in fidelity.curves for point in curve.points) == 50


def test_seeds_that_are_left_out_are_named():
    result = full_result()
    assert "is left out" not in all_text(result)
    result["seeds_left_out"] = [{"seed": 20000, "missing": 5}]
    text = markdown_report(result)
    assert "each of 2 seeds (0, 10000), batch 250. " in text
    assert "Seed 20000 is left out: 5 of its cells are missing." in text
    assert "2,000 images a point from each of 2 seeds" in text.splitlines()[2]
    result["seeds_left_out"].append({"seed": 10000, "missing": 1})
    assert "Seed 10000 is left out: 1 of its cells is missing." in all_text(result)


def test_fewer_images_against_the_reference_are_told():
    result = full_result()
    assert "biased" not in markdown_report(result)
    result["settings"]["num_reference_images"] = 3000  # more than there are
    assert "against the reference" not in markdown_report(result)
    result["settings"]["num_reference_images"] = 100
    text = markdown_report(result)
    assert "2,000 images a point (100 against the reference)" in text.splitlines()[2]
    assert "distances to the reference are of the first 100 of each seed's. Fréchet" in text
    assert "biased upwards" in text


def test_seeds_are_left_out_at_a_guidance_scale():
    result = copy.deepcopy(full_result())
    for entry in (*result["rows"], *result["speedups"], *result["lossless"]):
        entry["guidance_scale"] = 3.0
    own = {key: result.pop(key) for key in ("speed_ratio", "speed_ratios", "not_measured", "grid")}
    left_out = {"seeds_left_out": [{"seed": 0, "missing": 2}]}
    result |= {"schema_version": 3, "guidance": [own | left_out | {"guidance_scale": 3.0}]}
    text = all_text(result)
    assert text.count("Seed 0 is left out at guidance 3: 2 of its cells are missing.") == 1
    assert set(map(str, BUDGETS)) <= set(find_headline_budgets(result))


def find_headline_budgets(result):
    return next(t for title, t in tables_of(result) if title.startswith("Quality at")).header
