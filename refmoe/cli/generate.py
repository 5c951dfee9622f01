"""`refmoe generate`: continue a prompt."""

import os
import sys
import time
from argparse import Namespace
from pathlib import Path

from refmoe.cli.inputs import read_sequence
from refmoe.cli.models import gpu_facts, open_model
from refmoe.cli.options import (
    TOKENS,
    add_generation,
    add_json,
    add_model,
    add_precision,
    add_sampling,
    check_sampling,
    refuse,
)
from refmoe.cli.parser import Parser, describe
from refmoe.cli.show import print_json
from refmoe.files import InputError
from refmoe.run.generate import generate_tokens, generation_decoder
from refmoe.run.load import Model
from refmoe.run.sampler import Sampling
from refmoe.text.terminal import printable
from refmoe.weights.streaming.store import describe_store, format_store


def add(parser: Parser) -> None:
    """Add the options of `refmoe generate` to its parser."""
    describe(
        parser,
        "Continue a prompt and print the text as it is made.",
        [
            'refmoe generate "My lord" --temperature 0.4 --max-new-tokens 60',
            "refmoe generate --model Kimi-K2-Thinking --ram 48GB --dense q8 < prompt.txt",
        ],
    )
    parser.add_argument("prompt", nargs="?", help="the text to continue; default: standard input")
    help = f"{TOKENS}, as the prompt"
    parser.add_argument("--tokens", type=Path, metavar="FILE", help=help)
    help = "stop after N new tokens; default: 256"
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help=help)
    add_model(parser)
    add_json(parser)
    add_sampling(parser, temperature=0.0)
    add_precision(parser)
    add_generation(parser)
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Run `refmoe generate` and return its exit code."""
    if args.tokens:
        refuse(args, ("prompt",), "and --tokens: give one of the two")
    check_sampling(args)
    model = open_model(args)
    prompt = _prompt(args, model)
    has_words = not args.tokens or model.checkpoint.has_words
    text = model.tokenizer.stream() if has_words else None
    how = sampling(args)
    tokens: list[int] = []
    pieces: list[str] = []
    began, first, interrupted = time.perf_counter(), None, False

    def show(piece: str) -> None:
        pieces.append(piece)
        if not args.json:
            sys.stdout.write(printable(piece, sys.stdout))
            sys.stdout.flush()

    made = generate_tokens(
        generation_decoder(model, args.int4 or "fast", args.cache),
        prompt,
        max_new_tokens=args.max_new_tokens,
        sampling=how,
        seed=args.seed,
        stop=model.stop_ids,
    )
    try:
        for token in made:
            first = first or (time.perf_counter(), _process_age())
            tokens.append(token)
            show(text.feed(token) if text else f"{token} ")
        show(text.finish() if text else "")
    except KeyboardInterrupt:
        interrupted = True
    end = time.perf_counter()
    rate = (len(tokens) - 1) / (end - first[0]) if first and len(tokens) > 1 else None
    if args.json:
        print_json(
            {
                "text": "".join(pieces) if text else None,
                "tokens": tokens,
                "prompt_tokens": len(prompt),
                "new_tokens": len(tokens),
                "seconds": end - began,
                "tok_s": rate,
                "first_token_s": first[1] if first else None,
                "store": describe_store(model.store) if model.store else None,
                **gpu_facts(model),
            }
        )
    else:
        print()
        print(
            f"[{len(prompt)} prompt + {len(tokens)} new tokens in {end - began:.2f} s"
            + (f", {rate:.1f} tok/s" if rate else "")
            + (f", first token {first[1]:.2f} s after start" if first and first[1] else "")
            + (", interrupted]" if interrupted else "]"),
            file=sys.stderr,
        )
        if model.store:
            print(format_store(model.store), file=sys.stderr)
        if card := gpu_facts(model).get("gpu"):
            peak, budget = card["vram_peak"] / 1e9, card["budget"] / 1e9
            print(f"[at most {peak:.2f} GB of {budget:.2f} on the card]", file=sys.stderr)
    if model.store:
        model.store.close()
    return 130 if interrupted else 0


def sampling(args: Namespace) -> Sampling:
    """Return how tokens are drawn; all are kept unless --top-p or --min-p says otherwise."""
    top_p = 1.0 if args.top_p is None else args.top_p
    return Sampling(args.temperature, top_p, args.min_p or 0.0)


def _prompt(args: Namespace, model: Model) -> list[int]:
    if args.tokens:
        return read_sequence(args.tokens)
    text = args.prompt
    if text is None:
        if sys.stdin.isatty():
            raise InputError('a prompt is needed: refmoe generate "ROMEO:"')
        text = sys.stdin.read()
    return model.tokenizer.encode(text)


def _process_age() -> float | None:
    """Return the seconds since the process started; None where the system does not tell."""
    try:
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        ticks = os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / ticks
    except (OSError, AttributeError, ValueError):
        return None
