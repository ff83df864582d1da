"""The report's blocks as Markdown (GitHub's flavour)."""

import re
from collections.abc import Iterable, Mapping

from morse.evaluation.report.blocks import Section, Table

# What means something within a line. Not so a `_` inside of a word, nor brackets unless they make
# a link, an image or a footnote: commands and intervals stay readable in the file.
SPECIAL = re.compile(r"[\\`*~|]|(?<![^\W_])_|_(?![^\W_])|\](?=[\[(:])")
# What would make a paragraph a heading, a quotation or a list.
LEADING = re.compile(r"^(?:(?=[#>+-])|(\d+)(?=[.)](?:\s|$)))")


def to_markdown(
    title: str, subtitle: str, sections: Iterable[Section], figures: Mapping[str, str]
) -> str:
    """Return the whole document.

    Args:
        title: Its first heading.
        subtitle: A line below that.
        sections: In order.
        figures: An image's file for each name in `Section.figures`; names without one are skipped.
    """
    parts = [f"# {_escape(title)}", _paragraph(subtitle)]
    for section in sections:
        parts.append(f"## {_escape(section.title)}")
        parts.extend(_paragraph(text) for text in section.text)
        if section.code:
            longest = max(map(len, re.findall("`+", section.code)), default=0)
            fence = "`" * max(3, longest + 1)
            parts.append(f"{fence}\n{section.code}\n{fence}")
        for name in section.figures:
            if name in figures:
                parts.append(f"![{_escape(section.title)}]({figures[name]})")
        for table in section.tables:
            parts.extend([f"### {_escape(table.title)}", *_table(table)])
        for table in section.folded:
            # Within HTML a backslash would be shown.
            summary = f"<details><summary>{_html(table.title)}</summary>"
            parts.extend([summary, *_table(table), "</details>"])
    return "\n\n".join(parts) + "\n"


def pipe_table(header: Iterable[str], rows: Iterable[Iterable[str]], rules: str) -> str:
    """Join cells, which may hold Markdown, to a table.

    Args:
        header: The first line's; an empty one takes a single space.
        rows: The other lines'.
        rules: The line below the header, such as "|---|--:|".
    """
    first = _line(header).replace("|  |", "| |")
    return "\n".join([first, rules, *map(_line, rows)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(table: Table) -> list[str]:
    num_figures = len(table.header) - table.num_text
    rows = []
    for name, *cells in table.rows:
        shown = _escape(name)
        rows.append([f"**{shown}**" if name in table.strong else shown, *map(_escape, cells)])
    rules = _line(["---"] * table.num_text + ["--:"] * num_figures)
    text = pipe_table(map(_escape, table.header), rows, rules)
    return [text, *[_paragraph(table.note)] * bool(table.note)]


def _paragraph(text: str) -> str:
    """Escape a text that begins a line."""
    return LEADING.sub(r"\1\\", _escape(text))


def _escape(text: str) -> str:
    """Keep a text from ending a cell or a line, and from being Markdown or HTML."""
    return _html(SPECIAL.sub(r"\\\g<0>", text))


def _html(text: str) -> str:
    """Keep a text from ending a line, and from being HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
