"""Messages ↔ text: a checkpoint's own chat template, and the reading of what a model answers.

    messages, tools ─ template ─ text ─ tokens            <|im_user|>user<|im_middle|>…<|im_end|>…
    text ─ parser ─ reasoning, content, tool calls        in whatever pieces the text arrives

A message is an object as in OpenAI's API: `role`; `content`, a string or a list of parts
{"type": "text", "text": …}; where they apply `name`, `reasoning_content`, `tool_call_id` and
`tool_calls`, each {"id", "type": "function", "function": {"name", "arguments"}} with arguments as
text or as an object. An answer of K2 is

    <think>reasoning</think>content<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:
    INDEX<|tool_call_argument_begin|>{…}<|tool_call_end|>…<|tool_calls_section_end|>

(no line breaks), where `<think>` may already be the end of the prompt: K2.5 and later.

Sources: Hugging Face's chat templating (settings, filters and globals); MoonshotAI/Kimi-K2,
`docs/tool_call_guidance.md`; vLLM's reader for K2, which lets a tool-calls section end a thought.

**The template is a program by strangers.** Jinja's sandbox keeps it from Python and from changing
what it is given; lists may grow and shrink, as K2-Thinking's does with its call ids, because it is
given copies. What it makes is paid for from a budget, because the sandbox bounds nothing but
`range`: `'x' * 10**10` or a doubling loop would take all memory. **So is the user's text**: in
`encode` only the template's own special tokens count as such; where a message or a tool spells one,
it stays text.
"""

import enum
import functools
import json
import re
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from datetime import datetime
from pathlib import Path
from types import CodeType
from typing import Any, Literal, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser as TemplateParser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from refmoe.files import InputError, read_json, read_object, read_text
from refmoe.text.tokenizer import Tokenizer

SOURCE = 2**20  # characters of a template; K2's have 4,000
BUDGET = 2**26  # characters made in one rendering; K2's longest prompts have 2**20
STEP = 128  # what a call, a filter or a turn of a loop costs beside what it makes

# ----------------------------------------------------------------------------------------------
# Messages → text → tokens


class Prompt(NamedTuple):
    text: str
    tokens: list[int]


class ChatTemplate:
    """A Jinja template, compiled; `name` says in errors where it came from."""

    def __init__(self, source: str, name: str = "chat template", **variables: str):
        if len(source) > SOURCE:
            raise InputError(f"{name}: {len(source):,} characters, a template has up to {SOURCE:,}")
        self.name, self.source = name, source
        self.variables = {"documents": None, **variables}  # bos_token and the like
        self._code = _compiled(source, name)

    @classmethod
    def load(cls, folder: str | Path) -> "ChatTemplate":
        """From a checkpoint's folder: `chat_template.jinja`, else in `tokenizer_config.json`."""
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
        """The conversation as one text, as `apply_chat_template(tokenize=False)` gives it.

        `variables` are the template's own: K2.5's `thinking=False` (no thought) and `tools_ts_str`
        (tools as TypeScript; without it they are JSON), K2.6's `preserve_thinking=True`.
        A field that is None counts as absent, `content` excepted. Half a surrogate pair, which no
        tokenizer can encode, becomes U+FFFD. Parts other than text are for the template to judge.
        """
        given = self._given({}, messages, tools, add_generation_prompt, variables)
        return self._rendered(given)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> Prompt:
        """The text, and its tokens: special ones only where the template itself wrote them.

        Two renderings find them. In the second, each character that can begin a special token is
        replaced, within messages and tools, by half a surrogate pair, which no text contains: what
        still reads as a special token is the template's. Where messages spell none, the tokens are
        those of `tokenizer.encode(text)`, Moonshot's; where they do, each stretch between special
        tokens is encoded apart, and text over 400,000 characters may be cut elsewhere than there.
        """
        given = self._given({}, messages, tools, add_generation_prompt, variables)
        for i, message in enumerate(given["messages"]):
            for part in message["content"] if isinstance(message.get("content"), list) else ():
                if part["type"] != "text":
                    raise InputError(
                        f"message {i}: a part of type {part['type']!r}; refmoe computes text only"
                    )
        text = self._rendered(given)
        first = sorted({name[0] for name in tokenizer.special})
        swap = {ord(c): 0xD800 + i for i, c in enumerate(first)}
        back = {half: c for c, half in swap.items()}
        given = self._given(swap, messages, tools, add_generation_prompt, variables)
        marked = self._rendered(given)
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
        """What the template sees: checked copies."""
        if not isinstance(messages, list | tuple):
            raise InputError(f"messages: expected a list, got a {type(messages).__name__}")
        given: dict[str, Any] = {**self.variables, "add_generation_prompt": add_generation_prompt}
        try:
            given |= {k: _copied(v, swap, k) for k, v in variables.items()}
            given["messages"] = [_copied(m, swap, f"message {i}") for i, m in enumerate(messages)]
            given["tools"] = _copied(tools, swap, "tools")
        except RecursionError:
            raise InputError("messages, tools or variables are nested too deeply") from None
        check_messages(given["messages"])
        if tools is not None and not swap:  # a swapped name need not look like one
            check_tools(given["tools"], "tools")
        return given

    def _rendered(self, given: Mapping[str, Any]) -> str:
        sandbox = _Sandbox()
        try:
            template = jinja2.Template.from_code(sandbox, self._code, sandbox.globals)
            return template.render(given)
        except Exception as e:  # a template can raise anything: also MemoryError, RecursionError
            raise _refusal(e, self.name) from None


