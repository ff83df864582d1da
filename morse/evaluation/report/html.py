"""The report's blocks as one HTML page that needs nothing from elsewhere, not even scripts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from morse.evaluation.report.blocks import Section, Table
from morse.evaluation.report.style import CSS

# Even a mistake in this file could then fetch nothing and run nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Picture:
    """An image of the page.

    Attributes:
        uri: Its data: URI.
        alt: What it shows, in words.
        caption: Beside or below it; "" for none.
        width: CSS pixels; None fills its place.
    """

    uri: str
    alt: str
    caption: str = ""
    width: int | None = None


def to_html(
    title: str,
    subtitle: str,
    sections: Iterable[Section],
    figures: Mapping[str, Sequence[Picture]],
) -> str:
    """Return the page.

    Args:
        title: Its heading.
        subtitle: A line below that.
        sections: In order.
        figures: Pictures for each name in `Section.figures`; names without any are skipped.
    """
    body = "\n".join(_section(section, figures) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="note">{escape(subtitle)}</p>
{body}
</main>
</body>
</html>
"""


def _section(section: Section, figures: Mapping[str, Sequence[Picture]]) -> str:
    parts = [f'<section id="{escape(section.anchor)}">', f"<h2>{escape(section.title)}</h2>"]
    parts.extend(f"<p>{escape(text)}</p>" for text in section.text)
    if section.code:
        parts.append(f'<pre tabindex="0"><code>{escape(section.code)}</code></pre>')
    parts.extend(_table(table) for table in section.tables)
    for name in section.figures:
        if figures.get(name):
            shown = "\n".join(_picture(picture) for picture in figures[name])
            parts.append(f'<div class="{escape(name)}">\n{shown}\n</div>')
    parts.extend(
        f"<details><summary>{escape(table.title)}</summary>{_table(table)}</details>"
        for table in section.folded
    )
    return "\n".join([*parts, "</section>"])


def _picture(picture: Picture) -> str:
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    width = f' width="{picture.width}"' if picture.width else ""
    image = f'<img alt="{escape(picture.alt)}" src="{escape(picture.uri)}"{width}>'
    return f"<figure>{image}{caption}</figure>"


def _table(table: Table) -> str:
    kinds = [' class="text"' if i < table.num_text else "" for i in range(len(table.header))]
    titles = zip(kinds, table.header, strict=True)
    head = "".join(f'<th scope="col"{kind}>{escape(cell)}</th>' for kind, cell in titles)
    lines = []
    for name, *cells in table.rows:
        strong = ' class="strong"' if name in table.strong else ""
        shown = zip(kinds[1:], cells, strict=True)
        rest = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in shown)
        lines.append(f'<tr{strong}><th scope="row" class="text">{escape(name)}</th>{rest}</tr>')
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="wide" role="region" aria-label="{escape(table.title)}" tabindex="0">'
        f"<table><caption><span>{escape(table.title)}</span></caption><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{chr(10).join(lines)}</tbody></table></div>{note}"
    )
