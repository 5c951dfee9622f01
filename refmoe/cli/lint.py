"""`refmoe lint`: what is wrong with a checkpoint, without running it."""

from argparse import Namespace
from pathlib import Path

from refmoe.cli.options import add_json
from refmoe.cli.parser import Parser, describe
from refmoe.cli.show import print_json
from refmoe.lint.base import as_json
from refmoe.lint.lint import lint, lint_against
from refmoe.run.load import golden_folder


def add(parser: Parser) -> None:
    describe(
        parser,
        "Compare a checkpoint with what is known of its family: configuration, router bias, YaRN "
        "as each engine reads it, missing or doubled tensors, NaN, INT4 and FP8 scales. Exit code "
        "1 if there are errors.",
        ["refmoe lint Kimi-K2-Thinking", "refmoe lint my-copy --against Kimi-K2-Thinking"],
    )
    help = "a checkpoint's folder or a GGUF file; default: the embedded tiny-k2"
    parser.add_argument("folder", type=Path, nargs="?", metavar="PATH", help=help)
    help = "compare with another copy of the same model: same bits, same values, rounded or wrong"
    parser.add_argument("--against", type=Path, metavar="PATH", help=help)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    folder = args.folder or golden_folder() / "tiny-k2"
    found = lint_against(folder, args.against) if args.against else lint(folder)
    document = as_json(found)
    if args.json:
        print_json(document)
    else:
        for f in found:
            print(f"{f.level:<8} {f'{f.tensor}: ' if f.tensor else ''}{f.text}")
        errors = sum(f.level == "error" for f in found)
        print(f"{errors or 'no'} errors in {len(found)} findings")
    return 0 if document["ok"] else 1