def check_messages(messages: list[Any]) -> None:
    """`InputError` for what no template understands; fields that are None are taken out."""
    if not messages:
        raise InputError("no messages; a conversation begins with one")
    for i, m in enumerate(messages):
        where = f"message {i}"
        if not isinstance(m, dict) or not isinstance(m.get("role"), str) or not m["role"]:
            raise InputError(f"{where}: expected an object with a role, got {_short(m)}")
        for field in ("reasoning_content", "reasoning", "tool_calls", "tool_call_id", "name"):
            if field in m and m[field] is None:
                del m[field]
            elif field != "tool_calls" and not isinstance(m.get(field, ""), str):
                raise InputError(f"{where}: {field} is {_short(m[field])}, expected a string")
        content = m.get("content")
        if content is not None and not isinstance(content, str | list):
            raise InputError(
                f"{where}: content is {_short(content)}, expected a string or a list of parts"
            )
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(kind, str) or (
                kind == "text" and not isinstance(part.get("text"), str)
            ):
                raise InputError(
                    f'{where}: part {_short(part)}, expected {{"type": "text", "text": …}}'
                )
        calls = m.get("tool_calls", [])
        if not isinstance(calls, list):
            raise InputError(f"{where}: tool_calls is {_short(calls)}, expected a list")
        for call in calls:
            function = call.get("function") if isinstance(call, dict) else None
            if (
                not isinstance(function, dict)
                or not isinstance(function.get("name"), str)
                or not isinstance(function.get("arguments"), str | dict)
                or not isinstance(call.get("id", ""), str)
            ):
                raise InputError(
                    f'{where}: tool call {_short(call)}, expected {{"id": "functions.NAME:INDEX", '
                    '"function": {"name": …, "arguments": text or object}}'
                )


def check_tools(tools: Any, where: str) -> list[dict[str, Any]]:
    """A list of function declarations, each with a name of its own."""
    if not isinstance(tools, list):
        raise InputError(f"{where}: expected a list of function declarations, got {_short(tools)}")
    names = set()
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise InputError(
                f'{where}: tool {i} is {_short(tool)}, expected {{"type": "function", "function": '
                '{"name": …, "description": …, "parameters": …}} with a name without spaces or ":"'
            )
        if name in names:
            raise InputError(f"{where}: two tools are called {name!r}")
        names.add(name)
    return tools


def read_tools(file: str | Path) -> list[dict[str, Any]]:
    """A JSON list of function declarations, or an object that holds it under `tools`."""
    value = read_json(Path(file))
    return check_tools(value.get("tools") if isinstance(value, dict) else value, str(file))


def _copied(value: Any, swap: Mapping[int, int], where: str) -> Any:
    """A copy made of plain JSON types, so that a template cannot reach the caller's objects."""
    if isinstance(value, str):
        text = str.__str__(value)  # a subclass may carry methods
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text.translate(swap) if swap else text
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {
            _copied(key, swap, where): _copied(item, swap, where) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_copied(item, swap, where) for item in value]
    raise InputError(f"{where}: it holds a {type(value).__name__}; expected what JSON can hold")


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]


# ----------------------------------------------------------------------------------------------
# The sandbox

