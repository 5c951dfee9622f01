"""Read what a model answers: reasoning, content and tool calls, in whatever pieces text arrives.

An answer of K2 is, without line breaks,

    <think>reasoning</think>content<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:
    INDEX<|tool_call_argument_begin|>{…}<|tool_call_end|>…<|tool_calls_section_end|>

where `<think>` may already be the end of the prompt: K2.5 and later.

Sources: MoonshotAI/Kimi-K2, `docs/tool_call_guidance.md`; vLLM's reader for K2, which lets a
tool-calls section end a thought.
"""

import enum
import json
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from refmoe.text.messages import NAME, shorten


class Marker(enum.StrEnum):
    """The markers that divide an answer."""

    THINK = "<think>"
    END_THINK = "</think>"
    SECTION = "<|tool_calls_section_begin|>"
    CALL = "<|tool_call_begin|>"
    ARGUMENTS = "<|tool_call_argument_begin|>"
    END_CALL = "<|tool_call_end|>"
    END_SECTION = "<|tool_calls_section_end|>"


_MARKER = re.compile("|".join(map(re.escape, Marker)))
_ID = re.compile(rf"functions\.({NAME}):[0-9]+")


class Text(NamedTuple):
    """A piece of the answer's text."""

    kind: Literal["reasoning", "content"]
    text: str


class ToolCall(NamedTuple):
    """A whole, well-formed call of a tool."""

    id: str  # functions.NAME:INDEX
    name: str
    arguments: str  # the text of a JSON object, as the model wrote it


class Problem(NamedTuple):
    """A fault in the form of an answer, in words."""

    what: str


Event = Text | ToolCall | Problem


class Reply(NamedTuple):
    """An answer, read to its end. Text that fits no form is whole in `content` or `reasoning`."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    problems: tuple[str, ...] = ()

    def message(self) -> dict[str, Any]:
        """Return the assistant message that a template renders to the same text again."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message


def parse(text: str, in_thought: bool = False) -> Reply:
    """Read a whole answer, without its stop token.

    `in_thought` says that its prompt ended inside a thought (`ends_in_thought`).
    """
    parser = Parser(in_thought)
    return collect([*parser.feed(text), *parser.finish()])


def collect(events: Iterable[Event]) -> Reply:
    """Return the reply that a stream of events amounts to."""
    texts: dict[str, list[str]] = {"reasoning": [], "content": []}
    calls, problems = [], []
    for event in events:
        match event:
            case Text(kind, text):
                texts[kind].append(text)
            case ToolCall():
                calls.append(event)
            case Problem(what):
                problems.append(what)
    return Reply("".join(texts["reasoning"]), "".join(texts["content"]), tuple(calls), (*problems,))


def ends_in_thought(prompt: str) -> bool:
    """Return whether an answer to this prompt begins inside a thought, as K2.5's do."""
    return prompt.rstrip().endswith(Marker.THINK)


class Parser:
    """Turn an answer into events, the same ones for every way to cut it, never half a marker.

    Text goes in with `feed`, piece by piece, and `finish` ends it. The place in the answer is one
    of: start, thought, content, section (between calls), id, arguments, after (behind a section).
    What does not fit its place is kept as text, and reported as a Problem, once for each kind.
    """

    def __init__(self, in_thought: bool = False):
        self._at = "thought" if in_thought else "start"
        self._held = ""  # perhaps the beginning of a marker
        self._call: list[str] = []  # a call so far, its markers included
        self._calls = self._sections = 0  # calls in this section, well formed or not
        self._reported: set[str] = set()
        self._events: list[Event] = []

    def feed(self, piece: str) -> list[Event]:
        """Read a piece of the answer → the events that it completes."""
        text, at = self._held + piece, 0
        for found in _MARKER.finditer(text):
            self._text(text[at : found.start()])
            self._marker(Marker(found[0]))
            at = found.end()
        held = text.rfind("<", at)  # a marker's first character, and only that
        if held < 0 or not any(marker.startswith(text[held:]) for marker in Marker):
            held = len(text)
        self._text(text[at:held])
        self._held = text[held:]
        return self._taken()

    def finish(self) -> list[Event]:
        """End the answer → what was held back, and problems with what is missing."""
        self._text(self._held)
        self._held = ""
        if self._at == "thought":
            self._report(f"the thought is not closed: no {Marker.END_THINK}")
        if self._at in ("id", "arguments"):
            self._give_up(f"a tool call is not closed: no {Marker.END_CALL}")
        if self._at == "section":
            self._report(f"the tool calls are not closed: no {Marker.END_SECTION}")
        return self._taken()

    def _text(self, text: str) -> None:
        if not text:
            return
        if self._at in ("id", "arguments"):
            self._call.append(text)
            return
        if self._at == "start":
            self._at = "content"
        elif self._at == "section":
            self._report("text between tool calls")
        elif self._at == "after":
            self._report("text behind the tool calls")
        self._events.append(Text("reasoning" if self._at == "thought" else "content", text))

    def _marker(self, marker: Marker) -> None:
        match self._at, marker:
            case "start", Marker.THINK:
                self._at = "thought"
            case "thought", Marker.END_THINK:
                self._at = "content"
            case (("start" | "thought" | "content" | "after"), Marker.SECTION):
                if self._at == "thought":
                    self._report(f"tool calls inside a thought: no {Marker.END_THINK}")
                if self._sections:
                    self._report("a second section of tool calls")
                self._at, self._calls = "section", 0
                self._sections += 1
            case (("section" | "id" | "arguments"), Marker.CALL):
                if self._at != "section":
                    self._give_up(f"a tool call is not closed: no {Marker.END_CALL}")
                self._at, self._call = "id", [marker]
                self._calls += 1
            case "id", Marker.ARGUMENTS:
                self._call = ["".join(self._call), marker]
                self._at = "arguments"
            case (("id" | "arguments"), Marker.END_CALL):
                self._end_call()
            case (("section" | "id" | "arguments"), Marker.END_SECTION):
                if self._at != "section":
                    self._give_up(f"a tool call is not closed: no {Marker.END_CALL}")
                self._at = "after"
                if not self._calls:
                    self._report("a section without tool calls")
                    self._events.append(Text("content", Marker.SECTION + Marker.END_SECTION))
            case (("id" | "arguments"), _):
                self._call.append(marker)  # an argument may well speak of thoughts
            case _:
                self._report(f"{marker} out of place")
                self._text(marker)

    def _end_call(self) -> None:
        begun, arguments = self._call[0], "".join(self._call[2:])
        id = begun.removeprefix(Marker.CALL)
        name = _ID.fullmatch(id)
        if self._at == "id":
            fault = f"a tool call without {Marker.ARGUMENTS}"
        elif not name:
            fault = f"a tool call's id is {shorten(id)}, expected functions.NAME:INDEX"
        elif not _is_object(arguments):
            fault = f"the arguments of {shorten(id)} are no JSON object"
        else:
            self._events.append(ToolCall(id, name[1], arguments))
            self._call, self._at = [], "section"
            return
        self._call.append(Marker.END_CALL)
        self._give_up(fault)

    def _give_up(self, fault: str) -> None:
        """Treat what was to be a call as content, and report why."""
        self._report(fault)
        self._events.append(Text("content", "".join(self._call)))
        self._call, self._at = [], "section"

    def _report(self, what: str) -> None:
        if what not in self._reported:
            self._reported.add(what)
            self._events.append(Problem(what))

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text, parse_constant=int), dict)  # int("NaN") is refused
    except (ValueError, RecursionError):
        return False
