"""`refmoe sweep`: many prompts, layer by layer, each weight read once."""

import sys
from argparse import Namespace
from pathlib import Path

from refmoe.cli.inputs import read_positions, read_tokens
from refmoe.cli.models import open_model
from refmoe.cli.options import (
    PROMPTS,
    add_budget,
    add_dense,
    add_gpu,
    add_json,
    add_model,
    add_precision,
    add_threads,
    refuse,
)
from refmoe.cli.parser import Parser, describe
from refmoe.cli.show import print_json, remark
from refmoe.run.generate import CHUNK
from refmoe.run.sweep.sweep import Swept, sweep
from refmoe.weights.streaming.store import format_store


def add(parser: Parser) -> None:
    """Add the options of `refmoe sweep` to its parser."""
    describe(
        parser,
        "Take many prompts through the network layer by layer, so that each weight is read once "
        "for all of them, and write what the forward passes make. A sweep that was interrupted "
        "goes on from the layer it was in when the same command is run again.",
        [
            "refmoe sweep --tokens prompts.json --out swept.safetensors",
            "refmoe sweep --model Kimi-K2 --tokens prompts.json --ram 16GB --out k2.safetensors",
        ],
    )
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE", help=PROMPTS)
    help = "the safetensors file to write; OUT.part/ beside it holds what a resumed run needs"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=help)
    help = "all; none; or top:K, the K likeliest tokens; default: top:64"
    parser.add_argument("--logits", default="top:64", metavar="WHICH", help=help)
    help = (
        "positions that get logits: all, last, a list such as 0,7,-1, or a JSON file; default: all"
    )
    parser.add_argument("--positions", metavar="WHICH", help=help)
    help = (
        "also write these points: names, or patterns with *; hidden states of the last layer and "
        "routing are always written"
    )
    parser.add_argument("--points", nargs="+", metavar="PATTERN", help=help)
    help = "forget what an interrupted run left, and begin anew"
    parser.add_argument("--restart", action="store_true", help=help)
    add_model(parser)
    add_json(parser)
    add_precision(parser)
    group = parser.add_argument_group("speed and memory")
    help = f"rows that go through a layer at a time; default: {CHUNK}"
    group.add_argument("--chunk", type=int, default=CHUNK, metavar="ROWS", help=help)
    add_dense(group)
    add_threads(group)
    add_budget(group)
    help = "compute what every token uses on a CUDA card, layer by layer"
    add_gpu(parser, help, generating=False)
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Run `refmoe sweep` and return its exit code."""
    if args.logits == "none":
        refuse(args, ("--positions",), "says where logits are wanted; --logits none writes none")
    model = open_model(args, passing=True)
    try:
        done = sweep(
            model,
            read_tokens(args.tokens),
            args.out,
            logits=args.logits,
            positions=read_positions(args.positions) if args.positions else None,
            points=args.points or (),
            chunk=args.chunk,
            restart=args.restart,
            how={"dense": args.dense} | ({"gpu": True} if args.gpu else {}),
        )
    except KeyboardInterrupt:
        print(file=sys.stderr)
        remark("interrupted; run the same command again to go on from here")
        return 130
    finally:
        if model.store:
            model.store.close()
    if args.json:
        tensors = {name: {"dtype": d, "shape": list(s)} for name, (d, s) in done.tensors.items()}
        print_json(
            {
                "out": str(done.out),
                "rows": done.rows,
                "begun_at_layer": done.begun_at,
                "bytes_read": done.bytes_read,
                "seconds": done.seconds,
                "tensors": tensors,
            }
        )
        return 0
    print(_line(done))
    if model.store:
        print(format_store(model.store), file=sys.stderr)
    return 0


def _line(done: Swept) -> str:
    resumed = f", resumed at layer {done.begun_at}" if done.begun_at else ""
    return (
        f"{done.out}: {len(done.tensors)} tensors of {done.rows} tokens, "
        f"{done.out.stat().st_size:,} bytes; {done.bytes_read / 1e9:.3f} GB of weights in "
        f"{done.seconds:.1f} s{resumed}"
    )
