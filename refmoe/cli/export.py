"""`refmoe export`: safetensors to GGUF and back, INT4 to bf16 and back."""

from argparse import Namespace
from pathlib import Path

from refmoe.cli.options import add_json, add_model, refuse
from refmoe.cli.parser import Parser, describe
from refmoe.cli.show import print_json
from refmoe.files import InputError
from refmoe.run import export
from refmoe.run.load import load

NAMED = 4  # tensors that are not exact and are named


def add(parser: Parser) -> None:
    """Add the options of `refmoe export` to its parser."""
    describe(
        parser,
        "Write a model in another format. Tensors whose values are not exactly those of the "
        "source are named.",
        [
            "refmoe export --to gguf --out tiny.gguf",
            "refmoe export --model tiny.gguf --to int4 --out tiny-int4",
        ],
    )
    add_model(parser)
    help = "gguf: one file for llama.cpp; int4, bf16: a folder with routed experts in that format"
    parser.add_argument(
        "--to", choices=("gguf", "int4", "bf16"), required=True, metavar="FORMAT", help=help
    )
    help = "the file (gguf) or new folder (int4, bf16) to write"
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help=help)
    dense = ", ".join(export.DENSE)
    help = f"format of all that is no routed expert: {dense}; default: q8_0 in a GGUF, else bf16"
    parser.add_argument("--dense", choices=export.DENSE, metavar="FORMAT", help=help)
    add_json(parser)
    group = parser.add_argument_group("--to gguf")
    help = (
        f"format of routed experts: q4_0, {dense}; default: q4_0, exact where INT4's scales are "
        "float16 numbers too"
    )
    experts = ("q4_0", *export.DENSE)
    group.add_argument("--experts", choices=experts, metavar="FORMAT", help=help)
    help = "with q4_0: format of experts some of whose scales are no float16; default: f32"
    group.add_argument("--otherwise", choices=export.DENSE, metavar="FORMAT", help=help)
    group = parser.add_argument_group("--to int4")
    help = f"scale of what is quantised anew: {', '.join(export.QUANTISERS)}; default: amax/7"
    quantisers = tuple(export.QUANTISERS)
    group.add_argument("--quantiser", choices=quantisers, metavar="RULE", help=help)
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Run `refmoe export` and return its exit code."""
    if args.to == "gguf":
        if args.experts not in (None, "q4_0"):
            refuse(args, ("--otherwise",), f"is for --experts q4_0, not {args.experts}")
    else:
        refuse(args, ("--experts", "--otherwise"), "is for --to gguf")
        if args.dense == "q8_0":
            raise InputError(f"--dense q8_0 is for --to gguf; --to {args.to} takes bf16, f16, f32")
    if args.to != "int4":
        refuse(args, ("--quantiser",), "is for --to int4")
    model = load(args.model)
    if args.to == "gguf":
        kinds = args.dense or "q8_0", args.otherwise or "f32", args.experts or "q4_0"
        made = export.to_gguf(model, args.out, *kinds)
    else:
        dense, quantiser = args.dense or "bf16", args.quantiser or "amax/7"
        made = export.to_safetensors(model, args.out, args.to, dense, quantiser)
    if args.json:
        print_json(made.as_json())
        return 0
    print(f"{made.out}: {made.tensors} tensors, {made.bytes:,} bytes")
    if made.not_exact:
        names = ", ".join(made.not_exact[:NAMED])
        more = ", …" if len(made.not_exact) > NAMED else ""
        print(f"not exact: {len(made.not_exact)} tensors, {names}{more}")
    return 0
