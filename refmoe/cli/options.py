"""Define the options that several verbs share, in groups as the help texts show them.

An option that changes nothing unless another is given has the default None, so that a verb can see
whether it was given and refuse it where it would be ignored.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refmoe.engines import CONVENTIONS
from refmoe.files import InputError, parse_size
from refmoe.model.numerics import PRECISIONS
from refmoe.run.load import DENSE
from refmoe.run.plan.units import NUMBER_BYTES
from refmoe.weights.streaming.reader import WAYS

ENGINES = tuple(CONVENTIONS)
NUMERICS = tuple(PRECISIONS)
CACHES = tuple(NUMBER_BYTES)
MODEL = "a checkpoint's folder or a GGUF file; default: the embedded tiny-k2"
TOKENS = "JSON file: a list of token ids"
PROMPTS = "JSON file: a list of token ids, or a list of such lists for several prompts"

Group = Any  # argparse's parsers and groups of arguments have no public common type


def add_json(parser: Group) -> None:
    """Add --json; its default stands on the first parser, so that a nested one keeps it."""
    help = "print one JSON document instead of text"
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=help)


def add_model(parser: Group) -> None:
    """Add --model."""
    parser.add_argument("--model", type=Path, metavar="PATH", help=MODEL)


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add how a model is computed: --numerics, --conventions, --reference."""
    group = parser.add_argument_group("precision")
    help = f"{', '.join(NUMERICS)} (the 16-bit ones are emulated); default: float32"
    group.add_argument("--numerics", choices=NUMERICS, default="float32", metavar="N", help=help)
    add_conventions(group)
    help = "compute with the definition in model/ alone, without the quicker kernels"
    group.add_argument("--reference", action="store_true", help=help)


def add_conventions(group: Group) -> None:
    """Add --conventions."""
    help = (
        f"compute as this engine does where engines differ: {', '.join(ENGINES)}; default: refmoe"
    )
    group.add_argument(
        "--conventions", choices=ENGINES, default="refmoe", metavar="ENGINE", help=help
    )


def add_sampling(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Add how tokens are drawn: --temperature, --top-p, --min-p, --seed."""
    group = parser.add_argument_group("sampling")
    help = f"0 always takes the likeliest token; default: {temperature:g}"
    group.add_argument("--temperature", type=float, default=temperature, metavar="T", help=help)
    help = "draw from the fewest tokens whose probabilities sum to P; default: 1, all of them"
    group.add_argument("--top-p", type=float, metavar="P", help=help)
    help = "drop tokens less likely than P times the likeliest; default: 0, none"
    group.add_argument("--min-p", type=float, metavar="P", help=help)
    help = "of the random draws; the same seed gives the same text; default: 0"
    group.add_argument("--seed", type=seed, default=0, metavar="N", help=help)


def add_dense(group: Group, default: str | None = "exact") -> None:
    """Add --dense; a default of None leaves it to the preset."""
    said = "exact" if default else "exact, or the preset's"
    help = "exact: weights as stored; q8: attention, shared experts, dense MLP and head in 8 bits; "
    group.add_argument(
        "--dense", choices=DENSE, default=default, metavar="KIND", help=f"{help}default: {said}"
    )


def add_int4(group: Group) -> None:
    """Add --int4."""
    help = (
        "fast: 16-bit activations for INT4, Q4_0 and, in prompts, 8-bit weights (2e-5 of a "
        "result); exact: float32; default: fast"
    )
    group.add_argument("--int4", choices=("fast", "exact"), metavar="KIND", help=help)


def add_cache(group: Group) -> None:
    """Add --cache."""
    help = "format of the latent cache: float32, or bf16 in half the memory; default: float32"
    group.add_argument("--cache", choices=CACHES, default="float32", metavar="FORMAT", help=help)


def add_threads(group: Group) -> None:
    """Add --threads."""
    help = "how many threads compute; default: one for each processor"
    group.add_argument("--threads", type=int, metavar="N", help=help)


def add_budget(group: Group) -> None:
    """Add how much memory weights may take: --ram, --reads."""
    help = "let weights take so many bytes, like 8GB; what does not fit is read from disk when used"
    group.add_argument("--ram", type=size, metavar="BYTES", help=help)
    help = (
        "with --ram: read past the system's cache (direct) or through it (cached); "
        "default: whichever is quicker"
    )
    group.add_argument("--reads", choices=WAYS, metavar="WAY", help=help)


def add_gpu(parser: argparse.ArgumentParser, what: str, generating: bool = True) -> None:
    """Add --gpu and the options that act only with it."""
    group = parser.add_argument_group("CUDA card")
    group.add_argument("--gpu", action="store_true", help=what)
    help = "let weights take so much of the card's memory; default: 12GB, or what is free"
    group.add_argument("--vram", type=size, metavar="BYTES", help=help)
    if generating:
        help = "also keep the N most used routed experts on the card; default: 0"
        group.add_argument("--gpu-experts", type=int, metavar="N", help=help)
    help = (
        "reserve caches for N tokens, like 8192 or 8k"
        if generating
        else "reserve memory for prompts of up to N tokens, like 8192 or 8k"
    )
    group.add_argument("--ctx", metavar="N", help=f"{help}; default: 4096")


def add_generation(parser: argparse.ArgumentParser, budget: bool = True) -> None:
    """Add how generation computes: quantised dense weights, cache, threads, memory, card."""
    group = parser.add_argument_group("speed and memory")
    add_dense(group)
    add_int4(group)
    add_cache(group)
    add_threads(group)
    if budget:
        add_budget(group)
    add_gpu(parser, "compute what every token uses on a CUDA card, as `refmoe plan` places it")


def size(text: str) -> int:
    """Return bytes: 64GB is 64·10⁹, 64GiB 64·2³⁰."""
    try:
        return parse_size(text)
    except InputError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def share(text: str) -> float:
    """Return a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number from 0 to 1")
    return value


def positive(text: str) -> int:
    """Return a whole number from 1."""
    return _whole(text, 1)


def seed(text: str) -> int:
    """Return a whole number from 0, as NumPy's generators take it."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from {least}")
    return value


def refuse(args: argparse.Namespace, options: Sequence[str], why: str) -> None:
    """Raise `InputError` for the first of these options that was given.

    options are named as on the command line (`--top-p`, or a positional's name); `why` completes
    the sentence "--top-p …".
    """
    for option in options:
        value = getattr(args, option.removeprefix("--").replace("-", "_"), None)
        if value not in (None, False, [], ()):
            raise InputError(f"{option} {why}")


def check_sampling(args: argparse.Namespace) -> None:
    """Refuse options of drawing where nothing is drawn."""
    if args.temperature == 0:
        refuse(
            args, ("--top-p", "--min-p"), "needs a --temperature above 0, where tokens are drawn"
        )


def check_memory(args: argparse.Namespace) -> None:
    """Refuse options that need --ram or --gpu without them, and kernels where none are used."""
    if getattr(args, "ram", None) is None:
        refuse(args, ("--reads",), "is for --ram BYTES")
    if not getattr(args, "gpu", False):
        refuse(args, ("--vram", "--gpu-experts", "--ctx"), "is for --gpu")
    if getattr(args, "int4", None) == "fast":
        if args.reference:
            raise InputError("--int4 fast needs the kernels; --reference computes without them")
        if args.numerics != "float32":
            raise InputError(f"--int4 fast computes in float32, not in --numerics {args.numerics}")
