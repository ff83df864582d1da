"""The report says what the JSON says, and nothing that it does not."""

import copy
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from report_fixtures import BUDGETS, METHODS, bare_result, full_result
from report_older import without_errors
from report_tables import all_text, find, find_headline, tables_of

from morse.evaluation.report.curves import quality_panels
from morse.evaluation.report.data import read_result
from morse.evaluation.report.render import markdown_report, render
from morse.evaluation.report.scores import Score, decimals_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def result():
    return full_result()


def test_files_are_complete_and_the_same_in_every_run(result, tmp_path):
    names = ["benchmark.png", "benchmark_grid.png", "benchmark.md", "benchmark.html"]
    files = render(result, tmp_path / "new" / "folder")
    assert [file.name for file in files] == names
    assert sorted(path.name for path in files[0].parent.iterdir()) == sorted(names)
    assert Image.open(files[0]).size[0] == 1210
    again = render(json.loads(json.dumps(result)), tmp_path)
    for file, other in zip(files, again, strict=True):
        assert file.read_bytes() == other.read_bytes()


def test_headline_tables_show_a_distribution_and_a_fidelity_axis(result):
    titles = [table.title for table in find_headline(result)]
    assert titles == [
        "Fréchet distance (Fashion-MNIST classifier features) to real images, lower is better",
        "Same-noise PSNR to the reference, dB, higher is better",
    ]
    for table in find_headline(result):
        assert table.header[1:] == tuple(map(str, BUDGETS))
        names = [row[0] for row in table.rows]
        kinds = [kind for _, kind, *_ in METHODS.values()]
        assert len(names) == 1 + len(kinds) and names[3].startswith("Morse-")
        assert table.strong == {"Morse-DDIM r2", "Morse-DPM++ 2M r1.75"}
    # The bare solvers' other budgets follow; the reference has no distance to itself.
    others = find(result, "Quality at each budget", "PSNR to the reference, dB, higher is better: ")
    assert others["DPM++ 2M"]["100"] == "reference" and others["DDIM"]["100"] == "46.00 ± 0.08"


def test_crowded_plots_keep_the_best_of_each_other_kind(result):
    reuse = [row for row in result["rows"] if row["kind"] == "reuse"]
    rows = list(result["rows"])
    for i in range(6):
        for row in reuse:
            score = row["scores"]["frechet"] | {
                "value": row["scores"]["frechet"]["value"] - 0.01 * i
            }
            scores = row["scores"] | {"frechet": score}
            rows.append(row | {"label": f"Reuse {i}", "scores": scores})
    (panel, *_) = quality_panels(result | {"rows": rows})
    labels = [curve.label for curve in panel.curves]
    assert "Reuse 5" in labels and sum(label.startswith("Reuse") for label in labels) == 1
    assert len(labels) == 4 + 2


def test_what_did_not_engage_is_listed_and_nowhere_else(result):
    for title, table in tables_of(result):
        names = [row[0] for row in table.rows]
        assert (title == "Methods that did not engage") == any("TeaCache" in name for name in names)
    assert "no step was skipped" in all_text(result)
    assert "changed no picture, or changed pictures and saved no time" in all_text(result)
    labels = {curve.label for panel in quality_panels(result) for curve in panel.curves}
    assert labels == {*METHODS}


def test_costs_stand_next_to_lsd(result):
    table = next(t for _, t in tables_of(result) if "time and memory at 5, 8" in t.title)
    row = next(row for row in table.rows if row[:2] == ("Morse-DDIM r2", "8"))
    assert dict(zip(table.header, row, strict=True)) == {
        "method": "Morse-DDIM r2",
        "budget": "8",
        "LSD": "7.75",
        "Dash + Dot": "7 + 4",
        "seconds": "7.2",
        "ms an image": "3.6",
        "images/s": "278",
        "peak memory, MiB": "1,242",
    }


def test_missing_figures_and_remarks_are_written_out(result):
    changed = copy.deepcopy(result)
    changed["not_measured"].append("Heun, 3 LSD: needs 5 evaluations")
    changed["rows"][1]["note"] = changed["rows"][2]["note"] = "3 images are not finite"
    changed["rows"][-2]["fallbacks"] = {"no clock": 4}
    text = all_text(changed)
    assert "DDIM at 200, 400 LSD; Heun (needs 5 evaluations) at 3 LSD." in text
    assert "3 images are not finite: DDIM at 8, 12 LSD." in text
    assert "Dash ran in Dot's place (no clock: 4): DeepCache-DDIM interval 3 at 30 LSD." in text


