"""Read the files that verbs take: token ids, messages, positions."""

import re
from pathlib import Path
from typing import Any

from refmoe.files import InputError, read_json


def read_tokens(file: Path) -> list[list[int]]:
    """Return the sequences of a tokens file: a JSON list of integers is one, of lists several."""
    value = read_json(file)
    several = value if value and all(isinstance(v, list) for v in value) else [value]
    for tokens in several:
        if not isinstance(tokens, list) or not all(type(t) is int for t in tokens):
            raise InputError(f"{file}: expected a list of integers, or a list of such lists")
    return several


def read_sequence(file: Path) -> list[int]:
    """Return the one sequence of a tokens file."""
    sequences = read_tokens(file)
    if len(sequences) != 1:
        raise InputError(f"{file}: one sequence is taken here, not {len(sequences)}")
    return sequences[0]


def read_messages(file: Path) -> list[dict[str, Any]]:
    """Return chat messages: a JSON list, or an object that holds it under `messages`."""
    value = read_json(file)
    value = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise InputError(f"{file}: expected a list of messages")
    return value


def read_positions(text: str) -> Any:
    """Return positions: all, last, integers with commas between, or what a JSON file lists."""
    if text in ("all", "last"):
        return text
    if re.fullmatch(r"[-+\d, ]+", text):
        try:
            return [int(p) for p in text.split(",")]
        except ValueError:
            raise InputError(f"{text}: expected integers with commas between") from None
    value = read_json(Path(text))
    if not isinstance(value, list):
        raise InputError(f"{text}: expected a list of positions, or a list for each prompt")
    return value
