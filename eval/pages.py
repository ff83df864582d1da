"""The pages whose tables are made by programs, between marks."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def marks(name: str, module: str) -> tuple[str, str]:
    """Return the lines before and after what `python -m module` writes into a page."""
    return f"<!-- begin {name}: python -m {module} -->", f"<!-- end {name} -->"


def replace_between(text: str, begin: str, end: str, content: str) -> str:
    """Return a text with what stands between two marks replaced."""
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"
