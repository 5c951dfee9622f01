"""`refmoe chat`: talk with a model through its own chat template."""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

from refmoe.cli.generate import sampling
from refmoe.cli.models import open_model
from refmoe.cli.options import (
    add_generation,
    add_model,
    add_precision,
    add_sampling,
    check_sampling,
)
from refmoe.cli.parser import Parser, describe
from refmoe.ctrl_c import ctrl_c
from refmoe.run.dialogue import Dialogue, interact
from refmoe.run.generate import generation_decoder
from refmoe.text.messages import read_tools


def add(parser: Parser) -> None:
    """Add the options of `refmoe chat` to its parser."""
    describe(
        parser,
        "Talk with the model: read lines from standard input, answer each through the "
        "checkpoint's own chat template. /help lists what else can be typed.",
        ["refmoe chat", "echo 'Who art thou?' | refmoe chat --max-new-tokens 40"],
    )
    help = "give this system message instead of the template's own"
    parser.add_argument("--system", metavar="TEXT", help=help)
    help = "JSON file: declarations of tools that the model may call"
    parser.add_argument("--tools", type=Path, metavar="FILE", help=help)
    help = "K2.5 and later: reason before answering, or not; default: as the template does"
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, help=help)
    help = "cut each reply after N tokens; default: no limit"
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=help)
    add_model(parser)
    add_sampling(parser, temperature=0.6)
    add_precision(parser)
    add_generation(parser)
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Run `refmoe chat` and return its exit code."""
    ctrl_c.does = "leave"  # until there is a prompt: loading leaves nothing behind
    check_sampling(args)
    model = open_model(args)
    tools = read_tools(args.tools) if args.tools else None
    variables = {} if args.thinking is None else {"thinking": args.thinking}
    decoder = generation_decoder(model, args.int4 or "fast", args.cache)
    dialogue = Dialogue(model, model.template, args.system, tools, variables, decoder=decoder)
    interact(dialogue, sampling(args), args.seed, args.max_new_tokens, sys.stdout)
    if model.store:
        model.store.close()
    return 0
