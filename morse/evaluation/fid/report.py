"""The printed table of `morse eval fid`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_result(result: dict[str, object]) -> None:
    """Print a result of `measure`: its table, what it was measured with, and every warning."""
    from rich.console import Console

    console = Console()
    if any(row["scores"] for row in result["rows"]):
        table = _table(result)
        wide = console.options.update(width=1000)
        # A terminal too narrow wraps lines; it must not cost digits.
        width = max(console.width, console.measure(table, options=wide).maximum)
        Console(width=width).print(table)
        for name, axis in result["axes"].items():
            text = f"{axis['title']}: {axis['better']} is better{_subsets(result, name)}"
            console.print(text, highlight=False)
    extractor, real = result["extractor"], result["real"]
    if extractor is not None:
        console.print(
            f"extractor {extractor['extractor']}, weights' SHA-256 {extractor['sha256']}; resize: "
            f"{extractor['resize']}",
            highlight=False,
        )
    if real is not None:
        console.print(f"real images: {real['name']}, {_count(real['num_images'])}", highlight=False)
    size = result["settings"]["resolution"]
    if size and extractor is not None:  # fidelity is measured at the images' own size
        text = f"for their features images were brought to {size}x{size}, as in training"
        console.print(text, highlight=False)
    notes = [*result["warnings"], *(note for row in result["rows"] for note in row["notes"])]
    for note in dict.fromkeys(notes):
        console.print(note, style="yellow", highlight=False)


def _subsets(result: dict[str, object], axis: str) -> str:
    """Tell the sizes of the kernel distance's subsets, which are those asked for or fewer."""
    sizes = {row["kid_subset_size"] for row in result["rows"] if "kid_subset_size" in row}
    if axis != "kernel_distance" or not sizes:
        return ""
    return f", over subsets of {' and '.join(map(str, sorted(sizes)))} images"


def _count(num_images: int | None) -> str:
    return "of unknown number" if num_images is None else f"{num_images:,} images"


def _table(result: dict[str, object]) -> "Table":
    """Build a table with a line a row and a column an axis, values with standard errors."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("images", no_wrap=True)
    table.add_column("number", justify="right", no_wrap=True)
    for axis in result["axes"].values():
        table.add_column(_short(axis), justify="right", no_wrap=True)
    for row in result["rows"]:
        scores = [_cell(row["scores"].get(axis)) for axis in result["axes"]]
        number = row.get("num_images")
        table.add_row(row["label"], "?" if number is None else str(number), *scores)
    return table


def _short(axis: dict[str, str]) -> str:
    """Return a title that fits above a column; the whole one stands below the table."""
    title = axis["title"].partition(" (")[0]
    title = title.removeprefix("Same-noise ").removesuffix(" to the reference")
    return "\n".join([*title.split(), *filter(None, [axis["unit"]])])


def _cell(score: dict[str, float | None] | None) -> str:
    if score is None:
        return ""
    error = score["standard_error"]
    return f"{score['value']:.4g}" + (f" ± {error:.2g}" if error is not None else "")
