"""`refmoe tiny`: write a random checkpoint in Hugging Face layout."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from refmoe.cli.options import add_json, positive, refuse, seed
from refmoe.cli.parser import Parser, describe
from refmoe.cli.show import print_json, remark
from refmoe.files import InputError
from refmoe.weights.checkpoint import Checkpoint
from refmoe.weights.synthetic import members, random
from refmoe.weights.synthetic.k2_full import NAME as FULL
from refmoe.weights.synthetic.k2_full import SAID as FULL_SAID
from refmoe.weights.synthetic.k2_full import k2_full


def add(parser: Parser) -> None:
    """Add the options of `refmoe tiny` to its parser."""
    describe(
        parser,
        "Write a small checkpoint of random weights, as any engine that reads Hugging Face's "
        "layout can open it. The same options give the same bytes on every machine.",
        [
            "refmoe tiny my-k2.5 --like k2.5",
            "refmoe tiny grouped --format fp8 --shape n_group=4 topk_group=2 n_routed_experts=12",
        ],
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the new folder to write")
    names = tuple(members.MEMBERS)
    help = f"lay it out as this member was published: {', '.join(names)}"
    parser.add_argument("--like", choices=names, metavar="MEMBER", help=help)
    help = f"format of the weights: {', '.join(random.FORMATS)}; default: bf16"
    parser.add_argument("--format", choices=random.FORMATS, metavar="FORMAT", help=help)
    help = "of the random numbers; default: 0"
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help=help)
    help = "number of safetensors files; default: 1"
    parser.add_argument("--shards", type=positive, metavar="N", help=help)
    parser.add_argument(
        "--shape",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        help=f"set fields of config.json; with {FULL}: K2-Thinking's size, 594 GB of mostly holes",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Run `refmoe tiny` and return its exit code."""
    shape = _shape([item for item in args.shape if item != FULL])
    if FULL in args.shape:
        why = f"does not go with --shape {FULL}: {FULL} decides layout, format and shards"
        refuse(args, ("--like", "--format", "--shards"), why)
        return _write_full(args, shape)
    if args.like:
        why = "does not go with --like, which decides format, shape and shards"
        refuse(args, ("--format", "--shards", "--shape"), why)
        members.write_member(args.folder, args.like, args.seed)
    else:
        shards = args.shards or 1
        random.write_random(args.folder, args.format or "bf16", args.seed, shape, shards)
    checkpoint = Checkpoint.open(args.folder)
    if not args.like:
        for line in _equal_axes(checkpoint):
            remark(f"warning: {line}")
    if args.json:
        print_json({"folder": str(args.folder), "tensors": len(checkpoint.tensors)})
    else:
        nbytes = sum(t.nbytes for t in checkpoint.tensors.values())
        made = args.like or args.format or "bf16"
        print(f"{args.folder}: {len(checkpoint.tensors)} tensors, {nbytes:,} bytes, {made}")
    return 0


def _shape(items: list[str]) -> dict[str, Any]:
    """Return the fields of config.json that `FIELD=VALUE` sets; values are JSON."""
    shape: dict[str, Any] = {}
    for item in items:
        key, _, value = item.partition("=")
        try:
            shape[key] = json.loads(value)
        except json.JSONDecodeError:
            raise InputError(f"--shape {item}: expected FIELD=VALUE, as in config.json") from None
    return shape


def _equal_axes(checkpoint: Checkpoint) -> list[str]:
    """Return the axes of one size, which hide a transposed matrix: "hidden_size = … = 96"."""
    alike: dict[int, list[str]] = {}
    for axis, size in random.axes(checkpoint.cfg).items():
        alike.setdefault(size, []).append(axis)
    return [f"{' = '.join(names)} = {size}" for size, names in alike.items() if len(names) > 1]


def _write_full(args: Namespace, shape: dict[str, Any]) -> int:
    made = k2_full(args.folder, shape, args.seed)
    checkpoint = Checkpoint.open(args.folder)
    if args.json:
        facts = {"tensors": len(checkpoint.tensors), **made._asdict()}
        print_json({"folder": str(args.folder), **facts})
        return 0
    print(
        f"{args.folder}: {len(checkpoint.tensors):,} tensors in {made.shards} shards, "
        f"{made.apparent:,} bytes, of which {made.disk:,} on disk"
    )
    print(FULL_SAID)
    return 0
