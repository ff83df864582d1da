"""The guide's table of what works is that of the tests."""

from pathlib import Path

import pytest

from eval.pages import replace_between
from eval.support_table import BEGIN, END, GUIDE, make_table, read_marks

ROOT = Path(__file__).parents[1]


def test_the_table_in_the_guide_is_that_of_the_tests(request):
    items = request.session.items
    if {item.path for item in items} != set((ROOT / "tests").glob("test_*.py")):
        pytest.skip("needs all tests to be collected")
    guide = GUIDE.read_text(encoding="utf-8")
    assert replace_between(guide, BEGIN, END, make_table(read_marks(items))) == guide


def test_rows_without_names_are_left_out():
    table = make_table({"pipeline": ["APipeline", "BPipeline"], "denoiser": []})
    assert table.splitlines()[2:] == [
        "| Pipelines, with a weight-shared Dot | APipeline, BPipeline |"
    ]
