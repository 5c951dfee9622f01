"""`refmoe lint`: what is wrong with a checkpoint, without running it."""

from argparse import Namespace
from pathlib import Path

from refmoe.cli.options import add_json, refuse
from refmoe.cli.parser import Parser, describe
from refmoe.cli.show import print_json
from refmoe.lint.base import as_json
from refmoe.lint.lint import lint, lint_against
from refmoe.lint.registry import rules
from refmoe.run.load import golden_folder


def add(parser: Parser) -> None:
    """Add the options of `refmoe lint` to its parser."""
    describe(
        parser,
        "Compare a checkpoint with what is known of its family: configuration, router bias, YaRN "
        "as each engine reads it, missing or doubled tensors, NaN, INT4 and FP8 scales. Exit code "
        "1 if there are errors.",
        [
            "refmoe lint Kimi-K2-Thinking",
            "refmoe lint my-copy --against Kimi-K2-Thinking",
            "refmoe lint --select yarn,router",
        ],
    )
    help = "a checkpoint's folder or a GGUF file; default: the embedded tiny-k2"
    parser.add_argument("folder", type=Path, nargs="?", metavar="PATH", help=help)
    help = "compare with another copy of the same model: same bits, same values, rounded or wrong"
    parser.add_argument("--against", type=Path, metavar="PATH", help=help)
    add_json(parser)
    group = parser.add_argument_group("rules (docs/lint.md explains each)")
    group.add_argument("--rules", action="store_true", help="list all rules and stop")
    help = "judge by these rules or families alone: ids, with commas between; may be repeated"
    group.add_argument("--select", type=_ids, action="extend", default=[], metavar="ID", help=help)
    help = "leave these rules or families out"
    group.add_argument("--ignore", type=_ids, action="extend", default=[], metavar="ID", help=help)
    parser.set_defaults(run=run)


def _ids(text: str) -> list[str]:
    """Return the ids of a list with commas between."""
    return text.split(",")


def run(args: Namespace) -> int:
    """Run `refmoe lint` and return its exit code."""
    if args.rules:
        others = ("folder", "--against", "--select", "--ignore", "--json")
        refuse(args, others, "does not go with --rules, which lists all rules and stops")
        for r in rules():
            print(f"{r.level:<8} {r.id:<23} {r.summary}")
        return 0
    folder = args.folder or golden_folder() / "tiny-k2"
    if args.against:
        found = lint_against(folder, args.against, args.select, args.ignore)
    else:
        found = lint(folder, args.select, args.ignore)
    document = as_json(found)
    if args.json:
        print_json(document)
    else:
        for f in found:
            print(f)
        errors = sum(f.level == "error" for f in found)
        print(f"{errors or 'no'} errors in {len(found)} findings")
    return 0 if document["ok"] else 1
