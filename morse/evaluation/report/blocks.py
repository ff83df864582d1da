"""The blocks that a report is made of, before they become Markdown or HTML."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        title: What it shows.
        header: One cell a column.
        rows: As many cells each as `header`.
        strong: Names of rows to set in bold.
        num_text: So many first columns hold words, the others figures.
        note: Below it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[str] = frozenset()
    num_text: int = 1
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: Its heading.
        text: Paragraphs.
        tables: What everybody should see.
        folded: Tables for a closer look; a page may fold them away.
        code: A command line.
        figures: Names of figures that belong here; a report that has them places them.
    """

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple[Table, ...] = ()
    code: str = ""
    figures: tuple[str, ...] = ()

    @property
    def anchor(self) -> str:
        """The heading as a link's target: lower-case words joined by hyphens."""
        words = "".join(c if c.isalnum() else " " for c in self.title.lower()).split()
        return "-".join(words)


def budget_matrix(
    title: str,
    names: Iterable[str],
    budgets: Sequence[float],
    cell: Callable[[str, float], str],
) -> Table:
    """Return a table with a line a name and a column a budget, without empty lines."""
    lines = ((name, *(cell(name, budget) for budget in budgets)) for name in names)
    kept = tuple(line for line in lines if any(line[1:]))
    filled = tuple(tuple(text or "–" for text in line) for line in kept)
    return Table(title, ("method, at LSD", *(f"{budget:g}" for budget in budgets)), filled)
