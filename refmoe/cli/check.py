"""`refmoe check`: where another engine's dump first goes wrong, and why."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from refmoe.cli.inputs import read_tokens
from refmoe.cli.options import ENGINES, PROMPTS, add_json, add_model, refuse
from refmoe.cli.parser import Parser, describe
from refmoe.cli.show import EXIT, print_json, remark
from refmoe.engines import MATTER, PROFILES, read_conventions
from refmoe.oracle import repro
from refmoe.oracle.caches import CACHES
from refmoe.oracle.check import arbitrate, judge_dump
from refmoe.oracle.judge import Report
from refmoe.oracle.profiles import EXAMPLE, read_profile
from refmoe.oracle.readers.dump import read_dump
from refmoe.oracle.truth.check import check_truth
from refmoe.oracle.truth.file import read_truth
from refmoe.oracle.words import arbitration_lines, report_lines
from refmoe.progress import steps
from refmoe.run.load import load


def add(parser: Parser) -> None:
    """Add the options of `refmoe check` to its parser."""
    describe(
        parser,
        "Judge what another engine computed: each operation in float64 on the engine's own "
        "inputs, against what rounding in its precision explains. Exit code 0: only "
        "rounding, 1: a fault, 2: could not tell.",
        [
            "refmoe check dump.safetensors --engine vllm",
            "refmoe check dump.safetensors --model Kimi-K2-Thinking --repro fault.py",
            "refmoe check prefill.pt --against decode.pt",
        ],
    )
    help = "tensors by module path (.safetensors, .npz, .pt), or another form that docs list"
    parser.add_argument("dump", type=Path, metavar="DUMP", help=help)
    add_model(parser)
    help = f"{PROMPTS}, if the dump does not say them"
    parser.add_argument("--tokens", type=Path, metavar="FILE", help=help)
    help = "judge against a truth file from `golden make`; needs no weights"
    parser.add_argument("--truth", type=Path, metavar="FILE", help=help)
    group = parser.add_argument_group("the engine")
    help = f"hold it to this engine's conventions: {', '.join(ENGINES)}; default: refmoe"
    group.add_argument("--engine", choices=ENGINES, metavar="ENGINE", help=help)
    help = (
        "set one convention alone, whatever the engine's; may be given several times; names: "
        f"{', '.join(MATTER)}"
    )
    group.add_argument("--convention", action="append", metavar="NAME=VALUE", help=help)
    help = (
        f"its precision: {', '.join(PROFILES)}; with types set otherwise behind it, as in "
        f"{EXAMPLE}; default: guessed from the values of the dump"
    )
    group.add_argument("--profile", metavar="PROFILE", help=help)
    help = (
        "the type of its cache, where that is narrower than its tensors: "
        f"{', '.join(CACHES)}; default: none is"
    )
    group.add_argument("--cache", metavar="TYPE", help=help)
    group = parser.add_argument_group("a second dump")
    help = "compare with a second dump: which is farther from float64?"
    group.add_argument("--against", type=Path, metavar="DUMP", help=help)
    help = "conventions of the second; default: those of --engine"
    group.add_argument("--against-engine", choices=ENGINES, metavar="ENGINE", help=help)
    help = "precision of the second; default: that of its values"
    group.add_argument("--against-profile", metavar="PROFILE", help=help)
    group = parser.add_argument_group("output")
    group.add_argument("--all", action="store_true", help="print every point, not the worst five")
    help = "also write the report as a web page"
    group.add_argument("--html", type=Path, metavar="FILE", help=help)
    help = "write a fault that was found as a NumPy script of one operation on one token"
    group.add_argument("--repro", type=Path, metavar="FILE", help=help)
    add_json(group)
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Run `refmoe check` and return its exit code."""
    if args.truth:
        model_only = ("--model", "--tokens", "--against", "--repro", "--html", "--convention")
        refuse(args, (*model_only, "--cache"), "needs the model; --truth has none")
    if args.against is None:
        refuse(args, ("--against-engine", "--against-profile"), "is for --against DUMP")
    elif not args.json:
        refuse(args, ("--all",), "lists the points of one report; --against compares two")
    for profile in filter(None, (args.profile, args.against_profile)):
        read_profile(profile)  # refused before anything is read
    read_conventions(args.engine or "refmoe", args.convention or ())
    dump = read_dump(args.dump)
    for note in () if dump.form else dump.notes:  # those of log-probabilities are in the report
        remark(f"note: {note}")
    if args.truth:
        report = check_truth(read_truth(args.truth), dump, engine=args.engine, profile=args.profile)
        return _show(report, args)
    model = load(args.model, "float64", reference=True)
    tokens = read_tokens(args.tokens) if args.tokens else None
    options: Any = {"conventions": args.convention or (), "cache": args.cache}
    with steps() as said:
        options["progress"] = said
        case = judge_dump(model, dump, tokens, args.engine, args.profile, **options)
    if args.repro and case.report.verdict == "fault":
        for path in repro.write(case, args.repro):
            remark(f"wrote {path}")
    elif args.repro:
        remark(f"note: no fault was found, so {args.repro} was not written")
    if args.html:
        from refmoe.oracle.report.page import write  # Jinja, which only a page needs

        remark(f"wrote {write(case, args.html)}")
    if args.against is None:
        return _show(case.report, args)
    with steps() as said:
        options["progress"] = said
        second = judge_dump(
            model,
            read_dump(args.against),
            tokens,
            args.against_engine or args.engine,
            args.against_profile,
            **options,
        )
    both = arbitrate(case, second)
    if args.json:
        print_json(both.as_json())
    else:
        print("\n".join(arbitration_lines(both, str(args.dump), str(args.against))))
    return max(EXIT[both.a.verdict], EXIT[both.b.verdict])


def _show(report: Report, args: Namespace) -> int:
    if args.json:
        print_json(report.as_json())
    else:
        print("\n".join(report_lines(report, args.all, bool(args.truth))))
    return EXIT[report.verdict]