def test_errors_are_left_out_where_there_are_none(result, tmp_path):
    plain = without_errors(result)
    files = render(plain, tmp_path)
    text = (tmp_path / "benchmark.md").read_text()
    assert "±" not in text and not re.search(r"\[\d", text) and "None" not in text
    without_cuda = all_text(plain | {"device": "AMD EPYC, 2 threads"})
    assert "No peak memory: it is measured" in without_cuda and "No peak memory" not in text
    assert "MiB" not in text and "Lossless" not in text and "Pictures" not in text
    assert len(files) == 3
    for panel in quality_panels(plain):
        assert all(p.below == p.above == 0 for curve in panel.curves for p in curve.points)


def test_rows_from_another_device_are_marked(result):
    plain = without_errors(result)
    table = find_headline(plain)[0]
    cells = {row[0]: row[1:] for row in table.rows}
    assert all(cell.endswith(" †") for cell in cells["Reuse-DPM++ 2M r1.75"])
    assert not any("†" in cell for cell in cells["DDIM"])
    assert table.note == "† on AMD EPYC, 2 threads, float64."
    lsd, _, seconds, _ = quality_panels(plain)
    missing = {c.label for c in lsd.curves} - {c.label for c in seconds.curves}
    assert missing == {"Reuse-DPM++ 2M r1.75"}  # other machines' seconds are not comparable


def test_a_small_bootstrap_and_packages_are_told(result):
    def words(number):
        settings = result["settings"] | {"num_replicates": number}
        return all_text(result | {"settings": settings, "packages": {"tomesd": "0.1.3"}})

    assert "has 30 replicates, fewer than 1,000" in words(30) and "bootstrap has" not in words(1000)
    assert "There was no bootstrap" in words(0) and "python 3.12.3, tomesd 0.1.3." in words(0)


def test_unknown_kinds_come_last(result):
    row = next(row for row in result["rows"] if row["kind"] == "reuse")
    changed = result | {"rows": [row | {"kind": "new", "label": "New"}, *result["rows"]]}
    assert find_headline(changed)[0].rows[-1][0] == "New"
    assert quality_panels(changed)[0].curves[-1].label == "New"


def test_latency_alone_needs_no_rows(tmp_path):
    files = render(bare_result(), tmp_path)
    assert [file.name for file in files] == ["benchmark.md", "benchmark.html"]
    text = files[0].read_text()
    assert "| 16 | merged | compiled | 6.50 | 10 / 10.1 / 10.3 | 1.9 / 2 / 2.1 |" in text
    assert "comparisons" not in text


@pytest.mark.parametrize("part", [".", "controls", "leapfrog", "pfdiff", "planned"])
def test_committed_results_are_drawn(part, tmp_path):
    committed = read_result(ROOT / "eval/results/fashion_mnist" / part / "benchmark.json")
    text = markdown_report(committed)
    if part in (".", "planned"):  # of the oldest schema and of the newest, with their plots
        render(committed, tmp_path)
        assert (tmp_path / "benchmark.md").read_text("utf-8") == text
    for row in committed["rows"]:
        assert row["label"] in text
    assert committed["command"] in text


@pytest.mark.parametrize(
    ("scores", "decimals"),
    [
        ([Score(2.5, 0.08), Score(0.4, 0.04), None], 2),
        ([Score(2.5, 0.08), Score(0.4, 0.012)], 3),
        ([Score(250.0, 30.0)], 0),
        ([Score(0.412), Score(12.0)], 3),
        ([Score(0.0)], 2),
        ([], 2),
    ],
)
def test_decimals_fit_the_errors(scores, decimals):
    assert decimals_of(scores) == decimals


def test_thousandths_have_their_decimals():
    scores = [Score(2e-3, 5e-5), Score(1e-4, 3e-5)]
    assert (decimals_of(scores), decimals_of(scores, 6)) == (4, 5)


def test_bad_results_are_named(result, tmp_path):
    (tmp_path / "old.json").write_text('{"schema_version": 1}')
    with pytest.raises(ValueError, match="schema_version is 1"):
        read_result(tmp_path / "old.json")
    for content in ("no base64!", "aGVsbG8="):
        grid = {"seeds": [0], "rows": [{"label": "DDIM, 5 LSD", "png_base64": content}]}
        with pytest.raises(ValueError, match="'DDIM, 5 LSD' is no PNG"):
            render(result | {"grid": grid}, tmp_path / "report")
    assert not (tmp_path / "report").exists()
