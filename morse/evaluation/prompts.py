"""Prompts as commands take them: texts, or a file of them."""

import os
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
        ValueError: If the file has no prompt, or one value ends like a file but there is none.
    """
    if len(values) != 1:
        return tuple(values)
    (value,) = values
    if not os.path.isfile(value):  # unlike a Path's method it takes texts of any length
        if value.endswith(".txt"):
            raise ValueError(f"prompts is {value}, which does not exist")
        return (value,)
    lines = Path(value).read_text(encoding="utf-8").splitlines()
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"prompts is {value}, which has no prompt; write one a line")
    return prompts
