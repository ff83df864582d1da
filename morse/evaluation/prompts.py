"""Prompts as commands take them: texts, or a file of them."""

import os
import re
from pathlib import Path

PROMPTS_HELP = (
    "for a text pipeline: texts, or one file of them, one a line; image i takes prompt i modulo all"
)


def read_prompts(values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the prompts that were asked for.

    Args:
        values: One name of a file that has a prompt on each line, empty lines left out; anything
            else are the prompts themselves.

    Raises:
        ValueError: If the file has no prompt, or one value looks like a file but there is none.
    """
    if len(values) != 1:
        return tuple(values)
    (value,) = values
    if not os.path.isfile(value):  # unlike a Path's method it takes texts of any length
        if _looks_like_file(value):
            raise ValueError(
                f"prompts is {value}, which does not exist; if this is no file's name but a "
                "prompt, write it into a file"
            )
        return (value,)
    lines = Path(value).read_text(encoding="utf-8").splitlines()
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"prompts is {value}, which has no prompt; write one a line")
    return prompts


def _looks_like_file(value: str) -> bool:
    """Tell names of files, also mistyped ones, from prompts, which mostly have spaces."""
    if value.endswith(".txt"):
        return True
    named = any(mark in value for mark in ("/", "\\")) or re.search(r"\.\w{1,8}$", value, re.ASCII)
    return bool(named) and not any(map(str.isspace, value))
