"""Many turns, the cache behind them, and a real terminal."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

import refmoe
from refmoe.files import InputError
from refmoe.run import generate
from refmoe.run.dialogue import Dialogue, printable
from refmoe.text.reply import Problem, collect
from refmoe.text.template import ChatTemplate
from tests.conftest import ROOT, heed_ctrl_c

MODEL = refmoe.load()
TEMPLATE = ChatTemplate.load(MODEL.checkpoint.path)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_turns_become_history_and_only_new_tokens_are_computed(monkeypatch):
    seen: list[int] = []
    original = generate.prefill

    def spy(decoder, tokens, memory, chunk):  # type: ignore[no-untyped-def]
        seen.append(len(tokens))
        return original(decoder, tokens, memory, chunk)

    monkeypatch.setattr(generate, "prefill", spy)
    dialogue = Dialogue(MODEL, TEMPLATE)
    replies = [collect(dialogue.ask(user(t), max_new_tokens=12)) for t in ("Who art thou?", "Why?")]
    roles = [m["role"] for m in dialogue.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert [m["content"] for m in dialogue.messages[1::2]] == [r.content for r in replies]
    prompt = TEMPLATE.encode(MODEL.tokenizer, dialogue.messages[:3]).tokens
    assert seen[1] < len(prompt) / 2  # the first turn was in the cache

    # the same reply as without any cache
    fresh = Dialogue(MODEL, TEMPLATE, messages=[])
    fresh.messages = dialogue.messages[:2]
    assert collect(fresh.ask(user("Why?"), max_new_tokens=12)) == replies[1]


def test_the_cache_holds_what_it_is_said_to_hold():
    dialogue = Dialogue(MODEL, TEMPLATE, system="Thou art a fool.")
    list(dialogue.ask(user("Speak."), max_new_tokens=5))
    rows = dialogue.memory[0].length
    assert rows == len(dialogue.remembered)
    fresh = MODEL.decoder.caches()
    MODEL.logits(dialogue.remembered)
    MODEL.decoder.logits(dialogue.remembered, fresh)
    for a, b in zip(dialogue.memory, fresh, strict=True):
        size = np.abs(b.c_kv).max()
        assert np.abs(a.c_kv - b.c_kv).max() <= 2e-5 * size  # the bound of float32 goldens
    assert MODEL.tokenizer.decode(dialogue.remembered).startswith(
        "<|im_system|>system<|im_middle|>Thou art a fool.<|im_end|>"
    )


def test_a_stopped_reply_leaves_the_conversation_as_it_was():
    dialogue = Dialogue(MODEL, TEMPLATE)
    list(dialogue.ask(user("Who art thou?"), max_new_tokens=4))
    before = list(dialogue.messages)
    reply = dialogue.ask(user("Speak on."))
    next(reply)
    reply.close()
    assert dialogue.messages == before
    assert dialogue.memory[0].length == len(dialogue.remembered)
    assert collect(dialogue.ask(user("Why?"), max_new_tokens=4)).content


def test_a_full_context_is_said_and_nothing_is_lost():
    dialogue = Dialogue(MODEL, TEMPLATE)
    with pytest.raises(InputError, match=r"the context holds 4096.*shorten the message, or /reset"):
        list(dialogue.ask(user("word " * 5000)))
    assert dialogue.messages == []
    empty = len(TEMPLATE.encode(MODEL.tokenizer, [user("")]).tokens)
    fill = "a" + " a" * (4096 - empty - 3)
    size = len(TEMPLATE.encode(MODEL.tokenizer, [user(fill)]).tokens)
    assert 4090 <= size < 4096
    endless = replace(MODEL)
    endless.__dict__["stop_ids"] = frozenset()  # only the context ends its replies
    *_, last = Dialogue(endless, TEMPLATE).ask(user(fill))
    assert last == Problem("the context of 4096 tokens is full; /reset begins anew")


def test_tool_calls_wait_for_their_results():
    dialogue = Dialogue(MODEL, TEMPLATE)
    call = {"id": "functions.a:0", "function": {"name": "a", "arguments": "{}"}}
    dialogue.messages = [
        user("?"),
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
    ]
    assert len(dialogue.waiting) == 2
    dialogue.messages.append({"role": "tool", "tool_call_id": "functions.a:0", "content": "1"})
    assert dialogue.waiting == [call]


def own_terminal() -> None:
    heed_ctrl_c()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


COMMAND = [sys.executable, "-m", "refmoe"]


class Terminal:
    """`refmoe chat` on a pseudo-terminal."""

    def __init__(self, *args: str, command: Sequence[str] = COMMAND):
        self.fd, inner = pty.openpty()
        self.process = subprocess.Popen(
            [*command, "chat", *args],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "INPUTRC": os.devnull},
            preexec_fn=own_terminal,
        )
        os.close(inner)
        self.shown = ""

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What is shown up to a match; it is then taken off."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown[-500:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.fd, 65536).decode("utf-8", "replace")
                except OSError:  # the other side has closed
                    assert re.search(pattern, self.shown), self.shown[-500:]
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, text: str) -> None:
        data = text.encode()
        while data:  # a terminal takes so much at a time
            data = data[os.write(self.fd, data[:1000]) :]
            if len(data) > 1000:
                self.shown += os.read(self.fd, 65536).decode("utf-8", "replace")

    def wait(self) -> int:
        end = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.fd, 65536).decode("utf-8", "replace")
                except OSError:
                    break
        return self.process.wait(10)


@pytest.fixture
def terminal():
    chat = Terminal("--max-new-tokens", "40", "--seed", "3")
    yield chat
    if chat.process.poll() is None:
        chat.process.kill()
        chat.process.wait()
    os.close(chat.fd)


def test_it_answers_in_dialogue(terminal):
    terminal.until("> ")
    terminal.type("\n")  # an empty line asks nothing
    terminal.until("> ")
    terminal.type("Who art thou?\n")
    shown = terminal.until(r"\n> ")
    reply = shown.split("Who art thou?")[1]
    assert re.search(r"[a-z]{2,}", reply)
    assert "think>" not in reply
    terminal.type("/reset\n")
    terminal.until(r"\[a new conversation\]")
    terminal.type("/what\n")
    terminal.until("/exit")
    terminal.type("/exit\n")
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.shown


def test_ctrl_c_stops_the_reply_then_leaves(terminal):
    terminal.until("> ")
    terminal.type("Tell me of thy love.\n")
    terminal.until("love.\r\n.")  # the reply has begun
    os.killpg(terminal.process.pid, signal.SIGINT)
    shown = terminal.until(r"\n> ")
    assert "[stopped; this turn is forgotten]" in shown
    for _ in range(20):  # readline may miss a signal in the moment after it shows its prompt
        os.killpg(terminal.process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            terminal.process.wait(0.5)
            break
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.shown


# Python itself dies of Ctrl-C until it has come to the command's first line, which this one tells
TELLS = [
    sys.executable,
    "-c",
    "import sys; from refmoe.cli import ctrl_c, main; ctrl_c.listen(); print('here', flush=True); "
    "sys.exit(main())",
]


@pytest.mark.parametrize(
    ("typed", "until", "delay", "codes"),
    [
        ("", "here", 0, {130}),
        ("", "here", 0.3, {130, 0}),
        ("", "> ", 0, {0}),
        ("Tell me of thy love.\n", "love.\r\n", 0, {0}),
        ("Tell me of thy love.\n", "love.\r\n.", 0.05, {0}),
        ("/exit\n", "/exit\r\n", 0, {0}),
    ],
)
def test_ctrl_c_every_few_milliseconds_ends_it_with_its_own_code(typed, until, delay, codes):
    """While it loads, at the prompt, in a reply, between two handlers, and while Python ends."""
    chat = Terminal("--max-new-tokens", "40", "--seed", "3", command=TELLS)
    try:
        if typed:
            chat.until("> ")
            chat.type(typed)
        chat.until(until)
        time.sleep(delay)
        shown = chat.shown
        end = time.monotonic() + 60
        while chat.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(chat.process.pid, signal.SIGINT)
            if select.select([chat.fd], [], [], 0.003)[0]:
                with contextlib.suppress(OSError):  # it has closed its side
                    shown += os.read(chat.fd, 65536).decode("utf-8", "replace")
        assert chat.process.poll() in codes, shown
        assert "Traceback" not in shown
        assert "Exception" not in shown
    finally:
        chat.process.kill()
        chat.process.wait()
        os.close(chat.fd)


def test_end_of_input_leaves_with_a_clean_line(terminal):
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.wait() == 0
    assert terminal.shown.endswith("\n")
    assert "Traceback" not in terminal.shown


def test_a_very_long_line_is_too_long_and_said_so(terminal):
    terminal.until("> ")
    terminal.type("word " * 6000 + "\n")
    terminal.until(r"the context holds 4096")
    terminal.until("> ")
    terminal.type("Art thou there?\n")
    terminal.until(r"there\?\r\n[^\[]")
    terminal.type("/exit\n")
    assert terminal.wait() == 0


def test_lines_from_a_pipe_are_answered_without_a_prompt():
    done = subprocess.run(
        [sys.executable, "-m", "refmoe", "chat", "--max-new-tokens", "8"],
        input="Who art thou?\n//reset is no command\n/result 3\n/what\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert ">" not in done.stdout
    assert "a new conversation" not in done.stdout
    assert done.stdout.count("[cut at 8 tokens]") == 2
    assert "[no tool call waits for a result]" in done.stdout
    assert "//TEXT         say /TEXT" in done.stdout


def test_a_terminal_gets_no_control_characters():
    class Tty:
        def isatty(self) -> bool:
            return True

    shown = printable("a\x1b[31mb\r\n\tü€", Tty())  # type: ignore[arg-type]
    assert shown == "a\ufffd[31mb\ufffd\n\tü€"
