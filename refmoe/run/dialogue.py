"""Hold a conversation of many turns: its history, its caches, and the loop at a terminal.

Each turn renders the whole history anew, as the template wants it, and computes only what the
cache does not hold: the tokens after the longest prefix that both share. A turn that is
interrupted or does not fit leaves the conversation as it was before.
"""

import contextlib
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TextIO

from refmoe.ctrl_c import ctrl_c
from refmoe.files import InputError
from refmoe.model.cache import LatentCache
from refmoe.model.decoder import Decoder
from refmoe.run.generate import context_length, generate_tokens, generation_decoder
from refmoe.run.load import Model
from refmoe.run.sampler import Sampling
from refmoe.text.reply import (
    Event,
    Parser,
    Problem,
    Text,
    ToolCall,
    collect,
    ends_in_thought,
)
from refmoe.text.template import ChatTemplate
from refmoe.text.terminal import printable

with contextlib.suppress(ImportError):  # not everywhere; lines can be edited, and be long, with it
    import readline  # noqa: F401

HELP = """\
/reset         forget the conversation
/result TEXT   the result of the first tool call that waits for one
//TEXT         say /TEXT
/help          this
/exit          leave; so do Ctrl-C and the end of input (Ctrl-C during a reply stops the reply)"""


@dataclass
class Dialogue:
    """A conversation: its messages, and the latent caches that hold their beginning."""

    model: Model
    template: ChatTemplate
    system: str | None = None
    tools: Sequence[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)  # the template's own: K2.5's thinking
    decoder: Decoder | None = None  # None: as `generation_decoder` makes it
    messages: list[dict[str, Any]] = field(default_factory=list)
    memory: list[LatentCache] = field(default_factory=list)
    remembered: list[int] = field(default_factory=list)  # the tokens that `memory` holds

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.memory, self.remembered = self._decoder.caches(), []

    @cached_property
    def _decoder(self) -> Decoder:
        return generation_decoder(self.model) if self.decoder is None else self.decoder

    @property
    def waiting(self) -> list[dict[str, Any]]:
        """The tool calls of the last assistant message that have no result yet."""
        for i, message in reversed(list(enumerate(self.messages))):
            if message["role"] == "assistant":
                return list(message.get("tool_calls", []))[len(self.messages) - i - 1 :]
        return []

    def ask(
        self,
        message: dict[str, Any],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> Generator[Event, None, None]:
        """Add a message and yield the reply as it is made; both are history once it is whole.

        Raises `InputError` if the conversation with this message fills the context.
        """
        messages = [*self.messages, message]
        prompt = self.template.encode(self.model.tokenizer, messages, self.tools, **self.variables)
        context = context_length(self._decoder)
        if len(prompt.tokens) >= context:
            raise InputError(
                f"the conversation would have {len(prompt.tokens)} tokens, the context holds "
                f"{context}, and a reply needs some; shorten the message, or /reset"
            )
        parser, words = Parser(ends_in_thought(prompt.text)), self.model.tokenizer.stream()
        events: list[Event] = []
        made = 0
        for token in self._tokens(prompt.tokens, max_new_tokens, sampling, seed):
            made += 1
            ctrl_c.look()
            for event in parser.feed(words.feed(token)):
                events.append(event)
                yield event
        for event in (*parser.feed(words.finish()), *parser.finish()):
            events.append(event)
            yield event
        if len(prompt.tokens) + made > context:
            yield Problem(f"the context of {context} tokens is full; /reset begins anew")
        elif made == max_new_tokens:
            yield Problem(f"cut at {made} tokens")
        self.messages = [*messages, collect(events).message()]

    def _tokens(
        self, prompt: list[int], limit: int | None, sampling: Sampling, seed: int
    ) -> Iterator[int]:
        """Yield new tokens; only what the caches do not hold of the prompt is computed."""
        same = 0
        for a, b in zip(prompt[:-1], self.remembered, strict=False):
            if a != b:
                break
            same += 1
        same = min(same, *(cache.length for cache in self.memory))  # a step may have been stopped
        tokens = list(prompt)
        self.remembered = tokens[:same]  # and no more, wherever this is stopped
        for cache in self.memory:
            cache.truncate(same)
        try:
            for token in generate_tokens(
                self._decoder,
                prompt[same:],
                max_new_tokens=limit,
                sampling=sampling,
                seed=seed,
                stop=self.model.stop_ids,
                memory=self.memory,
            ):
                tokens.append(token)
                yield token
        finally:  # also where the reply is stopped: what was computed stays of use
            self.remembered = tokens[: self.memory[0].length]


def interact(
    dialogue: Dialogue,
    sampling: Sampling,
    seed: int,
    max_new_tokens: int | None,
    out: TextIO,
) -> None:
    """Read lines from standard input and answer them until the end of input or /exit.

    Ctrl-C leaves at the prompt, and in a reply stops it, after the product under way. One that
    comes before a reply begins stops that reply; more of them while a reply is being stopped are
    the same one.
    """
    ctrl_c.does = "wait"
    turn = 0
    while True:
        try:
            ctrl_c.does = "last"
            line = input("> " if sys.stdin.isatty() else "").strip()
            ctrl_c.does = "wait"
        except (EOFError, KeyboardInterrupt):
            ctrl_c.does = "wait"
            print(file=out)
            return
        except UnicodeDecodeError:
            ctrl_c.does = "wait"
            print("[that line is not UTF-8]", file=out)
            continue
        if not line:
            continue
        said = line[1:] if line.startswith("//") else line
        message: dict[str, Any] = {"role": "user", "content": said}
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            dialogue.reset()
            turn = 0
            print("[a new conversation]", file=out)
            continue
        if command == "/result" and not dialogue.waiting:
            print("[no tool call waits for a result]", file=out)
            continue
        if command == "/result":
            call = dialogue.waiting[0]
            name = call["function"]["name"]
            message = {"role": "tool", "tool_call_id": call["id"], "name": name, "content": rest}
            if len(dialogue.waiting) > 1:  # the model goes on when all have come
                dialogue.messages.append(message)
                print(f"[{len(dialogue.waiting)} more]", file=out)
                continue
        elif command.startswith("/") and said == line:
            print(HELP, file=out)
            continue
        events = dialogue.ask(
            message, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed + turn
        )
        try:
            show(events, out)
            turn += 1
        except KeyboardInterrupt:
            events.close()
            print("[stopped; this turn is forgotten]", file=out)
        except InputError as e:
            print(f"[{e}]", file=out)
        ctrl_c.came = False


def show(events: Iterator[Event], out: TextIO) -> None:
    """Print a reply as it comes: reasoning dimmed, tool calls and problems in brackets."""
    dim, plain = ("\x1b[2m", "\x1b[0m") if out.isatty() else ("", "")
    kind = ""
    try:
        for event in events:
            match event:
                case Text(now, text):
                    if kind == "reasoning" and now == "content":
                        print(plain, file=out)
                    if kind != now == "reasoning":
                        out.write(dim)
                    kind = now
                    out.write(printable(text, out))
                case ToolCall(id, _, arguments):
                    print(printable(f"\n[{id} {arguments}]", out), file=out)
                case Problem(what):
                    print(f"\n[{printable(what, out)}]", file=out)
            out.flush()
    finally:  # also where the reply is stopped: the terminal must not stay dim
        print(plain if kind == "reasoning" else "", file=out)
