"""README, the figures' page and the committed results agree."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from report_fixtures import full_result
from report_older import without_errors

from eval import readme_table
from eval.pages import marks
from eval.readme_table import (
    PAGES,
    PLANNED,
    TABLES,
    make_factors,
    make_speeds,
    make_table,
    shown_budgets,
    update,
)
from morse.cli import parse_config
from morse.evaluation.bench.methods import BEST_TRAINING_FREE, BEST_WITH_MIXTURE
from morse.evaluation.demo import DemoConfig
from morse.evaluation.stats.curves import STATUS, Place

ROOT, MODULE = Path(__file__).parents[1], "eval.readme_table"


def test_the_tables_are_those_of_the_committed_results():
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    for name in TABLES:
        assert all(sum(text.count(mark) for text in texts) == 1 for mark in marks(name, MODULE))
    assert [update(text) for text in texts] == texts


def anchors(page):
    """Give GitHub's anchors of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


OTHERS = ("eval/results/NOTES.md", "training/README.md", "docs/guide.md")
LINKED = [*PAGES, *(ROOT / page for page in OTHERS)]


def test_links_into_pages_meet_headings():
    links = [
        (page, page.parent / target if target else page, anchor)
        for page in [*LINKED, *ROOT.glob("morse/assets/*/README.md")]
        for target, anchor in re.findall(
            r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")
        )
    ]
    assert links
    assert [link for link in links if link[2] not in anchors(link[1])] == []


