"""`refmoe bench`: measure the speed of this machine, and the power of `check`.

Each benchmark imports what it measures when it is called: kernels, a card, other engines.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from refmoe.cli.models import announce_compilation, gpu_facts, gpu_request, set_threads
from refmoe.cli.options import (
    add_budget,
    add_dense,
    add_generation,
    add_int4,
    add_json,
    add_model,
    add_threads,
    check_memory,
    positive,
    refuse,
    size,
)
from refmoe.cli.parser import Parser, add_parts, describe
from refmoe.cli.show import print_json
from refmoe.files import InputError
from refmoe.run.generate import generation_decoder
from refmoe.run.load import load
from refmoe.weights.synthetic.k2_slice import k2_slice

SLICE = "k2-slice"
SLICE_SHAPE = {"experts": 384, "vocab": 163840, "layers": 2}  # K2's own, but for the layers


def add(parser: Parser) -> None:
    """Add the options of `refmoe bench` to its parser."""
    describe(
        parser,
        "Measure. Speeds are given beside the rate of plain reading in the same run, since rates "
        "of a shared machine change from second to second.",
        ["refmoe bench kernels", f"refmoe bench decode --shape {SLICE} --folder /tmp --dense q8"],
    )
    parts: list[tuple[str, str, Callable[[Parser], None]]] = [
        ("oracle", "judge engines, healthy and with planted faults (extra `peers`)", _add_oracle),
        ("kernels", "multiply with each stored format", _add_kernels),
        ("decode", "decode one token after another", partial(_add_speed, what="decode")),
        ("prefill", "take in a prompt", partial(_add_speed, what="prefill")),
        ("peers", "run transformers and llama.cpp beside refmoe", _add_peers),
        ("store", "decode under a memory budget, reading from disk", _add_store),
        ("sweep", "sweep some tokens layer by layer, reading from disk", _add_sweep),
        ("gpu", "run kernels and decode on a CUDA card", _add_gpu),
    ]
    add_parts(parser, parts)


# --- arguments


def _add_oracle(parser: Parser) -> None:
    describe(
        parser,
        "Judge running engines, healthy and with planted faults, and count false alarms. Exit code "
        "1 if a healthy one fails, a fault is missed or false alarms are too many.",
        ["refmoe bench oracle --quick"],
    )
    parser.add_argument("--quick", action="store_true", help="judge fewer engines, in fewer runs")
    help = "runs that count false alarms, of each precision; default: 200, with --quick 16"
    parser.add_argument("--runs", type=positive, metavar="N", help=help)
    add_json(parser)
    parser.set_defaults(run=_run_oracle)


def _add_kernels(parser: Parser) -> None:
    from refmoe.run.bench.kernels import NAMES

    describe(
        parser,
        "Measure each format's kernel on matrices of K2's experts, for 1 and 4 tokens.",
        ["refmoe bench kernels --formats bf16 int4-fast --threads 2"],
    )
    help = f"formats to measure: {', '.join(NAMES)}; default: all"
    parser.add_argument("--formats", nargs="+", choices=NAMES, metavar="FORMAT", help=help)
    help = "how many threads compute; default: first one, then one for each processor"
    parser.add_argument("--threads", type=int, metavar="N", help=help)
    add_json(parser)
    parser.set_defaults(run=_run_kernels)


def _add_speed(parser: Parser, what: str) -> None:
    measured = {
        "decode": "Decode one token after another and measure tokens a second.",
        "prefill": "Take in a prompt and measure tokens a second.",
    }
    describe(
        parser,
        measured[what],
        [f"refmoe bench {what}", f"refmoe bench {what} --shape {SLICE} --folder /tmp --dense q8"],
    )
    add_model_or_slice(parser)
    prompts = {
        "decode": "tokens of context before timing begins",
        "prefill": "tokens of the prompt that is timed",
    }
    help = f"{prompts[what]}; default: 128"
    parser.add_argument("--prompt", type=positive, default=128, metavar="N", help=help)
    add_json(parser)
    add_generation(parser, budget=False)
    parser.set_defaults(run=_run_speed, what=what)


def _add_peers(parser: Parser) -> None:
    describe(
        parser,
        "Run those of transformers and llama-cpp-python that are installed beside refmoe.",
        [f"refmoe bench peers --shape {SLICE} --folder /tmp --experts 32 --vocab 32768"],
    )
    add_model_or_slice(
        parser, "where other engines' files are written meanwhile; with --shape also"
    )
    add_threads(parser)
    add_json(parser)
    parser.set_defaults(run=_run_peers)


def _add_store(parser: Parser) -> None:
    describe(
        parser,
        "Decode within a memory budget smaller than the weights, and measure how much of the "
        "disk's own rate arrives.",
        [
            "refmoe bench store --ram 9MB",
            f"refmoe bench store --shape {SLICE} --folder /tmp --ram 4GB",
        ],
    )
    add_model_or_slice(parser)
    help = "tokens to decode; default: 12"
    parser.add_argument("--tokens", type=positive, default=12, metavar="N", help=help)
    add_json(parser)
    group = parser.add_argument_group("speed and memory")
    add_dense(group)
    add_int4(group)
    add_threads(group)
    add_budget(group)
    parser.set_defaults(run=_run_store)


def _add_sweep(parser: Parser) -> None:
    describe(
        parser,
        "Sweep some tokens layer by layer, and measure how much of the disk's own rate arrives.",
        [f"refmoe bench sweep --shape {SLICE} --folder /tmp --ram 3GB"],
    )
    add_model_or_slice(parser, "where the result is written meanwhile; with --shape also")
    help = "tokens to sweep, in all; default: 8"
    parser.add_argument("--prompt", type=positive, default=8, metavar="N", help=help)
    add_json(parser)
    group = parser.add_argument_group("speed and memory")
    add_dense(group)
    add_threads(group)
    add_budget(group)
    parser.set_defaults(run=_run_sweep)


def _add_gpu(parser: Parser) -> None:
    describe(
        parser,
        "Measure kernels beside a copy on the card, then decode with nothing, what every token "
        "uses and also experts on the card (extra `gpu`).",
        ["refmoe bench gpu --model K2.5 --dense q8"],
    )
    add_model_or_slice(parser)
    add_json(parser)
    group = parser.add_argument_group("speed and memory")
    add_dense(group)
    add_threads(group)
    help = "let weights take so much of the card's memory; default: 12GB, or what is free"
    group.add_argument("--vram", type=size, metavar="BYTES", help=help)
    parser.set_defaults(run=_run_gpu)


def add_model_or_slice(parser: Parser, scratch: str | None = None) -> None:
    """Add --model, or a random slice of K2 and where it lies.

    scratch: what the benchmark writes into --folder, if it writes anything else.
    """
    which = parser.add_mutually_exclusive_group()
    add_model(which)
    help = "instead of a model: a random checkpoint of K2's dimensions with few layers"
    which.add_argument("--shape", choices=(SLICE,), metavar=SLICE, help=help)
    where = f"where the checkpoint of --shape {SLICE} is, or will be, written"
    help = f"{scratch} {where}" if scratch else where
    parser.add_argument("--folder", type=Path, metavar="DIR", help=help)
    group = parser.add_argument_group(f"--shape {SLICE}")
    for name, default in SLICE_SHAPE.items():
        what = {"experts": "routed experts of a layer", "vocab": "words", "layers": "layers"}[name]
        help = f"number of {what}; default: {default}"
        group.add_argument(f"--{name}", type=positive, metavar="N", help=help)
    parser.set_defaults(scratch=scratch is not None)


def _folder(args: Namespace) -> Path | None:
    """Return the checkpoint to measure, None for tiny-k2; write the slice if it is not there."""
    if args.shape is None:
        refuse(args, [f"--{name}" for name in SLICE_SHAPE], f"is for --shape {SLICE}")
        if not args.scratch:
            refuse(
                args, ("--folder",), f"is for --shape {SLICE}; --model PATH is measured as it is"
            )
        model: Path | None = args.model
        return model
    if args.folder is None:
        raise InputError("--folder DIR: where the random checkpoint of K2's dimensions may lie")
    shape = {name: getattr(args, name) or default for name, default in SLICE_SHAPE.items()}
    return k2_slice(args.folder, **shape)


# --- runs


def _run_oracle(args: Namespace) -> int:
    from refmoe.oracle.selftest import power

    rows: dict[str, list[dict[str, Any]]] = {"healthy": [], "planted": []}
    for kind, row in power.real_engines(args.quick):
        rows[kind].append(row)
        if not args.json:
            print(_engine_line(kind, row), flush=True)
    alarms = {}
    runs = args.runs or (16 if args.quick else 200)
    for profile, found in power.false_alarms(runs):
        low, high = power.interval(found["alarms"], runs)
        alarms[profile] = {**found, "interval": [low, high]}
        if not args.json:
            print(
                f"false alarms, {profile:<16} {found['alarms']} of {runs}, "
                f"95 % interval {low:.2%} to {high:.2%}",
                flush=True,
            )
    if args.json:
        print_json({**rows, "false_alarms": alarms})
    else:
        for precision in dict.fromkeys(row["precision"] for row in rows["planted"]):
            here = [row for row in rows["planted"] if row["precision"] == precision]
            counts = [sum(row[key] for row in here) for key in ("detected", "placed")]
            print(f"{precision}: of {len(here)} faults {counts[0]} detected, {counts[1]} placed")
    passed = all(row["verdict"] == "pass" for row in rows["healthy"])
    found_all = all(row["detected"] for row in rows["planted"])
    few = all(found["alarms"] <= max(1, runs // 200) for found in alarms.values())
    return 0 if passed and found_all and few else 1


def _engine_line(kind: str, row: dict[str, Any]) -> str:
    if kind == "healthy":
        conventions = ", ".join(row["conventions"]) or "none"
        return (
            f"healthy  {row['verdict']:<12} {row['engine']:<52} {row['compared']:>3} tensors, "
            f"worst {row['worst']:.2f} of what is explained; own conventions: {conventions}"
        )
    mark = "placed  " if row["placed"] else "detected" if row["detected"] else "MISSED  "
    name = f"{row['fault']}, {row['engine']}, {row['precision']}"
    return f"planted  {mark}     {name:<72} {row['point']}"


def _run_kernels(args: Namespace) -> int:
    from refmoe.run.bench.kernels import NAMES, format_kernels, measure_kernels

    _begin(args)
    counts = [args.threads] if args.threads else []
    return _show(args, measure_kernels(args.formats or NAMES, counts), format_kernels)


def _run_speed(args: Namespace) -> int:
    from refmoe.run.bench.base import describe_machine
    from refmoe.run.bench.decode import measure_decode
    from refmoe.run.bench.model import format_model
    from refmoe.run.bench.prefill import measure_prefill

    check_memory(args)
    request = gpu_request(args)
    if request is not None:
        _open_card()
    _begin(args)
    model = load(_folder(args), dense=args.dense, gpu=request)
    how = {"dense": args.dense, "int4": args.int4 or "fast", "cache": args.cache}
    decoder = generation_decoder(model, how["int4"], args.cache)
    measure = measure_decode if args.what == "decode" else measure_prefill
    found = {"machine": describe_machine(), **measure(model, decoder, args.prompt), **how}
    return _show(args, {**found, **gpu_facts(model)}, format_model)


def _run_peers(args: Namespace) -> int:
    from refmoe.run.bench.peers import format_peers, measure_peers

    _begin(args)
    return _show(args, measure_peers(_folder(args), args.folder), format_peers)


def _run_store(args: Namespace) -> int:
    from refmoe.run.bench.store import format_store, measure_store

    check_memory(args)
    if args.ram is None:
        raise InputError("--ram BYTES: the budget, like 4GB")
    _begin(args)
    how = {"int4": args.int4 or "fast", "dense": args.dense, "reads": args.reads}
    return _show(args, measure_store(_folder(args), args.ram, args.tokens, **how), format_store)


def _run_sweep(args: Namespace) -> int:
    from refmoe.run.bench.sweep import format_sweep, measure_sweep

    check_memory(args)
    _begin(args)
    how = {"dense": args.dense, "reads": args.reads, "folder": args.folder}
    return _show(args, measure_sweep(_folder(args), args.ram, args.prompt, **how), format_sweep)


def _run_gpu(args: Namespace) -> int:
    _open_card()
    from refmoe.run.bench.gpu import format_gpu, measure_gpu

    _begin(args)
    return _show(args, measure_gpu(_folder(args), args.dense, args.vram), format_gpu)


def _open_card() -> None:
    """Raise an error that says what to install, before anything else is done."""
    from refmoe.fast.gpu.device import open_device

    open_device()


def _begin(args: Namespace) -> None:
    announce_compilation()
    if args.threads is not None:
        set_threads(args.threads)


def _show(
    args: Namespace, document: dict[str, Any], lines: Callable[[dict[str, Any]], list[str]]
) -> int:
    if args.json:
        print_json(document)
    else:
        print("\n".join(lines(document)))
    return 0
