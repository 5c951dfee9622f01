"""Handle Ctrl-C from a command's first line to its last.

    leave    the process ends at once with 130; while it is imported and its arguments are read
    raise    KeyboardInterrupt wherever the command is, as Python has it; it ends with 130
    last     as `raise`, and every later one is ignored: at a prompt, where Ctrl-C leaves
    wait     it is remembered until `look()`, which is called where a computation can be stopped
    (ended)  nothing happens; the command ends with the code that it has

The exception can be raised between any two lines, also between two handlers of exceptions, and
inside code that loses it or does not survive it. An import loses it in the callbacks that free its
locks, and prints so; Numba loses it while it compiles. `input` calls handlers again with the
exception set, which is a SystemError. So nothing is raised before a verb runs, and a conversation,
which goes on afterwards, lets none be raised in a reply: there Ctrl-C waits until it looks.

`does` is set by plain assignment: Python runs handlers of signals at calls and at jumps backwards,
and there is neither between `except KeyboardInterrupt:` and an assignment.

Only a command listens (refmoe/cli/__init__.py). In a program that uses refmoe as a library Ctrl-C
is that program's affair, and what is set here has no effect.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Literal

CODE = 130  # exit code, as shells have it: 128 + SIGINT


class CtrlC:
    """Holds what a Ctrl-C does now, and whether one waits."""

    does: Literal["leave", "raise", "last", "wait"] = "leave"
    came = False

    def listen(self) -> None:
        """Take Ctrl-C over from Python, unless whoever started the process has it ignored."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)

    def _handle(self, *_: Any) -> None:
        if self.does == "wait":
            self.came = True
        elif self.does == "leave":
            os.write(sys.stderr.fileno(), b"\n")
            os._exit(CODE)
        else:
            if self.does == "last":
                self.end()
            raise KeyboardInterrupt

    def look(self) -> None:
        """Raise KeyboardInterrupt if a Ctrl-C waits."""
        if self.came:
            self.came = False
            raise KeyboardInterrupt

    def end(self) -> None:
        """Ignore Ctrl-C until the process has ended, also while Python takes itself down."""
        self.does = "wait"
        if signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


ctrl_c = CtrlC()


def command(run: Callable[[], int]) -> int:
    """Run the whole of a command and return its exit code, whenever Ctrl-C comes."""
    code = CODE
    try:
        code = run()
    except KeyboardInterrupt:  # between two handlers of `run`, or in one
        pass
    finally:
        ctrl_c.does = "wait"
        ctrl_c.end()
    return code
