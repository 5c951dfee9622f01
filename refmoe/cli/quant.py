"""`refmoe quant`: is this file that model, and what does a format cost?"""

from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.cli.inputs import read_sequence
from refmoe.cli.options import MODEL, TOKENS, add_json, positive
from refmoe.cli.parser import Parser, add_parts, describe
from refmoe.cli.show import layer_progress, print_json
from refmoe.lint.diff.report import verify
from refmoe.oracle.base_logits import divergence, read_base, write_base
from refmoe.oracle.quant import FORMATS, expect
from refmoe.run.generate import generate_tokens
from refmoe.run.load import Model, load
from refmoe.run.sampler import Sampling

OWN_TEXT = 128  # tokens that the model writes where --tokens gives none
WORST = 5  # tensors that `expect` lists; --all lists every one


def add(parser: Parser) -> None:
    """Add the options of `refmoe quant` to its parser."""
    describe(
        parser,
        "Compare two files of one model tensor by tensor, or measure what a format costs.",
        ["refmoe quant verify Kimi-K2-Thinking k2.gguf"],
    )
    parts = [
        ("verify", "compare two files of one model, tensor by tensor", _add_verify),
        ("expect", "measure what storing a model in a format would cost", _add_expect),
        ("base", "write base logits as llama-perplexity does", _add_base),
        ("kl", "compare a model with a file of base logits", _add_kl),
    ]
    add_parts(parser, parts)


def _add_verify(parser: Parser) -> None:
    describe(
        parser,
        "Compare two files of one model, tensor by tensor: bit-equal, rounded, or wrong and how. "
        "Exit code 1 if a tensor is wrong.",
        ["refmoe quant verify Kimi-K2-Thinking k2.gguf"],
    )
    parser.add_argument("a", type=Path, metavar="A", help="the right one: a folder or a GGUF")
    parser.add_argument("b", type=Path, metavar="B", help="the one in question")
    parser.add_argument("--all", action="store_true", help="print every tensor, not the wrong ones")
    add_json(parser)
    parser.set_defaults(run=_verify)


def _add_expect(parser: Parser) -> None:
    describe(
        parser,
        "Round every matrix to a format, and measure the error of each and the divergence of the "
        "next-token probabilities.",
        ["refmoe quant expect --to q4_0", "refmoe quant expect Moonlight --to int4 --experts-only"],
    )
    parser.add_argument("a", type=Path, nargs="?", metavar="MODEL", help=MODEL)
    help = f"the format: {', '.join(FORMATS)}"
    parser.add_argument("--to", choices=FORMATS, required=True, metavar="FORMAT", help=help)
    help = f"{TOKENS}; default: {OWN_TEXT} tokens that the model writes itself"
    parser.add_argument("--tokens", type=Path, metavar="FILE", help=help)
    help = "round the routed experts alone"
    parser.add_argument("--experts-only", action="store_true", help=help)
    help = "print every tensor, not the worst five"
    parser.add_argument("--all", action="store_true", help=help)
    add_json(parser)
    parser.set_defaults(run=_expect)


def _add_base(parser: Parser) -> None:
    describe(
        parser,
        "Write base logits of a text, computed in float64, in the format of "
        "`llama-perplexity --kl-divergence-base`.",
        ["refmoe quant base Moonlight --tokens ids.json --base moonlight.base"],
    )
    parser.add_argument("a", type=Path, nargs="?", metavar="MODEL", help=MODEL)
    help = f"{TOKENS}, as llama.cpp tokenises the text"
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE", help=help)
    parser.add_argument("--base", type=Path, required=True, metavar="FILE", help="file to write")
    help = "tokens of a chunk; default: 512"
    parser.add_argument("--ctx", type=positive, default=512, metavar="N", help=help)
    add_json(parser)
    parser.set_defaults(run=_base)


def _add_kl(parser: Parser) -> None:
    describe(
        parser,
        "Compare a model with base logits of llama-perplexity: divergence of the next-token "
        "probabilities, and how often the likeliest token is the same.",
        ["refmoe quant kl k2.gguf --base k2.base"],
    )
    parser.add_argument("a", type=Path, nargs="?", metavar="MODEL", help=MODEL)
    help = "file of `llama-perplexity --kl-divergence-base`, or of `refmoe quant base`"
    parser.add_argument("--base", type=Path, required=True, metavar="FILE", help=help)
    add_json(parser)
    parser.set_defaults(run=_kl)


def _verify(args: Namespace) -> int:
    found = verify(args.a, args.b)
    if args.json:
        print_json(found.as_json())
    else:
        for v in found.tensors:
            if v.verdict == "wrong" or args.all:
                rel = "" if v.max_rel is None else f" {v.max_rel:.1e}"
                print(f"{v.verdict:<10} {v.name}{rel}{f': {v.likely}' if v.likely else ''}")
        for f in found.findings:
            if f.level != "note" and f.rule != "diff-weights":
                print(f)
        counts = Counter(v.verdict for v in found.tensors)
        print(", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
    return 0 if found.ok else 1


def _expect(args: Namespace) -> int:
    model = load(args.a, "float64")
    tokens = read_sequence(args.tokens) if args.tokens else _own_text(model)
    with layer_progress() as progress:
        cost = expect(model, args.to, tokens, args.experts_only, progress)
    if args.json:
        print_json(cost.as_json())
        return 0
    worst = sorted(cost.tensors, key=lambda row: -row["rel_rms"])
    for row in worst if args.all else worst[:WORST]:
        print(f"{row['rel_rms']:10.2e}  {row['name']}")
    print(
        f"{len(cost.tensors)} tensors in {args.to}, {len(tokens)} tokens: KL {cost.kl_mean:.2e} "
        f"nats a position, 99 % below {cost.kl_p99:.2e}; the likeliest token stays in "
        f"{cost.top1_agree:.1%}"
    )
    return 0


def _own_text(model: Model) -> list[int]:
    """Return what the model itself writes, drawn at temperature 1."""
    how = Sampling(1.0, 1.0, 0.0)
    first = [int(i) for i in model.cfg.eos_token_id[:1]] or [0]
    count = OWN_TEXT - 1
    made = generate_tokens(model.decoder, first, max_new_tokens=count, sampling=how, seed=0)
    return [*first, *made]


def _base(args: Namespace) -> int:
    model = load(args.a, "float64")
    chunks = write_base(model, read_sequence(args.tokens), args.ctx, args.base)
    if args.json:
        print_json({"out": str(args.base), "chunks": chunks, "n_ctx": args.ctx})
    else:
        print(f"{args.base}: {chunks} chunks of {args.ctx} tokens, from float64")
    return 0


def _kl(args: Namespace) -> int:
    kl, same = divergence(load(args.a), read_base(args.base))
    document: dict[str, Any] = {
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1_agree": same,
    }
    if args.json:
        print_json(document)
    else:
        print(
            f"{len(kl)} positions: KL {document['kl_mean']:.2e} nats, 99 % below "
            f"{document['kl_p99']:.2e}; the likeliest token is the same in {same:.1%}"
        )
    return 0
