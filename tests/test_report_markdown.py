"""The report's Markdown shows any text as it is; the committed reports are what is drawn now."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_fixtures import paired_result

from morse.evaluation.report.blocks import Section, Table
from morse.evaluation.report.data import read_result
from morse.evaluation.report.markdown import to_markdown
from morse.evaluation.report.render import markdown_report, render

ROOT = Path(__file__).parents[1]
# Each would be something else than its characters: emphasis, code, links, ends of cells, HTML.
HOSTILE = (
    "*a* _b_ __c__ ~d~ ~~e~~ `f` a*b*c snake_case --speed_ratio",
    "[a](https://b.c) ![a](b.png) [a][b] [a]: b [^1]: c [1.31, 1.37] ]",
    "a|b <img src=x> & &lt; \\ \\* \\| \\\\ C:\\dir\\",
)
LEADING = (
    "# a",
    "> a",
    "- a",
    "+ a",
    "1. a",
    "12) a",
    "* a",
    "---",
    "```",
    "1.",
    "-",
    "_a_",
    "2.5",
)


def test_markdown_keeps_hostile_text_in_its_cell():
    table = Table(
        "T", ("method", "5"), (("a|b\n<img src=x>", "1"),), frozenset(["a|b\n<img src=x>"])
    )
    text = to_markdown("t", "s", [Section("S", ("x & y",), (table,), (table,))], {})
    assert text.count("| **a\\|b &lt;img src=x>** | 1 |") == 2
    assert "x &amp; y" in text and "<details><summary>T</summary>" in text


def read_texts(markdown):
    """The text of each heading, paragraph and cell, with other elements of it as tags."""
    texts, markdown_it = [], pytest.importorskip("markdown_it")
    html = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)
    for element in re.findall(r"<(?:h\d|p|td|th|li)\b[^>]*>(.*?)</(?:h\d|p|td|th|li)>", html):
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attrs: texts.append(f"<{tag}>")
        parser.handle_data = texts.append
        parser.feed(element)
        parser.close()
    return texts


@pytest.mark.parametrize("text", [*HOSTILE, *LEADING])
def test_any_text_is_shown_as_it_is(text):
    shown = " ".join(text.split())
    table = Table("T", ("method", text), ((text, "1"), ("-1.5", text)), note=text)
    markdown = to_markdown("t", text, [Section("S", (text,), (table,))], {})
    assert read_texts(markdown) == [
        *("t", shown, "S", shown, "T", "method", shown, shown, "1", "-1.5", shown, shown)
    ]


def test_a_command_cannot_close_its_fence():
    code = "echo ```\n```\n# no heading\n````"
    text = to_markdown("t", "s", [Section("S", code=code)], {})
    assert f"`````\n{code}\n`````" in text
    assert "\n```\na\n```\n" in to_markdown("t", "s", [Section("S", code="a")], {})


def test_a_summary_is_html_in_which_nothing_is_escaped_by_a_backslash():
    table = Table("a|b *c* <d>", ("method",), (("e",),))
    text = to_markdown("t", "s", [Section("S", folded=(table,))], {})
    assert "<summary>a|b *c* &lt;d></summary>" in text


def test_what_is_written_is_what_is_drawn_without_figures(tmp_path):
    render(paired_result(), tmp_path)
    text = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert text == markdown_report(paired_result())
    assert "(benchmark.png)" in text and "(benchmark_grid.png)" in text


def test_committed_reports_are_those_of_the_committed_results():
    """For the others, `morse bench --from JSON --output_dir ITS_FOLDER` draws them anew."""
    different, number = [], 0
    for file in sorted((ROOT / "eval/results").rglob("benchmark.json*")):
        result = read_result(file)
        if result["schema_version"] == 4:
            number += 1
            committed = (file.parent / "benchmark.md").read_text(encoding="utf-8")
            different += [file.parent.name] * (committed != markdown_report(result))
    assert number > 2 and different == []
