"""Parse and print sizes, rates and counts."""

import re
from collections.abc import Sequence

from refmoe.files import InputError, parse_size

NUMBER_BYTES = {"float32": 4, "bf16": 2}  # bytes of a number in the latent caches
MOST_TOKENS = 1 << 40  # a sweep of a trillion tokens; beyond it is a slip of the hand


def parse_rate(text: str, what: str = "a bandwidth") -> float:
    """Return the bytes a second that a text like 50GB/s means.

    Raises `InputError`, which names `what`, for anything else.
    """
    try:
        return parse_size(re.sub(r"/s\s*$", "", text), what)
    except InputError:
        raise InputError(f"{what} = {text!r}, expected bytes a second like 50GB/s") from None


def parse_count(text: str, what: str = "a number of tokens") -> int:
    """Return the count that a text means: 8k is 8,192 and 1M 1,048,576.

    Raises `InputError`, which names `what`, for anything else, zero and absurd numbers included.
    """
    m = re.fullmatch(r"\s*([0-9]{1,15})\s*([kKM]?)\s*", text)
    value = int(m[1]) << {"": 0, "k": 10, "M": 20}[m[2].replace("K", "k")] if m else 0
    if not 1 <= value <= MOST_TOKENS:
        raise InputError(f"{what} = {text!r}, expected a number like 8192 or 8k")
    return value


def format_bytes(nbytes: float) -> str:
    """Return bytes for people: in GB, in MB or in kB, with one decimal."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:,.1f} GB"
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:,.1f} kB"


def format_range(ends: Sequence[float]) -> str:
    """Return a range of numbers for people, three digits of each end."""
    return " to ".join(f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in ends)
