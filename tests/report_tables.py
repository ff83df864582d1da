"""Finds the tables of a report."""

from morse.evaluation.report.markdown import to_markdown
from morse.evaluation.report.sections import report_sections


def tables_of(result):
    """Every table of the report: (section's title, table)."""
    for section in report_sections(result):
        for table in (*section.tables, *section.folded):
            yield section.title, table


def find(result, section, words):
    (table,) = (t for title, t in tables_of(result) if title == section and words in t.title)
    return {row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}


def find_headline(result):
    return [t for title, t in tables_of(result) if title == "Quality at each budget"][:2]


def find_claims(result):
    rows = [row for title, table in tables_of(result) if title == "In short" for row in table.rows]
    return {row[:2]: row[2:] for row in rows}


def all_text(result):
    return to_markdown("", "", report_sections(result), {})
