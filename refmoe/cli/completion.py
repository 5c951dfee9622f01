"""`refmoe completion`: a script that lets a shell complete verbs, options and names."""

import importlib
from argparse import Namespace
from typing import Any

from refmoe.cli.parser import Parser, describe
from refmoe.files import InputError

SHELLS = ("bash", "zsh", "fish")


def add(parser: Parser) -> None:
    """Add the options of `refmoe completion` to its parser."""
    describe(
        parser,
        "Print a script with which a shell completes verbs, options, and names such as engines "
        "and presets (extra `completion`).",
        [
            "refmoe completion bash > ~/.local/share/bash-completion/completions/refmoe",
            "refmoe completion zsh > ~/.zfunc/_refmoe",
            "refmoe completion fish > ~/.config/fish/completions/refmoe.fish",
        ],
    )
    parser.add_argument(
        "shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}"
    )
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Run `refmoe completion` and return its exit code."""
    try:
        shtab: Any = importlib.import_module("shtab")
    except ImportError:
        raise InputError("completion needs shtab: pip install 'refmoe[completion]'") from None
    from refmoe.cli.verbs import make_parser

    print(shtab.complete(make_parser().filled_wholly(), args.shell))
    return 0
