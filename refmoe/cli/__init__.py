"""The command line: `refmoe VERB …`, one file a verb (`verbs.py` lists them)."""

from collections.abc import Sequence

from refmoe.ctrl_c import command, ctrl_c


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; --help and --version leave by `SystemExit`.

    Without argv it is the command of this process: it is read from `sys.argv`, and Ctrl-C is
    handled from here on. With argv, as in a test or a program, Ctrl-C stays the caller's affair.
    """
    if argv is None:
        ctrl_c.listen()
    from refmoe.cli.verbs import run  # after `listen`, so that Ctrl-C is heard while it loads

    return run(argv) if argv is not None else command(run)
