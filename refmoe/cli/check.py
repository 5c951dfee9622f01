"""`refmoe check`: where another engine's dump first goes wrong, and why."""

from argparse import Namespace
from pathlib import Path

from refmoe.cli.inputs import read_sequence
from refmoe.cli.options import ENGINES, TOKENS, add_json, add_model, refuse
from refmoe.cli.parser import Parser, describe
from refmoe.cli.show import EXIT, print_json, remark
from refmoe.oracle import repro
from refmoe.oracle.check import Arbitration, Case, arbitrate
from refmoe.oracle.judge import Report
from refmoe.oracle.noise import PROFILES
from refmoe.oracle.readers.dump import read_dump
from refmoe.oracle.truth.check import check_truth
from refmoe.oracle.truth.file import read_truth
from refmoe.run.load import load

WORST = 5  # points of a report that are printed; --all prints every one
UNMATCHED = 10  # tensors of the dump that are no points and are named
THROUGH = 5  # points judged together that are all named; of more the first four


def add(parser: Parser) -> None:
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
    help = f"{TOKENS}, if the dump does not say them"
    parser.add_argument("--tokens", type=Path, metavar="FILE", help=help)
    help = "judge against a truth file from `golden make`; needs no weights"
    parser.add_argument("--truth", type=Path, metavar="FILE", help=help)
    group = parser.add_argument_group("the engine")
    help = f"hold it to this engine's conventions: {', '.join(ENGINES)}; default: refmoe"
    group.add_argument("--engine", choices=ENGINES, metavar="ENGINE", help=help)
    profiles = tuple(PROFILES)
    help = f"its precision: {', '.join(profiles)}; default: that of the values in the dump"
    group.add_argument("--profile", choices=profiles, metavar="PROFILE", help=help)
    group = parser.add_argument_group("a second dump")
    help = "compare with a second dump: which is farther from float64?"
    group.add_argument("--against", type=Path, metavar="DUMP", help=help)
    help = "conventions of the second; default: those of --engine"
    group.add_argument("--against-engine", choices=ENGINES, metavar="ENGINE", help=help)
    help = "precision of the second; default: that of its values"
    group.add_argument("--against-profile", choices=profiles, metavar="PROFILE", help=help)
    group = parser.add_argument_group("output")
    group.add_argument("--all", action="store_true", help="print every point, not the worst five")
    help = "also write the report as a web page"
    group.add_argument("--html", type=Path, metavar="FILE", help=help)
    help = "write a fault that was found as a NumPy script of one operation on one token"
    group.add_argument("--repro", type=Path, metavar="FILE", help=help)
    add_json(group)
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    if args.truth:
        model_only = ("--model", "--tokens", "--against", "--repro", "--html")
        refuse(args, model_only, "needs the model; --truth has none")
    if args.against is None:
        refuse(args, ("--against-engine", "--against-profile"), "is for --against DUMP")
    elif not args.json:
        refuse(args, ("--all",), "lists the points of one report; --against compares two")
    dump = read_dump(args.dump)
    for note in dump.notes:
        remark(f"note: {note}")
    if args.truth:
        report = check_truth(read_truth(args.truth), dump, engine=args.engine, profile=args.profile)
        return _show(report, args)
    model = load(args.model, "float64", reference=True)
    tokens = read_sequence(args.tokens) if args.tokens else None
    engine = args.engine or "refmoe"
    case = Case(model, dump, tokens, engine, args.profile)
    if args.repro and case.report.verdict == "fault":
        for path in repro.write(case, args.repro):
            remark(f"wrote {path}")
    elif args.repro:
        remark(f"note: no fault was found, so {args.repro} was not written")
    if args.html:
        from refmoe.oracle.report import write  # Jinja, which only a page needs

        remark(f"wrote {write(case, args.html)}")
    if args.against is None:
        return _show(case.report, args)
    second = Case(
        model,
        read_dump(args.against),
        tokens,
        args.against_engine or engine,
        args.against_profile,
    )
    both = arbitrate(case, second)
    if args.json:
        print_json(both.as_json())
    else:
        _show_two(args, both)
    return max(EXIT[both.a.verdict], EXIT[both.b.verdict])


def _show(report: Report, args: Namespace) -> int:
    if args.json:
        print_json(report.as_json())
    else:
        _show_report(report, args.all, bool(args.truth))
    return EXIT[report.verdict]


def _show_two(args: Namespace, both: Arbitration) -> None:
    for name, r in ((args.dump, both.a), (args.against, both.b)):
        where = f" at {r.point}" if r.point else ""
        print(f"{name}: {r.verdict}{where} under profile {r.profile}; {r.reason}")
    if both.ratio is not None:
        print(f"errors of the first over the second: {both.ratio:.3g} at {both.shared} points")
    at = both.first_difference
    print(f"the same bits at {both.equal} points{f'; they part at {at}' if at else ''}")
    further = {"a": args.dump, "b": args.against}.get(both.further, "neither")
    print(f"further from float64: {further}")


def _show_report(report: Report, every: bool, truth: bool) -> None:
    how = "end to end" if truth else "each operation on the engine's own inputs"
    print(
        f"{report.compared} tensors compared, {how}; "
        f"profile {report.profile}, conventions of {report.engine}"
    )
    for name, sides in report.conventions.items():
        theirs = sides.replace(" (here ", " (refmoe: ")
        print(f"  convention: {name} = {theirs}")
    worst = sorted(report.points, key=lambda p: -p.multiple)
    shown = report.points if every else worst[:WORST]
    print(f"\n{'rel error':>10} {'explained':>10} {'multiple':>9}  point")
    for p in shown:
        print(f"{p.rel_error:10.1e} {p.envelope:10.1e} {p.multiple:9.2f}  {p.name}")
    print("explained: the largest error that rounding explains; multiple: the error over that, of")
    print("all rows or of the worst one; above 1 is a fault")
    flips = report.router
    print(f"\nrouter: {flips['flips']} choices differ, {flips['explained']} explained by noise")
    if report.missing:
        print(f"not in the dump: {len(report.missing)} points, first {report.missing[0]}")
    for name, why in list(report.unmatched.items())[:UNMATCHED]:
        print(f"not compared: {name}: {why}")
    print(f"\n{report.verdict.upper()}: ", end="")
    print(f"{report.point}, {report.reason}" if report.point else report.reason)
    through = report.judged_with(report.point)
    if through:
        more = f" and {len(through) - THROUGH + 1} more" if len(through) > THROUGH else ""
        first = through[: THROUGH - 1] if more else through
        print(f"judged together with {', '.join(first)}{more}, which the dump lacks")
    _show_cause(report)
    print(f"nominal chance of a false alarm in the whole report: {report.alpha:g}")


def _show_cause(report: Report) -> None:
    if report.cause is None:
        if report.verdict == "fault":
            print(f"CAUSE: none known fits{f'; {report.shape}' if report.shape else ''}")
        return
    cause = report.cause
    print(f"CAUSE: {cause.text} [{cause.id}]")
    if cause.references:
        print(f"  as in {', '.join(cause.references)}")
    if cause.fitted:
        print(f"  {cause.fitted}")
    if cause.equivalent:
        print(f"  cannot be told apart here from: {', '.join(cause.equivalent)}")
    if cause.runner_up:
        worse = f", {cause.times_worse:.3g} times worse" if cause.times_worse else ""
        print(f"  next best: {cause.runner_up}{worse}")
