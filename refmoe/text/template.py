"""Turn messages into text and tokens, with the chat template that a checkpoint brings.

    messages, tools ─ template ─ text ─ tokens            <|im_user|>user<|im_middle|>…<|im_end|>…

**The user's text is data**: in `ChatTemplate.encode` only the template's own special tokens count
as such; where a message or a tool spells one, it stays text. The template itself is a program by
strangers, and runs in the sandbox of `text/sandbox.py`.

Sources: Hugging Face's chat templating (where templates are stored, and their variables).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refmoe.files import InputError, read_object, read_text
from refmoe.text.messages import check_messages, check_tools, copy_plain
from refmoe.text.tokenizer import Tokenizer

SOURCE_LIMIT = 2**20  # characters of a template; K2's have 4,000


class Prompt(NamedTuple):
    """A conversation as a template wrote it, ready for a model."""

    text: str
    tokens: list[int]


class ChatTemplate:
    """A Jinja chat template; `name` says in errors where it came from.

    `variables` are strings that the template may use, as bos_token. Raises `InputError` for a
    source that is too long or that Jinja cannot compile.
    """

    def __init__(self, source: str, name: str = "chat template", **variables: str):
        from refmoe.text.sandbox import compile_template  # Jinja, which few verbs need

        if len(source) > SOURCE_LIMIT:
            raise InputError(
                f"{name}: {len(source):,} characters, a template has up to {SOURCE_LIMIT:,}"
            )
        self.name, self.source = name, source
        self.variables = {"documents": None, **variables}  # bos_token and the like
        self._code = compile_template(source, name)

    @classmethod
    def load(cls, folder: str | Path) -> "ChatTemplate":
        """Read a checkpoint's template: `chat_template.jinja`, or from `tokenizer_config.json`.

        Raises `InputError` if the folder has neither.
        """
        file, config = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
        raw = read_object(config) if config.is_file() else {}
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {k: t.get("content") if isinstance(t := raw.get(k), dict) else t for k in names}
        special = {k: t for k, t in tokens.items() if isinstance(t, str)}
        if file.is_file():
            return cls(read_text(file), str(file), **special)
        source = raw.get("chat_template")
        if isinstance(source, list):  # several, each with a name
            named = (t for t in source if isinstance(t, dict) and t.get("name") == "default")
            source = next(named, {}).get("template")
        if not isinstance(source, str):
            raise InputError(
                f"{folder}: no chat template (no chat_template.jinja, and none in "
                f"{config.name}); put the published model's there, or use `refmoe generate`"
            )
        return cls(source, f"{config}: chat_template", **special)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "ChatTemplate":
        """Return the template in a GGUF's metadata. Raises `InputError` if there is none."""
        source, tokens = (
            metadata.get(f"tokenizer.{key}") for key in ("chat_template", "ggml.tokens")
        )
        if not isinstance(source, str):
            raise InputError("the GGUF has no chat template; use `refmoe generate`")
        special = {}
        keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        for name, key in keys.items():
            i = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if isinstance(i, int) and isinstance(tokens, list) and 0 <= i < len(tokens):
                special[f"{name}_token"] = str(tokens[i])
        return cls(source, "tokenizer.chat_template", **special)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the conversation as one text, as `apply_chat_template(tokenize=False)` does.

        `variables` are the template's own: K2.5's `thinking=False` (no thought) and `tools_ts_str`
        (tools as TypeScript; without it they are JSON), K2.6's `preserve_thinking=True`.
        A field that is None counts as absent, `content` excepted. Half a surrogate pair, which no
        tokenizer can encode, becomes U+FFFD. Parts other than text are for the template to judge.
        Raises `InputError` for messages or tools of another form, and for whatever the template
        refuses or fails at.
        """
        from refmoe.text.sandbox import render_template

        given = self._given({}, messages, tools, add_generation_prompt, variables)
        return render_template(self._code, self.name, given)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> Prompt:
        """Return the text and its tokens, special ones only where the template itself wrote them.

        Two renderings find them. In the second, each character that can begin a special token is
        replaced, within messages and tools, by half a surrogate pair, which no text contains: what
        still reads as a special token is the template's. Where messages spell none, the tokens are
        those of `tokenizer.encode(text)`, Moonshot's; where they do, each stretch between special
        tokens is encoded apart, and text over 400,000 characters may be cut elsewhere than there.
        Raises `InputError` as `render` does, for parts other than text, and for a template that
        looks for special tokens in the messages, which could not be told from its own.
        """
        from refmoe.text.sandbox import render_template

        given = self._given({}, messages, tools, add_generation_prompt, variables)
        for i, message in enumerate(given["messages"]):
            for part in message["content"] if isinstance(message.get("content"), list) else ():
                if part["type"] != "text":
                    raise InputError(
                        f"message {i}: a part of type {part['type']!r}; refmoe computes text only"
                    )
        text = render_template(self._code, self.name, given)
        first = sorted({name[0] for name in tokenizer.special})
        swap = {ord(c): 0xD800 + i for i, c in enumerate(first)}
        back = {half: c for c, half in swap.items()}
        given = self._given(swap, messages, tools, add_generation_prompt, variables)
        marked = render_template(self._code, self.name, given)
        if marked.translate(back) != text:
            raise InputError(
                f"{self.name}: it looks for special tokens inside the messages, so that they cannot"
                " be told from its own; give reasoning as reasoning_content, calls as tool_calls"
            )
        longest_first = sorted(map(re.escape, tokenizer.special), key=len, reverse=True)
        special = re.compile(f"({'|'.join(longest_first)})")
        pieces = special.split(marked)  # plain, special, plain, …
        if pieces[1::2] == special.findall(text):
            return Prompt(text, tokenizer.encode(text))
        tokens: list[int] = []
        for i, piece in enumerate(pieces):
            allowed = (piece,) if i % 2 else ()
            tokens += tokenizer.encode(piece.translate(back), allowed_special=allowed)
        return Prompt(text, tokens)

    def _given(
        self,
        swap: Mapping[int, int],
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return what the template sees: checked copies of everything, characters swapped."""
        if not isinstance(messages, list | tuple):
            raise InputError(f"messages: expected a list, got a {type(messages).__name__}")
        given: dict[str, Any] = {**self.variables, "add_generation_prompt": add_generation_prompt}
        try:
            given |= {k: copy_plain(v, swap, k) for k, v in variables.items()}
            given["messages"] = [
                copy_plain(m, swap, f"message {i}") for i, m in enumerate(messages)
            ]
            given["tools"] = copy_plain(tools, swap, "tools")
        except RecursionError:
            raise InputError("messages, tools or variables are nested too deeply") from None
        check_messages(given["messages"])
        if tools is not None and not swap:  # a swapped name need not look like one
            check_tools(given["tools"], "tools")
        return given
