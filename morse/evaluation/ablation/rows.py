"""The rows of the ablation: what each changes about a plain Dot, and what it is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from morse.training.config import TrainDotConfig

PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of Dot.

    Attributes:
        name: Of the row.
        method: Of which it is a row or a control.
        description: In one line.
        overrides: Of `TrainDotConfig`.
        control: The row that differs from it in nothing but what the method claims.
        same_size_as: The row whose own parameters other than zero it has as many of, as nearly as
            widths allow; its sizes are found when that row is trained.
        shrink_lora: Whether these sizes include the LoRA's rank, and not only the blocks' widths.
    """

    name: str
    method: str
    description: str
    overrides: Mapping[str, object] = field(default_factory=dict)
    control: str = PLAIN
    same_size_as: str | None = None
    shrink_lora: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Name the rows that this one is compared with or sized by."""
        return tuple(name for name in (PLAIN, self.control, self.same_size_as) if name is not None)


ROWS = (Row(name=PLAIN, method=PLAIN, description="a Dot without any of the methods"),)


def select_rows(names: Sequence[str], rows: Sequence[Row] = ROWS) -> list[Row]:
    """Return the named rows, and what they are compared with, in the table's order.

    Args:
        names: Rows, methods (all rows of each), or "all".
        rows: The table.

    Raises:
        ValueError: If no row or method has a name, or a row sets what `TrainDotConfig` lacks.
    """
    by_name = {row.name: row for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows))
    unknown = [name for name in names if name not in {"all", *by_name, *methods}]
    if unknown:
        raise ValueError(
            f"methods has {unknown}; choose all, of the methods {methods}, or of the rows "
            f"{sorted(by_name.keys() - set(methods))}"
        )
    chosen = {row.name for row in rows if {"all", row.name, row.method} & set(names)}
    waiting = [*chosen, PLAIN]
    while waiting:
        row = by_name[waiting.pop()]
        chosen.add(row.name)
        waiting += [name for name in row.needs if name not in chosen]
    selected = [row for row in rows if row.name in chosen]
    for row in selected:
        check_fields(row)
    return selected


def check_fields(row: Row) -> None:
    """Raise `ValueError`, naming the row, if it sets what `TrainDotConfig` lacks."""
    missing = sorted(row.overrides.keys() - {option.name for option in fields(TrainDotConfig)})
    if missing:
        raise ValueError(
            f"row {row.name!r} sets {missing}, which TrainDotConfig does not have; leave it away"
        )
