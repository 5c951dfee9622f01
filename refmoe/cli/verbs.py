"""The verbs of the command line, and the frame in which one of them runs.

Without --model the verbs use the embedded tiny-k2. With --json they print one JSON document. Exit
codes: 0 fine, 1 differs or fails, 2 could not tell or bad use, 130 interrupted.

A verb's file has `add(parser)`, which adds its arguments and names the function that does the work:
`run(args)`, which returns the exit code. Only the file of the verb that is called is imported, so
it may import whatever its verb needs.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from importlib import import_module

from refmoe.cli.parser import Parser
from refmoe.ctrl_c import ctrl_c
from refmoe.files import InputError
from refmoe.version import __version__

VERBS = {  # verb: its summary in `refmoe --help`; refmoe/cli/VERB.py has the rest
    "generate": "continue a prompt",
    "chat": "talk with the model through its own chat template",
    "tok": "turn text or messages into token ids or back; compare ids with another engine's",
    "inspect": "list a checkpoint's tensors, formats, bytes and parameters",
    "trace": "write intermediate tensors of one forward pass to a safetensors file",
    "sweep": "compute many prompts layer by layer, reading each weight once; resumable",
    "check": "find where another engine's dump first goes wrong, and why",
    "golden": "compare refmoe with other engines' stored results, or store a checkpoint's own",
    "lint": "find what is wrong with a checkpoint, without running it",
    "mutate": "plant every known fault and count how many `check` finds",
    "bench": "measure the speed of this machine, and the power of `check`",
    "plan": "predict what lives where in memory, whether it fits, and how fast it will be",
    "export": "convert safetensors to GGUF and back, and INT4 to bf16 and back",
    "quant": "compare two files of one model; measure what a format costs",
    "tiny": "write a random checkpoint in Hugging Face layout",
    "completion": "print a script that completes commands in bash, zsh or fish",
}

EPILOG = """\
Without --model, verbs use the embedded tiny-k2. `refmoe VERB --help` explains a verb.

examples:
  refmoe generate "ROMEO:"
  refmoe check dump.safetensors --engine vllm
  refmoe plan --preset laptop-64gb-nvme"""


def run(argv: Sequence[str] | None = None) -> int:
    """Parse a command line, by default `sys.argv`, run its verb and return the exit code."""
    try:
        args = make_parser().parse_args(argv)
        code = _run_verb(args)
        sys.stdout.flush()
        return code
    except InputError as e:
        print(f"refmoe: {e}", file=sys.stderr)
        return 2
    except MemoryError as e:  # of a card, too: CuPy's says how much was asked for, and the limit
        print(f"refmoe: out of memory: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:  # a folder that is not there, a full disk
        print(f"refmoe: {e}", file=sys.stderr)
        return 2


def make_parser() -> Parser:
    """Return the parser of `refmoe`; a verb's own parser is filled when it is first used."""
    top = Parser("refmoe", description="The reference engine for Moonshot's Kimi K2 family.")
    top.epilog = EPILOG
    top.add_argument("--version", action="version", version=f"refmoe {__version__}")
    top.set_defaults(json=False)  # also of verbs without --json
    verbs = top.add_subparsers(required=True, metavar="VERB", title="verbs")
    for verb, summary in VERBS.items():
        verbs.add_parser(verb, help=summary, fill=partial(_fill, verb))
    return top


def _fill(verb: str, parser: Parser) -> None:
    """Import the verb's file and have it add its arguments."""
    import_module(f"refmoe.cli.{verb}").add(parser)


def _run_verb(args: Namespace) -> int:
    from refmoe.model.numerics import NonFinite  # with NumPy, which --version does not need

    ctrl_c.does = "raise"  # from here on there may be something to clean up
    try:
        code: int = args.run(args)
    except NonFinite as e:
        print(f"refmoe: {e}", file=sys.stderr)
        return 1
    return code
