"""Parse and print sizes, rates and counts."""

import re
from collections.abc import Sequence

from refmoe.files import InputError, as_bytes

NUMBER = {"float32": 4, "bf16": 2}
LEAST, MOST = 10**6, 10**18  # bytes, and bytes a second: below and above, a unit was left out
MOST_TOKENS = 10**12  # beyond every context and every sweep, and still exact in arithmetic


# --- sizes and rates


def capacity(text: str, what: str = "a capacity") -> int:
    """Return bytes of a memory: 64GB. Raises `InputError`, also below 1 MB and above 10¹⁸ bytes."""
    value = as_bytes(text, what)
    if not LEAST <= value <= MOST:
        raise InputError(f"{what} = {text!r} is {value:,} bytes; expected a size like 64GB")
    return value


def rate(text: str, what: str = "a bandwidth") -> float:
    """Return bytes a second: 50GB/s. Raises `InputError`, also below 1 MB/s and above 10¹⁸."""
    try:
        value = as_bytes(re.sub(r"/s\s*$", "", text), what)
    except InputError:
        raise InputError(f"{what} = {text!r}, expected bytes a second like 50GB/s") from None
    if not LEAST <= value <= MOST:
        raise InputError(f"{what} = {text!r} is {value:,} bytes a second; expected one like 50GB/s")
    return value


def count(text: str, what: str = "a number of tokens", most: int = MOST_TOKENS) -> int:
    """Return a number from 1 to `most`: 8k is 8,192, 1M 1,048,576. Raises `InputError`."""
    m = re.fullmatch(r"\s*([0-9]{1,15})\s*([kKM]?)\s*", text)
    value = int(m[1]) << {"": 0, "k": 10, "M": 20}[m[2].replace("K", "k")] if m else 0
    if not 1 <= value <= most:
        raise InputError(f"{what} = {text!r}, expected a number like 8192 or 8k, at most {most:,}")
    return value


def _gb(nbytes: float) -> str:
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:,.1f} GB"
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:,.1f} kB"


def _span(ends: Sequence[float]) -> str:
    return " to ".join(f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in ends)
