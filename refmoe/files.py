"""Reading files that people bring: text, JSON, sizes; and `InputError`, for what does not fit."""

import json
import re
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Bad input from outside: says what was found, what was expected, where, and what to do."""


FILE_LIMIT = 200_000_000  # bytes; the index of K2's 208,550 tensors has some 20 million


def read_text(file: Path) -> str:
    """A UTF-8 file; `InputError` if it is not there, too large, or anything else."""
    try:
        if file.stat().st_size > FILE_LIMIT:
            raise InputError(f"{file}: more than {FILE_LIMIT:,} bytes; is it the right file?")
        return file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{file}: cannot be read as UTF-8 ({e})") from None


def read_json(file: Path) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(read_text(file))
    except InputError:
        raise
    except (ValueError, RecursionError) as e:  # also an integer of more than 4,300 digits
        raise InputError(f"{file}: not JSON ({e})") from None


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds, which must be an object."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise InputError(f"{file}: a JSON {type(value).__name__}, expected an object")
    return value


def as_bytes(text: str, what: str = "a size") -> int:
    """64GB is 64·10⁹, 64GiB 64·2³⁰, 1.5e9 itself. Raises `InputError`."""
    m = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]{1,2})?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if m is None or (m[3] and not m[2]) or float(m[1]) <= 0:
        raise InputError(f"{what} = {text!r}, expected bytes like 64GB (10⁹) or 64GiB (2³⁰)")
    power = "kmgt".index(m[2]) + 1 if m[2] else 0
    return int(float(m[1]) * (1024 if m[3] else 1000) ** power)
