"""`refmoe golden`: verify the stored results of other engines, or make a truth of a checkpoint."""

from argparse import Namespace
from pathlib import Path

from refmoe.cli.inputs import read_sequence
from refmoe.cli.models import gpu_request
from refmoe.cli.options import (
    TOKENS,
    add_budget,
    add_conventions,
    add_json,
    add_model,
    check_memory,
    size,
)
from refmoe.cli.parser import Parser, add_parts, describe
from refmoe.cli.show import layer_progress, print_json
from refmoe.oracle.selftest import golden
from refmoe.oracle.truth.make import make
from refmoe.run.load import load


def add(parser: Parser) -> None:
    """Add the options of `refmoe golden` to its parser."""
    describe(
        parser,
        "Goldens are results that other engines computed, stored with their origin. A truth is "
        "float64 of a checkpoint, with which `check --truth` judges dumps without the weights.",
        ["refmoe golden verify"],
    )
    parts = [
        ("verify", "compare every golden with what refmoe computes now", _add_verify),
        ("make", "write a truth of a checkpoint and some tokens", _add_make),
    ]
    add_parts(parser, parts)


def _add_verify(parser: Parser) -> None:
    describe(
        parser,
        "Compare every golden with what refmoe computes now, and print the worst point of each. "
        "Exit code 1 if one is outside its bound.",
        ["refmoe golden verify", "refmoe golden verify --reference --all"],
    )
    help = "read the goldens of this folder; default: those of the package"
    parser.add_argument("--folder", type=Path, metavar="DIR", help=help)
    help = "compute with the definition in model/ alone, without the quicker kernels"
    parser.add_argument("--reference", action="store_true", help=help)
    help = "compute in float32 on a CUDA card"
    parser.add_argument("--gpu", action="store_true", help=help)
    help = "with --gpu: let weights take so much; default: 12GB, or what is free"
    parser.add_argument("--vram", type=size, metavar="BYTES", help=help)
    parser.add_argument("--all", action="store_true", help="print every point")
    add_json(parser)
    parser.set_defaults(run=_verify)


def _add_make(parser: Parser) -> None:
    describe(
        parser,
        "Compute tokens in float64 and write a truth: the values that `refmoe check --truth` "
        "needs, with what rounding explains of each layer. Some 60 kB a token at K2's size.",
        [
            "refmoe golden make --tokens ids.json --out truth.safetensors",
            "refmoe golden make --model Kimi-K2 --tokens ids.json --ram 48GB --out k2.safetensors",
        ],
    )
    add_model(parser)
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE", help=TOKENS)
    help = "the safetensors file to write"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=help)
    add_conventions(parser)
    help = "also store the sha256 of every shard"
    parser.add_argument("--hash-shards", action="store_true", help=help)
    add_budget(parser)
    add_json(parser)
    parser.set_defaults(run=_make)


def _verify(args: Namespace) -> int:
    check_memory(args)
    rows = []
    for row in golden.verify(args.folder, args.reference, gpu_request(args)):
        rows.append(row)
        if not args.json and (args.all or not row.ok):
            mark = "ok  " if row.ok else "FAIL"
            print(f"{mark} {row.rel_error:9.2e} <= {row.bound:8.1e}  ", end="")
            print(f"{row.model}  {row.numerics} ~ {row.witness}  {row.point}", flush=True)
    document = golden.as_json(rows)
    if args.json:
        print_json(document)
    else:
        _show(rows)
    if not rows:
        return 2
    return 0 if document["ok"] else 1


def _show(rows: list[golden.Row]) -> None:
    """Print the worst point of each case."""
    cases: dict[tuple[str, str, str], list[golden.Row]] = {}
    for row in rows:
        cases.setdefault((row.model, row.numerics, row.witness), []).append(row)
    print(f"{'case':<20} {'refmoe':<8} {'witness':<28} points  {'worst':>8}  at")
    for (model, numerics, witness), part in cases.items():
        numbers = [r for r in part if r.bound > 0] or part
        worst = max(numbers, key=lambda r: r.rel_error / r.bound if r.bound else r.rel_error)
        bad = sum(not r.ok for r in part)
        print(
            f"{model:<20} {numerics:<8} {witness:<28} {len(part):>6}  {worst.rel_error:8.1e}  "
            f"{worst.point}, bound {worst.bound:.1e}{f'  {bad} FAIL' if bad else ''}"
        )
    bad = sum(not r.ok for r in rows)
    print(f"{len(rows)} comparisons, {bad or 'none'} outside the bound")


def _make(args: Namespace) -> int:
    check_memory(args)
    tokens = read_sequence(args.tokens)
    model = load(
        args.model, "float64", conventions=args.conventions, ram=args.ram, reads=args.reads
    )
    with layer_progress() as progress:
        make(model, tokens, args.out, hash_shards=args.hash_shards, progress=progress)
    nbytes = args.out.stat().st_size
    if args.json:
        print_json({"out": str(args.out), "tokens": len(tokens), "bytes": nbytes})
    else:
        each = nbytes // len(tokens)
        print(f"{args.out}: {len(tokens)} tokens, {nbytes:,} bytes, {each:,} a token")
    return 0
