"""The report's blocks as Markdown (GitHub's flavour)."""

from collections.abc import Iterable, Mapping

from morse.evaluation.report.blocks import Section, Table


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
    parts = [f"# {_escape(title)}", _escape(subtitle)]
    for section in sections:
        parts.append(f"## {_escape(section.title)}")
        parts.extend(_escape(text) for text in section.text)
        if section.code:
            parts.append(f"```\n{section.code}\n```")
        for name in section.figures:
            if name in figures:
                parts.append(f"![{_escape(section.title)}]({figures[name]})")
        for table in section.tables:
            parts.extend([f"### {_escape(table.title)}", *_table(table)])
        for table in section.folded:
            summary = f"<details><summary>{_escape(table.title)}</summary>"
            parts.extend([summary, *_table(table), "</details>"])
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> list[str]:
    num_figures = len(table.header) - table.num_text
    lines = [table.header, ["---"] * table.num_text + ["--:"] * num_figures]
    for name, *cells in table.rows:
        shown = _escape(name)
        lines.append([f"**{shown}**" if name in table.strong else shown, *map(_escape, cells)])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return [text, *[_escape(table.note)] * bool(table.note)]


def _escape(text: str) -> str:
    """Keep a text from ending a cell or a line, or from being HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
