"""Show progress: a bar on a terminal, elsewhere a line on standard error every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

Said = Callable[[str, int, int], None]  # is told what is being done, how much of it, of how much

EVERY = 10.0  # seconds between two lines in a file or pipe: few enough for a log of hours


class Progress:
    """How much of `total` is done, in `unit`s: bytes ("B"), or things that are counted.

    Use it as a context. A terminal gets tqdm's bar; a file or pipe gets a line at most every
    `EVERY` seconds, none for work that is shorter; with shown=False nothing is printed.
    """

    def __init__(
        self, total: float, unit: str = "B", name: str = "", done: float = 0, shown: bool = True
    ) -> None:
        self.total, self.unit, self.name, self.done, self.shown = total, unit, name, done, shown
        self._bar: Any = None
        self._began = self._said = time.monotonic()
        if shown and sys.stderr.isatty():
            from tqdm import tqdm  # a fifth of a second that only a terminal needs

            bytes_ = unit == "B"
            self._bar = tqdm(
                total=total or None,
                initial=done,
                unit=unit,
                unit_scale=bytes_,
                desc=name or None,
                leave=False,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, done: float) -> None:
        """Count so much more as done."""
        self.show(self.done + done, self.total)

    def show(self, done: float, total: float) -> None:
        """Show that `done` of `total` is done."""
        self.done, self.total = done, total
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        elif self.shown and time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            print(f"refmoe: {self.line()}", file=sys.stderr, flush=True)

    def rename(self, name: str) -> None:
        """Say from now on that this is being done."""
        self.name = name
        if self._bar is not None:
            self._bar.set_description(name, refresh=False)

    def line(self) -> str:
        """Return name, amount and seconds: "sweep layer 3 of 61: 12.3 of 594.1 GB, 40 s"."""
        name = f"{self.name}: " if self.name else ""
        seconds = time.monotonic() - self._began
        if self.unit == "B":
            amount = f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB"
        else:
            amount = f"{self.unit} {self.done:g} of {self.total:g}"
        return f"{name}{amount}, {seconds:.0f} s"


def say_nothing(name: str, done: int, total: int) -> None:
    """Show no progress, for those who call from Python."""


@contextmanager
def steps(unit: str = "step") -> Iterator[Said]:
    """Yield `said(name, done, total)`, which shows how far work of several parts is."""
    with Progress(0, unit) as bar:

        def said(name: str, done: int, total: int) -> None:
            bar.rename(name)
            bar.show(done, total)

        yield said
