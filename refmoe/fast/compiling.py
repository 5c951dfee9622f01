"""Say when kernels are compiled for the first time; asking for it does not load Numba."""

from collections.abc import Callable

_say: Callable[[str], None] | None = None


def announce(say: Callable[[str], None]) -> None:
    """Have `say(text)` called once, if and when kernels are compiled in this process.

    Kernels that an earlier process compiled are read back from disk, and nothing is said.
    """
    global _say
    _say = say


def compilation_begins() -> None:
    """Tell whoever asked; called by fast/kernels.py when Numba begins to compile."""
    global _say
    say, _say = _say, None
    if say is not None:
        say("compiling kernels for this processor, a few seconds; they are kept")