_HAND_ON = {"attr", "count", "d", "default", "first", "items", "last", "length", "list"}
_LAZY = (Iterator, KeysView, ValuesView, ItemsView)
# a width of four digits, one taken from the arguments, or a field within a field
_WIDE = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*(\*|\d{4})|\{([^{}]+\{|[^{}]*:[^{}]*\d{4})")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Hugging Face's environment, with a budget; one for each rendering.

    jinja2 asks for a subclass. Every operator, call, filter, output and, through `_Priced`, every
    loop and literal passes here. Those that can multiply are stopped by an estimate before they
    do: the product of the two largest arguments, where a number counts as a number of copies.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants are not worked out at compile time, before any budget
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=_shown,
        )
        self.left = BUDGET
        self.filters["tojson"] = _tojson
        self.filters = {name: self._priced(name, f) for name, f in self.filters.items()}
        self.filters |= {_LOOP: self._loop, _MADE: self._made}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _dict,
            "namespace": _namespace,
        }
        del self.globals["lipsum"]  # random text, as long as one likes

    def spend(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise InputError(f"it makes more than {BUDGET:,} characters and steps for one prompt")

    def afford(self, name: str, first: Any, *rest: Any) -> None:
        """Stop what could make far more than it is given."""
        if name in ("format", "format_map", "%"):
            if isinstance(first, str) and _WIDE.search(first):
                raise InputError(f"a format with so wide a field: {_short(first)}")
            weights = [_size(first), 1000, _size(rest)]
        else:
            counts = (abs(x) if isinstance(x, int) else _size(x) for x in rest)
            weights = [_size(first), 1, *counts]
        *_, second, most = sorted(weights)
        if second * most > BUDGET:
            raise InputError(f"{name!r} could make {second * most:,} characters at once")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        grows = type(obj) is list and attr in ("append", "pop")
        return grows or super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise jinja2.exceptions.SecurityError(
            f"{attribute!r} of a {type(obj).__name__} is out of a template's reach"
        )

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.spend(STEP)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * right)
        elif operator == "+":
            self.spend(_length(left) + _length(right))
        elif operator == "%" or not isinstance(left, int | float):
            self.afford(operator, left, right)
        elif not isinstance(right, int | float):
            self.afford(operator, right, left)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int):
            _check_bits(result.bit_length())
        self.spend(_length(result))
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # names as jinja2 has them: a macro may be called with an argument `self`
        __self.spend(STEP)
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int | float):
            args = tuple(map(_listed, args))
            __self.afford(method.__name__, owner, *args, *kwargs.values())
            __self.spend(_size(owner))
        result = super().call(__context, __obj, *args, **kwargs)
        __self.spend(_length(result))
        return result

    def _priced(self, name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        context = 1 if hasattr(f, "jinja_pass_arg") else 0

        @functools.wraps(f)
        def priced(*args: Any, **kwargs: Any) -> Any:
            self.spend(STEP)
            given = [*map(_listed, args[context:])]
            if name not in _HAND_ON:
                self.afford(name, *given, *kwargs.values())
            result = f(*args[:context], *given, **kwargs)
            self.spend(_length(result))
            return result

        return priced

    def _loop(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(STEP)
            yield item

    def _made(self, value: Any) -> Any:
        self.spend(STEP + _length(value))
        return value


_LOOP, _MADE = "(loop)", "(made)"  # filters by names that no template can write


class _Priced(NodeTransformer):
    """A template's tree, with those parts that jinja2 offers no hook for sent through filters."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # as a constant it passes `_shown`

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _LOOP)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "join")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE) if node.ctx == "load" else node

    def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:
        _check_attributes([node.attr])
        return node


class _Generation(Extension):
    """`{% generation %}` marks what a trainer learns from; for a prompt it is text as any."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: TemplateParser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compiled(source: str, name: str) -> CodeType:
    sandbox = _Sandbox()
    try:
        tree = _Priced().visit(sandbox.parse(source))
        return sandbox.compile(tree, filename=name)
    except Exception as e:  # RecursionError, Python's own limits on nesting, …
        raise _refusal(e, name) from None


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _refusal(e: Exception, name: str) -> InputError:
    """Any failure of a template as ours, with the line of the template where it happened."""
    line, at = getattr(e, "lineno", None), e.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == name:
            line = at.tb_lineno
        at = at.tb_next
    where = f"{name}:{line}" if line else name
    kind = "" if isinstance(e, InputError | jinja2.TemplateError) else f"{type(e).__name__}: "
    message = str(getattr(e, "message", None) or e)[:500].encode("utf-8", "replace").decode()
    return InputError(f"{where}: {kind}{message}")


@jinja2.pass_context
def _shown(context: Context, value: Any) -> Any:
    """Every value on its way into the output, also into that of a macro or a `set` block."""
    environment = context.environment
    assert isinstance(environment, _Sandbox)
    environment.spend(_size(value))
    return value


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, _LAZY) else value


def _check_bits(bits: int) -> None:
    if bits > 4096:
        raise InputError(f"a number of {bits:,} bits")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _size(value: Any) -> int:
    """About the characters of `str(value)`, indented, without making it; stops when too many.

    A list that holds itself, or another twice, and that twice, is small; its text is not.
    """
    total, within = 0, [iter((value,))]
    while within and total <= BUDGET:
        item = next(within[-1], within)
        if item is within:
            within.pop()
            continue
        total += len(within) + _length(item)
        if isinstance(item, list | tuple):
            within.append(iter(item))
        elif isinstance(item, dict):
            within.append(item_or_key for pair in item.items() for item_or_key in pair)
        elif isinstance(item, int):
            total += item.bit_length() // 3
        elif isinstance(item, range):
            total += 8 * len(item)
        elif item is not None and not isinstance(item, str | bytes | float | jinja2.Undefined):
            raise InputError(f"a {type(item).__name__} has no text")
    return total


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Hugging Face's form: jinja2's own escapes `<` and `>` for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: Any) -> None:
    raise InputError(message if isinstance(message, str) else "the template gives no reason")


