"""`refmoe plan`: what lives where, does it fit, how fast will it be?"""

import argparse
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from refmoe.cli.options import CACHES, add_dense, add_json, refuse, share
from refmoe.cli.parser import Parser, describe
from refmoe.cli.show import print_json
from refmoe.files import parse_size, read_text
from refmoe.run.plan.hardware import Hardware, parse_hardware
from refmoe.run.plan.measure import PRESETS, Flags, load_preset, with_flags
from refmoe.run.plan.plan import format_plan, plan
from refmoe.run.plan.time import Placed, model_config
from refmoe.run.plan.units import NUMBER_BYTES, parse_count, parse_rate
from refmoe.run.plan.validate import format_validation, validate
from refmoe.weights.open import open_checkpoint
from refmoe.weights.placement import Parts, count_parts
from refmoe.weights.synthetic.members import MEMBERS

INSIDE = 0.8  # of the public reports must lie in the predicted ranges, or --validate exits with 1
PROMPT, SWEEP = "512", "10000"  # tokens whose times are told
MEMORIES = {"ram": "main memory", "vram": "card memory", "pmem": "persistent memory"}


def add(parser: Parser) -> None:
    """Add the options of `refmoe plan` to its parser."""
    describe(
        parser,
        "Predict where a model's weights will lie, whether they fit, and how fast it decodes. "
        "Exit code 1 if it does not fit.",
        [
            "refmoe plan --preset laptop-64gb-nvme",
            "refmoe plan --model Kimi-K2-Thinking --ram 192GB --vram 24GB --disk 7GB/s",
            "refmoe plan --validate",
        ],
    )
    which = parser.add_argument_group("model").add_mutually_exclusive_group()
    help = "a checkpoint's folder or a GGUF file"
    which.add_argument("--model", type=Path, metavar="PATH", help=help)
    help = "a config.json alone, without weights"
    which.add_argument("--config", type=Path, metavar="FILE", help=help)
    members = tuple(MEMBERS)
    help = f"as published: {', '.join(members)}; default: k2-thinking"
    which.add_argument("--member", choices=members, metavar="MEMBER", help=help)
    _add_hardware(parser.add_argument_group("hardware (default: this machine, measured)"))
    group = parser.add_argument_group("use")
    help = "tokens that the caches hold, like 8192 or 8k; default: 8k, or the preset's"
    group.add_argument("--ctx", metavar="N", help=help)
    help = f"tokens of a prompt whose rate is predicted; default: {PROMPT}"
    group.add_argument("--prompt", metavar="N", help=help)
    help = f"tokens of a sweep whose time is predicted; default: {SWEEP}"
    group.add_argument("--sweep", metavar="N", help=help)
    add_dense(group, default=None)
    help = f"format of the latent cache: {', '.join(CACHES)}; default: float32, or the preset's"
    group.add_argument("--cache", choices=CACHES, metavar="FORMAT", help=help)
    help = "share of experts that need not be read from disk, 0 to 1; default: as placed"
    group.add_argument("--hit-rate", type=share, metavar="H", help=help)
    help = "keep at most N routed experts on the card; default: as many as fit, or the preset's"
    group.add_argument("--card-experts", type=int, metavar="N", help=help)
    add_json(parser)
    help = (
        "compare predictions with public reports of measured speeds; takes nothing else but --json"
    )
    parser.add_argument("--validate", action="store_true", help=help)
    parser.set_defaults(run=run)


def _add_hardware(group: argparse._ArgumentGroup) -> None:
    where = group.add_mutually_exclusive_group()
    help = f"a known machine: {', '.join(PRESETS)}"
    where.add_argument("--preset", choices=PRESETS, metavar="NAME", help=help)
    help = "a description in TOML, as docs/memory.md shows"
    where.add_argument("--hardware", type=Path, metavar="FILE", help=help)
    for kind, name in MEMORIES.items():
        help = f"size of {name}, like 64GB (10⁹) or 64GiB (2³⁰)"
        group.add_argument(f"--{kind}", metavar="SIZE", help=help)
        help = f"bandwidth of {name}, like 50GB/s"
        group.add_argument(f"--{kind}-bandwidth", metavar="RATE", help=help)
    help = "rate of the disk that holds what fits nowhere else, like 7GB/s"
    group.add_argument("--disk", metavar="RATE", help=help)
    group.add_argument("--cores", metavar="N", help="processor cores")


def run(args: Namespace) -> int:
    """Run `refmoe plan` and return its exit code."""
    if args.validate:
        return _validate(args)
    hardware = _hardware(args)
    dense, cache = args.dense or hardware.dense, args.cache or hardware.cache
    if args.model:
        checkpoint = open_checkpoint(args.model)
        parts, eighths = count_parts(checkpoint, dense), count_parts(checkpoint, "q8")
    else:
        cfg = model_config(args.config, args.member)
        parts, eighths = Parts.of(cfg, dense), Parts.of(cfg, "q8")
    context = None if args.ctx is None else parse_count(args.ctx, "--ctx")
    prompt = parse_count(PROMPT if args.prompt is None else args.prompt, "--prompt")
    sweep = parse_count(SWEEP if args.sweep is None else args.sweep, "--sweep")
    case = Placed.of(
        parts, hardware, context, NUMBER_BYTES[cache], args.hit_rate, args.card_experts
    )
    named = args.model or args.config or args.member or "k2-thinking"
    document = {
        "model": f"{named}, dense {dense}, cache {cache}",
        **plan(case, eighths, prompt, sweep),
    }
    if args.json:
        print_json(document)
    else:
        print("\n".join(format_plan(document)))
    return 0 if document["fits"] else 1


def _validate(args: Namespace) -> int:
    given = [f"--{name.replace('_', '-')}" for name in vars(args)]
    rest = [name for name in given if name not in ("--validate", "--json", "--run")]
    refuse(args, rest, "does not go with --validate, which has its own machines and models")
    document = validate()
    if args.json:
        print_json(document)
    else:
        print("\n".join(format_validation(document)))
    return 0 if document["inside"] >= INSIDE * document["total"] else 1


def _hardware(args: Namespace) -> Hardware:
    """Return a preset, a description or, unless flags give the memory, this machine; then flags."""
    kinds: dict[str, Callable[[str, str], float]] = {kind: parse_size for kind in MEMORIES}
    kinds |= {"disk": parse_rate, **{f"{kind}_bandwidth": parse_rate for kind in MEMORIES}}
    given = {
        name: read(text, f"--{name.replace('_', '-')}")
        for name, read in kinds.items()
        if (text := getattr(args, name)) is not None
    }
    cores = None if args.cores is None else parse_count(args.cores, "--cores")
    flags = Flags(**given, cores=cores)
    base = None
    if args.hardware:
        base = parse_hardware(read_text(args.hardware), str(args.hardware))
    elif args.preset or flags.ram is None:
        base = load_preset(args.preset or "this", args.model)
    return with_flags(base, flags)
