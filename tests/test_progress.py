"""Progress: a bar on a terminal, a line now and then elsewhere."""

import io
import sys

import pytest

from refmoe import progress
from refmoe.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    with Progress(8e9, name="sweep") as bar:
        bar.advance(2e9)
        bar.rename("sweep layer 1 of 4")
        bar.total += 2e9
        bar.advance(3e9)
        assert (bar._bar.n, bar._bar.total) == (5e9, 10e9)
    assert "sweep" in out.getvalue()
    assert "\r" in out.getvalue()


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_pipe_gets_a_line_every_ten_seconds_at_most(clock, capsys):
    with Progress(100e9, name="sweep") as bar:
        for _ in range(100):  # a minute and forty seconds
            clock[0] += 1
            bar.advance(1e9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "refmoe: sweep: 10.00 of 100.00 GB, 10 s"
    assert lines[-1] == "refmoe: sweep: 100.00 of 100.00 GB, 100 s"
    assert len(lines) == 10


def test_short_work_says_nothing_in_a_pipe(clock, capsys):
    with Progress(4, "layer") as bar:
        for layer in range(1, 5):
            clock[0] += 2
            bar.show(layer, 4)
    assert capsys.readouterr().err == ""


def test_things_that_are_counted_are_named(clock, capsys):
    with Progress(0, "layer") as bar:
        clock[0] += 11
        bar.show(3, 61)
    assert capsys.readouterr().err == "refmoe: layer 3 of 61, 11 s\n"


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_what_is_not_shown_prints_nothing(stream, clock, monkeypatch):
    out = stream()
    monkeypatch.setattr(sys, "stderr", out)
    with Progress(10, shown=False) as bar:
        clock[0] += 60
        bar.advance(5)
    assert bar.done == 5
    assert out.getvalue() == ""
