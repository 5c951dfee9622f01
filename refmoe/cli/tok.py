"""`refmoe tok`: text or messages to token ids, or back; compare with another engine's ids."""

import json
from argparse import Namespace
from pathlib import Path

from refmoe.cli.inputs import read_messages
from refmoe.cli.options import add_json, add_model, refuse
from refmoe.cli.parser import Parser, describe
from refmoe.cli.show import print_json
from refmoe.files import InputError
from refmoe.run.load import golden_folder
from refmoe.text.explain import explain
from refmoe.text.theirs import read_theirs
from refmoe.text.tokenizer import Tokenizer


def add(parser: Parser) -> None:
    """Add the options of `refmoe tok` to its parser."""
    describe(
        parser,
        "Print the token ids of a text, or of messages rendered by the chat template. With "
        "--against, say how another engine's ids differ from these and why (exit code 1).",
        [
            'refmoe tok "Good morrow"',
            "refmoe tok --decode 12,345",
            "refmoe tok --messages messages.json --against theirs.json",
        ],
    )
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the text; with --decode: ids")
    help = "TEXT is token ids, with spaces or commas between; print their text"
    parser.add_argument("--decode", action="store_true", help=help)
    help = "turn special tokens that TEXT spells, like <|im_end|>, into their ids"
    parser.add_argument("--special", action="store_true", help=help)
    help = "other ids: a JSON list, or what a server returned; explain how they differ"
    parser.add_argument("--against", type=Path, metavar="FILE", help=help)
    add_model(parser)
    add_json(parser)
    group = parser.add_argument_group("messages instead of a text")
    help = "JSON file: a list of chat messages"
    group.add_argument("--messages", type=Path, metavar="FILE", help=help)
    help = "JSON file: declarations of tools, rendered with the messages"
    group.add_argument("--tools", type=Path, metavar="FILE", help=help)
    help = "end after the messages, without the beginning of a reply"
    group.add_argument("--no-generation-prompt", action="store_true", help=help)
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Run `refmoe tok` and return its exit code."""
    folder = args.model or golden_folder() / "tiny-k2"
    words = Tokenizer.load(folder)
    ids, text = _input(args, folder, words)
    pieces = [words.token_bytes(i).decode("utf-8", "backslashreplace") for i in ids]
    theirs = read_theirs(args.against) if args.against else None
    found = (
        explain(words, ids, theirs.ids) if theirs is not None and theirs.ids is not None else None
    )
    fewer = theirs is not None and theirs.ids is None and theirs.number != len(ids)
    if args.json:
        document: dict[str, object] = {"text": text, "tokens": ids, "pieces": pieces}
        document["difference"] = found._asdict() if found else None
        if theirs is not None:
            document["theirs"] = theirs._asdict()
        print_json(document)
    elif theirs is not None and theirs.ids is None:
        print(_compare_counts(len(ids), theirs.number))
    elif found:
        print(f"{found.cause}: at byte {found.byte}, token {found.token}: {found.explanation}")
    elif theirs is not None:
        print(f"the same {len(ids)} tokens")
    elif args.decode:
        print(text)
    else:
        print(" ".join(map(str, ids)))
        print(" ".join(json.dumps(piece, ensure_ascii=False) for piece in pieces))
    return 1 if found or fewer else 0


def _compare_counts(here: int, there: int) -> str:
    """Return a sentence about two numbers of tokens, which is all that a response told."""
    if here == there:
        return f"{there} tokens in both; the response has no ids, so only their number is compared"
    hint = "; one more there may be a BOS in front" if there == here + 1 else ""
    return (
        f"{here} tokens here, {there} there; the response has no ids, so only their number is "
        f"compared{hint}"
    )


def _input(args: Namespace, folder: Path, words: Tokenizer) -> tuple[list[int], str]:
    """Return ids and text of what was given: a text, ids, or messages."""
    if (args.text is None) == (args.messages is None):
        raise InputError("give a TEXT or --messages FILE")
    if args.messages:
        refuse(args, ("--decode", "--special"), "is for a TEXT, not for --messages")
        from refmoe.text.messages import read_tools
        from refmoe.text.template import ChatTemplate  # Jinja, which a TEXT needs not

        messages = read_messages(args.messages)
        tools = read_tools(args.tools) if args.tools else None
        template = ChatTemplate.load(folder)
        prompt = template.encode(words, messages, tools, not args.no_generation_prompt)
        return prompt.tokens, prompt.text
    refuse(args, ("--tools", "--no-generation-prompt"), "is for --messages FILE")
    if args.decode:
        refuse(args, ("--special",), "reads special tokens in a text; --decode takes ids")
        try:
            ids = [int(i) for i in args.text.replace(",", " ").split()]
        except ValueError:
            raise InputError("--decode takes token ids separated by spaces or commas") from None
        return ids, words.decode(ids)
    return words.encode(args.text, "all" if args.special else ()), args.text
