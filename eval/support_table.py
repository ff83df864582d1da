"""Redo the guide's table of what works from the tests that show it.

`python -m eval.support_table`

A test says what it shows with `@pytest.mark.supports("Pipelines", "StableDiffusionPipeline")`; the
first word is the table's row.
"""

import contextlib
import io
from collections.abc import Iterable

import pytest

from eval.pages import ROOT, marks, replace_between
from morse.evaluation.report.markdown import pipe_table

GUIDE = ROOT / "docs/guide.md"
BEGIN, END = marks("support", "eval.support_table")
# Row of the table -> its text; the marks use the keys.
ROWS = {
    "pipeline": "Pipelines, with a weight-shared Dot",
    "pipeline, own Dot": "Pipelines, with a Dot of your own",
    "denoiser": "Weight-shared Dots for",
    "scheduler": "Schedulers",
    "training": "`train_dot.py` for",
    "interplay": "Together with",
}


class _Collector:
    """A pytest plugin that keeps what tests are marked with and runs none of them."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.items = list(items)


def read_marks(items: Iterable[pytest.Item]) -> dict[str, list[str]]:
    """Return what tests show, by row of the table, sorted.

    Raises:
        ValueError: If a mark names a row that the table does not have.
    """
    found: set[tuple[str, str]] = set()
    for item in items:
        for mark in item.iter_markers("supports"):
            row, *names = mark.args
            if row not in ROWS:
                raise ValueError(f"{item.nodeid} supports {row!r}; rows are {list(ROWS)}")
            found.update((row, name) for name in names)
    return {row: sorted(name for r, name in found if r == row) for row in ROWS}


def collect_support() -> dict[str, list[str]]:
    """Collect all tests and return what they show, as `read_marks` does.

    Raises:
        RuntimeError: If the tests cannot be collected.
    """
    collector, output = _Collector(), io.StringIO()
    with contextlib.redirect_stdout(output):
        options = ["--collect-only", "-q", "-p", "no:cacheprovider", str(ROOT / "tests")]
        status = pytest.main(options, plugins=[collector])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"the tests cannot be collected:\n{output.getvalue()}")
    return read_marks(collector.items)


def make_table(support: dict[str, list[str]]) -> str:
    """Return the table as Markdown, without rows that have nothing."""
    rows = [(ROWS[row], ", ".join(names)) for row, names in support.items() if names]
    return pipe_table(("", "shown by tests"), rows, "|---|---|")


def main() -> None:
    """Rewrite the guide."""
    text = GUIDE.read_text(encoding="utf-8")
    table = make_table(collect_support())
    GUIDE.write_text(replace_between(text, BEGIN, END, table), encoding="utf-8")


if __name__ == "__main__":
    main()
