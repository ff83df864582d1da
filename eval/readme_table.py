"""Redo README's table from the committed benchmark: `python -m eval.readme_table`."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- begin table: python -m eval.readme_table -->", "<!-- end table -->"


def make_table() -> str:
    """Return Fréchet distance and PSNR of every measured method at Morse's budgets."""
    result = json.loads((ROOT / "eval/results/fashion_mnist/benchmark.json").read_text("utf-8"))
    budgets = result["settings"]["lsd"]
    rows = {(row["label"], row["budget"]): row for row in result["rows"]}
    lines = [f"| Fréchet distance, PSNR in dB, at LSD | {' | '.join(map(str, budgets))} |"]
    lines.append("|---" * (len(budgets) + 1) + "|")
    for label in dict.fromkeys(label for label, _ in rows):
        cells = [_cell(rows.get((label, budget))) for budget in budgets]
        name = f"**{label}**" if label.startswith("Morse") else label
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, float] | None) -> str:
    if row is None:
        return "not measured"
    frechet, error = row["frechet"], row["frechet_standard_error"]
    return f"{frechet:.2f} ± {error:.2f}, {row['psnr']:.1f}"


def update(text: str) -> str:
    """Return README's text with the table between its marks redone."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{make_table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(update(readme.read_text(encoding="utf-8")), encoding="utf-8")