def _strftime_now(format: Any) -> str:
    if not isinstance(format, str) or len(format) > 100:
        raise InputError("strftime_now: expected a format of up to 100 characters")
    return datetime.now().strftime(format)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    """jinja2's, without underscores: such attributes would pose as Python's own."""
    attributes = dict(*args, **kwargs)
    _check_attributes(attributes)
    return Namespace(attributes)


def _check_attributes(names: Iterable[Any]) -> None:
    for name in names:
        if not isinstance(name, str) or name.startswith("_"):
            raise InputError(f"a namespace cannot have an attribute {name!r}")


# ----------------------------------------------------------------------------------------------
# Text → reasoning, content, tool calls


class Marker(enum.StrEnum):
    THINK = "<think>"
    END_THINK = "</think>"
    SECTION = "<|tool_calls_section_begin|>"
    CALL = "<|tool_call_begin|>"
    ARGUMENTS = "<|tool_call_argument_begin|>"
    END_CALL = "<|tool_call_end|>"
    END_SECTION = "<|tool_calls_section_end|>"


_MARKER = re.compile("|".join(map(re.escape, Marker)))
NAME = r"[^\s:]+"
_ID = re.compile(rf"functions\.({NAME}):[0-9]+")


class Text(NamedTuple):
    kind: Literal["reasoning", "content"]
    text: str


class ToolCall(NamedTuple):
    id: str  # functions.NAME:INDEX
    name: str
    arguments: str  # the text of a JSON object, as the model wrote it


class Problem(NamedTuple):
    what: str


Event = Text | ToolCall | Problem


class Reply(NamedTuple):
    """What a model answered. Text that fits no form is in `content` or `reasoning`, whole."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    problems: tuple[str, ...] = ()

    def message(self) -> dict[str, Any]:
        """The assistant message that a template renders to the same text again."""
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
    """A whole answer, without its stop token. `in_thought`: its prompt ended inside a thought."""
    parser = Parser(in_thought)
    return collect([*parser.feed(text), *parser.finish()])


def collect(events: Iterable[Event]) -> Reply:
    """The reply that a stream of events amounts to."""
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
    """Whether an answer to this prompt begins inside a thought, as K2.5's do."""
    return prompt.rstrip().endswith(Marker.THINK)


class Parser:
    """Text in any pieces → events, the same for every way to cut it, never half a marker.

    The place in the answer is one of: start, thought, content, section (between calls), id,
    arguments, after (behind a section). What does not fit its place is kept as text, and reported
    as a Problem, once for each kind.
    """

    def __init__(self, in_thought: bool = False):
        self._at = "thought" if in_thought else "start"
        self._held = ""  # perhaps the beginning of a marker
        self._call: list[str] = []  # a call so far, its markers included
        self._calls = self._sections = 0  # calls in this section, well formed or not
        self._reported: set[str] = set()
        self._events: list[Event] = []

    def feed(self, piece: str) -> list[Event]:
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
        """What was held back, and what is missing at the end."""
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
            fault = f"a tool call's id is {_short(id)}, expected functions.NAME:INDEX"
        elif not _is_object(arguments):
            fault = f"the arguments of {_short(id)} are no JSON object"
        else:
            self._events.append(ToolCall(id, name[1], arguments))
            self._call, self._at = [], "section"
            return
        self._call.append(Marker.END_CALL)
        self._give_up(fault)

    def _give_up(self, fault: str) -> None:
        """What was to be a call is content."""
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