@pytest.mark.parametrize("page", LINKED)
def test_links_and_pictures_are_there(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert targets
    assert not [target for target in targets if not (page.parent / target).exists()]
    for target in targets:
        if target.endswith(".png"):
            with Image.open(page.parent / target) as picture:
                picture.verify()


def test_how_the_readmes_picture_was_made_is_told():
    text = PAGES[1].read_text(encoding="utf-8")
    command = re.search(r"`morse (demo .*)`, copied to `docs/fashion_mnist_demo\.png`", text)[1]
    config = parse_config(DemoConfig, command.split()[1:])
    assert (config.lsd, config.speed_ratio) == ((5,), 6)
    with Image.open(ROOT / "docs/fashion_mnist_demo.png") as picture:
        # The reference, and each of three solvers bare and with Morse at each budget.
        rows = 1 + 6 * len(config.lsd)
        assert (picture.format, picture.height) == ("PNG", 66 * rows) and picture.width > 500


def test_a_changed_figure_changes_the_table(monkeypatch):
    result = full_result()
    monkeypatch.setattr(readme_table, "TABLES", {"table": lambda: make_table(result)})
    begin, end = marks("table", MODULE)
    text = f"before\n{begin}\n{make_table(result)}\n{end}\nafter"
    assert update(text) == text
    result["rows"][3]["scores"]["frechet"]["value"] += 0.1
    assert update(text) != text
    assert update(text).startswith("before\n") and update(text).endswith("\nafter")


def test_the_table_has_training_free_solvers_morse_and_controls():
    lines = make_table(full_result()).splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert names == [
        "DDIM",
        "DPM++ 2M",
        "**Morse-DDIM r2**",
        "**Morse-DPM++ 2M r1.75**",
        "Reuse-DPM++ 2M r1.75",
    ]
    assert "| 5.20 ± 0.10, 22.6 ± 0." in lines[2]
    older = make_table(without_errors(full_result()))
    assert "| 5.20, 22.6 |" in older
    assert older.endswith("\n\n† measured on AMD EPYC, 2 threads, float64")
    assert "†" in next(line for line in older.splitlines() if line.startswith("| Reuse"))


def test_guidance_has_a_column_and_its_rows_together():
    result = full_result()
    for row in result["rows"]:
        row["guidance_scale"] = 3.0
    result["rows"] += [row | {"guidance_scale": 1.0} for row in result["rows"]]
    lines = make_table(result, names=("DDIM", "Morse-DDIM r2")).splitlines()
    assert lines[0].startswith("| guidance | ") and lines[1].count("---") == lines[0].count("|") - 1
    cells = [line.split(" | ")[:2] for line in lines[2:6]]
    assert cells == [
        ["| 1", "DDIM"],
        ["| 1", "**Morse-DDIM r2**"],
        ["| 3", "DDIM"],
        ["| 3", "**Morse-DDIM r2**"],
    ]


def test_speeds_have_what_their_quartiles_allow():
    entry = {"batch_size": 1, "speed_ratio": 5.0}
    entry |= {"dash_seconds": [0.9, 1.0, 1.2], "dot_seconds": [0.15, 0.2, 0.3]}
    kinds = ((True, "eager"), (False, "eager"), (True, "compiled"))
    lines = make_speeds([entry | {"merged": m, "mode": mode} for m, mode in kinds]).splitlines()
    assert lines[2] == "| 1 |" + " 5.0 (3.0–8.0) |" * 3


def test_factors_have_an_interval_or_a_bound():
    entry = {"method": PLANNED, "baseline": "DPM++ 2M", "axis": "psnr", "cost": "lsd", "budget": 8}
    entry |= {"status": "measured", "value": 2.0, "interval": [1.5, 2.25], "spent": 8.0}
    entry |= {"note": "", "replicates_outside": 79}
    bare = {"kind": "baseline", "label": "DPM++ 2M", "lsd": 30.0, "scores": {"psnr": {"value": 9}}}
    result = {
        "settings": {"num_replicates": 80},
        "axes": full_result()["axes"],
        "rows": [
            bare,
            bare | {"lsd": 100.0, "scores": {"psnr": None}},  # the reference
            bare | {"kind": "morse", "lsd": 50.0},
        ],
        "speedups": [
            entry,
            entry | {"budget": 12, "spent": 12.0, "status": "saturated"},
            entry | {"budget": 4, "status": "out of range"},
            entry | {"cost": "seconds", "value": 9.0},
            entry | {"guidance_scale": 3.0, "interval": None},
        ],
    }
    assert make_factors({"pixels": result}, ("DPM++ 2M",)).splitlines()[2:] == [
        "| DPM++ 2M | pixels | out of range | 2.00 (1.50–2.25) | over 2.50 |",
        "| DPM++ 2M | pixels, guidance 3 |  | 2.00 |  |",
    ]
    result["rows"].append(bare | {"kind": "mixture", "lsd": 36.0})
    saturated = entry | {"baseline": BEST_WITH_MIXTURE, "spent": 12.0, "status": "saturated"}
    result["speedups"] = [saturated, saturated | {"budget": 14, "replicates_outside": 60}]
    assert make_factors({"pixels": result}, (BEST_WITH_MIXTURE,)).splitlines()[2] == (
        f"| {BEST_WITH_MIXTURE} | pixels | over 3.00 | over 3.00 (75%) |"
    )


def test_a_bound_is_of_the_baseline_itself():
    entry = {"method": PLANNED, "axis": "psnr", "cost": "lsd", "guidance_scale": 3.0, "note": ""}
    entry |= {"budget": 10, "spent": 10.0, "status": "saturated"}
    row = {"kind": "baseline", "scores": {"psnr": {"value": 9}}, "guidance_scale": 3.0}
    rows = [
        row | {"label": "DPM++ 2M", "lsd": 20.0},
        row | {"label": "DPM++ 2M", "lsd": 30.0, "scores": {"psnr": {"value": None}}},
        row | {"label": "DPM++ 2M", "lsd": 40.0, "guidance_scale": 1.0},
        row | {"label": "DDIM", "lsd": 50.0},
        row | {"label": "DDIM", "lsd": 60.0, "engaged": False},
    ]

    def find(baseline, **changes):
        result = {"axes": full_result()["axes"], "rows": rows, "settings": {"num_replicates": 0}}
        result["speedups"] = [entry | {"baseline": baseline} | changes]
        return make_factors({"text": result}, (baseline,)).splitlines()[2].split(" | ")[2]

    assert find("DPM++ 2M") == "over 2.00 |"
    assert find("DDIM") == find(BEST_TRAINING_FREE) == "over 5.00 |"
    # On a level stretch the baseline is as good, for less than its largest cost.
    assert find("DDIM", note=STATUS[Place.FLAT][1]) == "saturated |"


def test_what_is_not_finite_is_said_in_the_table():
    result = full_result()
    result["rows"][0]["scores"]["frechet"]["value"] = float("nan")
    assert "| not finite, 22.6 ± 0." in make_table(result)


def test_many_budgets_are_thinned_with_both_ends_kept():
    result = full_result()
    morse = next(row for row in result["rows"] if row["kind"] == "morse")
    result["rows"] = [morse | {"budget": n} for n in range(4, 13)]
    assert shown_budgets(result) == [4, 6, 7, 9, 10, 12]
    result["rows"] = [morse]
    assert shown_budgets(result) == [5]


@pytest.mark.parametrize("name", ["morse/assets", "eval/results"])
def test_committed_json_names_no_private_paths(name):
    for path in (ROOT / name).rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        json.loads(text)
        assert "/home/" not in text and "/root/" not in text and "/tmp/" not in text


@pytest.mark.parametrize("name", ["fashion_mnist", "fashion_mnist_text"])
def test_the_embedded_models_are_small(name):
    folder = ROOT / "morse/assets" / name
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 15e6
