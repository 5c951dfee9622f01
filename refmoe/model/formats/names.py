"""Names of modules and tensors, and how a list in `quantization_config` names them."""

import re
from collections.abc import Iterable

from refmoe.files import InputError


def canonical(name: str) -> str:
    """Return the one name of a tensor here, whichever wrapper wrote it."""
    for prefix, plain in (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
        ("language_model.", "model."),
    ):
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def matches(entry: str, module: str) -> bool:
    """Tell whether an entry of a list of modules names this one, by its canonical name.

    An entry that begins with `re:` is a regular expression, matched at the start of the name. Any
    other is a whole name, in any wrapper's spelling (vllm-project/compressed-tensors,
    `utils/match.py`).
    """
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    return canonical(entry + ".") == module + "."


def targets_linear(entry: str, module: str) -> bool:
    """Tell whether an entry of a list of targets names this linear module, or all: `Linear`."""
    return entry == "Linear" or matches(entry, module)


def check_entries(entries: Iterable[str]) -> None:
    """Raise `InputError` if an entry that `matches` is to use is no regular expression."""
    for entry in entries:
        try:
            re.compile(entry.removeprefix("re:"))
        except (re.error, OverflowError, RecursionError) as e:
            raise InputError(
                f"quantization_config: {entry!r} is no name or pattern ({e})"
            ) from None
