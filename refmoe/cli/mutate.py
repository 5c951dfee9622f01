"""`refmoe mutate`: plant every known fault and count how many `check` finds."""

import os
import sys
from argparse import Namespace
from typing import Any

from refmoe.cli.options import add_json, positive
from refmoe.cli.parser import Parser, describe
from refmoe.cli.show import print_json
from refmoe.oracle.faults.dictionary import BY_ID, select
from refmoe.oracle.selftest import mutate

SHARES = ("detected", "placed", "named")
LEAST = {"detected": 1.0, "placed": 0.98, "named": 0.95}  # below these shares the exit code is 1
MISSED = 4  # mutants of a fault that --verbose lists


def add(parser: Parser) -> None:
    """Add the options of `refmoe mutate` to its parser."""
    describe(
        parser,
        "Plant known faults in healthy runs and count how many `refmoe check` detects, places at "
        "the right point and names. Exit code 1 if a fault is missed.",
        ["refmoe mutate --quick", "refmoe mutate scaling-dropped --verbose"],
    )
    help = f"plant these faults only; docs/faults.md lists all {len(BY_ID)}"
    parser.add_argument("faults", nargs="*", metavar="ID", help=help)
    help = "four checkpoints, one layer and one prompt of each"
    parser.add_argument("--quick", action="store_true", help=help)
    help = "prompts of each mutant; default: 1"
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help=help)
    cores = os.cpu_count() or 1
    help = f"processes at once; default: one for each processor, here {cores}"
    parser.add_argument("--jobs", type=positive, default=cores, metavar="N", help=help)
    help = "also print what was missed, and how"
    parser.add_argument("--verbose", action="store_true", help=help)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Run `refmoe mutate` and return its exit code."""
    select(args.faults)  # refuses an unknown one before anything is printed

    def show(fault: Any, score: Any, seconds: float) -> None:
        if args.json:
            return
        marks = f"{score.detected:>3} {score.placed:>3} {score.named:>3} of {score.runs:<3}"
        small = ", ".join(f"{p} {x:.2g}" for p, x in score.smallest.items())
        print(f"{marks} {seconds:6.0f} s  {fault.id:<28}{f'down to {small}' if small else ''}")
        for line in score.missed[:MISSED] if args.verbose else ():
            print(f"      {line}")
        sys.stdout.flush()

    if not args.json:
        print(", ".join(SHARES))
    document = mutate.run(args.quick, args.faults, args.seeds, args.jobs, show)
    if args.json:
        print_json(document)
    else:
        _show(document)
    return 0 if all(document[key] >= least for key, least in LEAST.items()) else 1


def _show(document: dict[str, Any]) -> None:
    # rounded downwards, so that 100.0% is all of them
    cut = {key: int(1000 * document[key]) / 10 for key in SHARES}
    shares = ", ".join(f"{key} {share:.1f}%" for key, share in cut.items())
    print(f"{document['runs']} mutants of {len(document['faults'])} faults: {shares}")
    if document["inert_everywhere"]:
        print(f"without effect anywhere: {', '.join(document['inert_everywhere'])}")
