"""Build parsers whose arguments are added on first use, and refuse what does not fit in a sentence.

Each verb, and each part of a verb (`golden verify`), has its own parser. A parser is filled when it
is first used, so that `refmoe --help` lists every verb without importing any of them.
"""

import argparse
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from refmoe.files import InputError

WIDTH = 100  # columns of a help text at most, as in the code
DESCRIBED = 78  # columns of the sentences at its beginning, which do not follow the terminal
LISTED = 12  # names that an error message lists in full; of more it shows the nearest only


class BadUse(InputError):
    """A command line that cannot be obeyed; the message says why and where to look."""


class Help(argparse.RawDescriptionHelpFormatter):
    """A help text of at most `WIDTH` columns, on wide terminals too."""

    def __init__(self, prog: str) -> None:
        import shutil  # with compression libraries; only a help text needs it

        columns = min(WIDTH, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=30, width=columns - 2)


class Parser(argparse.ArgumentParser):
    """A parser that is filled on first use and raises `BadUse` instead of leaving the process.

    `fill(parser)` adds the arguments; without it the parser is ready as it is.
    """

    def __init__(
        self, *args: Any, fill: Callable[["Parser"], None] | None = None, **kwargs: Any
    ) -> None:
        kwargs.setdefault("formatter_class", Help)
        super().__init__(*args, **kwargs)
        self._fill = fill
        self.siblings: Mapping[str, Parser] = {}  # the other parts of the same verb

    def filled(self) -> "Parser":
        """Return this parser with all its arguments."""
        fill, self._fill = self._fill, None
        if fill is not None:
            fill(self)
        return self

    def filled_wholly(self) -> "Parser":
        """Return this parser with all its arguments, and so all parsers below it."""
        for action in self.filled()._actions:
            if isinstance(action, argparse._SubParsersAction):
                for below in action.choices.values():
                    below.filled_wholly()
        return self

    def format_help(self) -> str:
        self.filled()
        return super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse, but refuse unknown arguments here, where the verb is known."""
        self.filled()
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown_argument(unknown[0]))
        return namespace, []

    def error(self, message: str) -> NoReturn:
        """Raise `BadUse` with the message and where to read more."""
        said = message.removeprefix("argument ")
        verb = self.prog.removeprefix("refmoe").strip()
        raise BadUse(f"{verb and f'{verb}: '}{said}\nTry: {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is none of the choices, and suggest the nearest."""
        if action.choices is not None and value not in action.choices:
            where = None if isinstance(action, argparse._SubParsersAction) else action
            raise argparse.ArgumentError(where, unknown_name(value, list(action.choices)))

    def _unknown_argument(self, given: str) -> str:
        option = given.split("=")[0]
        if not option.startswith("-"):
            return f"{given!r} is one argument too many"
        where = [p.prog for p in self.siblings.values() if option in p.filled().options()]
        if where:
            return f"{option} is for {' and '.join(f'`{prog}`' for prog in where)}"
        near = nearest(option, self.options())
        return f"{option} is no option here" + (f"; did you mean {near[0]}?" if near else "")

    def options(self) -> list[str]:
        """Return the names of all options, as on the command line."""
        return [name for name in self._option_string_actions if name.startswith("--")]


def add_parts(parser: Parser, parts: Sequence[tuple[str, str, Callable[[Parser], None]]]) -> None:
    """Add nested parsers, each `(name, summary, fill)`: `refmoe golden verify`.

    `--json` may stand before the part's name as well as after it.
    """
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    names = "|".join(name for name, _, _ in parts)
    below = parser.add_subparsers(required=True, metavar=names, dest="part", title="parts")
    for name, summary, fill in parts:
        below.add_parser(name, help=summary, fill=fill).siblings = below.choices


def describe(parser: Parser, text: str, examples: Sequence[str]) -> None:
    """Set what the help text says first, and the examples at its end."""
    parser.description = textwrap.fill(text, DESCRIBED)
    title = "example:" if len(examples) == 1 else "examples:"
    parser.epilog = "\n".join((title, *(f"  {line}" for line in examples)))


def nearest(name: str, names: Collection[str]) -> list[str]:
    """Return up to three names that look like this one, the most similar first."""
    from difflib import get_close_matches  # only needed for a mistake

    return get_close_matches(name, names, n=3, cutoff=0.6)


def unknown_name(name: str, names: Collection[str]) -> str:
    """Return a sentence that refuses a name: the nearest known ones, and all if they are few."""
    near = nearest(str(name), names)
    meant = f"; did you mean {' or '.join(near)}?" if near else "."
    known = f" Known: {', '.join(names)}" if len(names) <= LISTED else ""
    return f"{name!r} is not known{meant}{known}"
