"""Write a model's text to a terminal safely."""

from typing import TextIO


def printable(text: str, out: TextIO) -> str:
    """Return text for `out`: on a terminal without control characters, which move the cursor."""
    if not out.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
