"""`refmoe trace`: write intermediate tensors of one forward pass."""

import json
from argparse import Namespace
from pathlib import Path

from refmoe.cli.inputs import read_tokens
from refmoe.cli.models import open_model
from refmoe.cli.options import PROMPTS, add_budget, add_json, add_model, add_precision
from refmoe.cli.parser import Parser, describe
from refmoe.cli.show import print_json
from refmoe.oracle.trace import trace, write
from refmoe.version import __version__


def add(parser: Parser) -> None:
    """Add the options of `refmoe trace` to its parser."""
    describe(
        parser,
        "Compute one forward pass and write the tensors of its points (docs/points.md names them) "
        "to a safetensors file. Of several prompts the names begin with 0/, 1/, …",
        [
            'refmoe trace --text "My lord" --out mine.safetensors',
            "refmoe trace --tokens ids.json --points lm_head '*.gate#*' --out mine.safetensors",
        ],
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokens", type=Path, metavar="FILE", help=PROMPTS)
    source.add_argument("--text", help="a text instead of token ids")
    help = "write these points only: names, or patterns with *; default: all"
    parser.add_argument("--points", nargs="+", metavar="PATTERN", help=help)
    help = "write 65 numbers a row that still locate an error, instead of each tensor"
    parser.add_argument("--sketch", action="store_true", help=help)
    help = "the safetensors file to write"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=help)
    help = "also print the name, format and shape of each point"
    parser.add_argument("--verbose", action="store_true", help=help)
    add_model(parser)
    add_json(parser)
    add_precision(parser)
    add_budget(parser.add_argument_group("memory"))
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Run `refmoe trace` and return its exit code."""
    model = open_model(args)
    sequences = read_tokens(args.tokens) if args.tokens else [model.tokenizer.encode(args.text)]
    arrays = {}
    for i, tokens in enumerate(sequences):
        prefix = f"{i}/" if len(sequences) > 1 else ""
        for name, x in trace(model, tokens, args.points, args.sketch).items():
            arrays[prefix + name] = x
    metadata = {
        "producer": f"refmoe {__version__}",
        "model": str(model.checkpoint.path),
        "numerics": args.numerics,
        "conventions": args.conventions,
        "tokens": json.dumps(sequences if len(sequences) > 1 else sequences[0]),
    }
    write(args.out, arrays, metadata)
    shapes = {name: list(x.shape) for name, x in arrays.items()}
    if args.json:
        print_json({"out": str(args.out), "points": shapes})
        return 0
    nbytes = sum(x.nbytes for x in arrays.values())
    print(f"{args.out}: {len(arrays)} points of {len(sequences)} sequences, {nbytes:,} bytes")
    if args.verbose:
        for name, shape in shapes.items():
            print(f"  {name:<56} {arrays[name].dtype!s:<8} {shape}")
    return 0
