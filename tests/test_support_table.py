"""README's table of what works is that of the tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from eval.readme_table import replace_between
from eval.support_table import BEGIN, END, make_table

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_table_in_readme_is_that_of_the_tests():
    code = "from eval.support_table import *; print(make_table(collect_support()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert replace_between(readme, BEGIN, END, done.stdout.strip()) == readme


def test_rows_without_names_are_left_out():
    table = make_table({"pipeline": ["APipeline", "BPipeline"], "denoiser": []})
    assert table.splitlines()[2:] == [
        "| Pipelines, with a weight-shared Dot | APipeline, BPipeline |"
    ]
