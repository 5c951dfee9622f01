"""Parse and print sizes, rates and counts."""

import re
from collections.abc import Sequence

from refmoe.files import InputError, parse_size

NUMBER = {"float32": 4, "bf16": 2}


# --- sizes and rates


def rate(text: str, what: str = "a bandwidth") -> float:
    """Bytes a second: 50GB/s. Raises `InputError`."""
    try:
        return parse_size(re.sub(r"/s\s*$", "", text), what)
    except InputError:
        raise InputError(f"{what} = {text!r}, expected bytes a second like 50GB/s") from None


def count(text: str, what: str = "a number of tokens") -> int:
    """Tokens: 8k is 8,192, 1M 1,048,576. Raises `InputError`."""
    m = re.fullmatch(r"\s*([0-9]+)\s*([kKM]?)\s*", text)
    if m is None or int(m[1]) < 1:
        raise InputError(f"{what} = {text!r}, expected a number like 8192 or 8k")
    return int(m[1]) << {"": 0, "k": 10, "M": 20}[m[2].replace("K", "k")]


def _gb(nbytes: float) -> str:
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:,.1f} GB"
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:,.1f} kB"


def _span(ends: Sequence[float]) -> str:
    return " to ".join(f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in ends)
