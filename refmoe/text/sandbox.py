"""Compile and render templates by strangers, in a sandbox with a budget.

Jinja's own sandbox keeps a template from Python and from changing what it is given; lists may grow
and shrink, as K2-Thinking's template does with its call ids, because it is given copies. But that
sandbox bounds nothing except `range`: `'x' * 10**10` or a doubling loop would take all memory. So
here everything a template makes is paid for from a budget, and what could multiply is stopped by an
estimate before it does.

Source: Hugging Face's chat templating, for the settings, filters and globals.
"""

import functools
import json
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from datetime import datetime
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser as TemplateParser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from refmoe.files import InputError
from refmoe.text.messages import shorten

BUDGET = 2**26  # characters made in one rendering; K2's longest prompts have 2**20
STEP = 128  # characters that a call, a filter or a turn of a loop counts as, beside what it makes
BITS = 4096  # of a whole number: longer ones take quadratic time to print


@functools.lru_cache(maxsize=4)
def compile_template(source: str, name: str) -> CodeType:
    """Compile a template for `render_template`; `name` is its file in messages.

    The last few are kept, as Moonshot's takes a tenth of a second. Raises `InputError`, with the
    line, for a source that is not Jinja.
    """
    sandbox = _Sandbox()
    try:
        tree = _Priced().visit(sandbox.parse(source))
        return sandbox.compile(tree, filename=name)
    except Exception as e:  # RecursionError, Python's own limits on nesting, …
        raise _refuse(e, name) from None


def render_template(code: CodeType, name: str, given: Mapping[str, Any]) -> str:
    """Return what a compiled template makes of its variables.

    Raises `InputError`, with the line, for anything the template raises or may not do.
    """
    sandbox = _Sandbox()
    try:
        template = jinja2.Template.from_code(sandbox, code, sandbox.globals)
        return template.render(given)
    except Exception as e:  # a template can raise anything: also MemoryError, RecursionError
        raise _refuse(e, name) from None


# filters that make nothing: they hand on what they are given, or a part of it
_HAND_ON = {"attr", "count", "d", "default", "first", "items", "last", "length", "list"}
_LAZY = (Iterator, KeysView, ValuesView, ItemsView)
# matches formats that could be wide: a width of four digits, one taken from the arguments, or a
# field within a field
_WIDE = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*(\*|\d{4})|\{([^{}]+\{|[^{}]*:[^{}]*\d{4})")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Hugging Face's environment, with a budget; a new one for each rendering.

    Every operator, call, filter, output and, through `_Priced`, every
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
        """Take characters from the budget. Raises `InputError` once it is empty."""
        self.left -= cost
        if self.left < 0:
            raise InputError(f"it makes more than {BUDGET:,} characters and steps for one prompt")

    def afford(self, name: str, first: Any, *rest: Any) -> None:
        """Raise `InputError` for an operation that could make far more than it is given."""
        if name in ("format", "format_map", "%"):
            if isinstance(first, str) and _WIDE.search(first):
                raise InputError(f"a format with so wide a field: {shorten(first)}")
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
    """Send those parts of a template's tree through filters that jinja2 offers no hook for."""

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
    """Read `{% generation %}`, which marks what a trainer learns from, as plain text."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: TemplateParser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _refuse(e: Exception, name: str) -> InputError:
    """Return any failure of a template as `InputError`, with the line where it happened."""
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
    """Charge for a value on its way into the output, or into that of a macro or `set` block."""
    environment = context.environment
    assert isinstance(environment, _Sandbox)
    environment.spend(_size(value))
    return value


def _listed(value: Any) -> Any:
    """Return a lazy value as a list, so that its size is known."""
    return list(value) if isinstance(value, _LAZY) else value


def _check_bits(bits: int) -> None:
    if bits > BITS:
        raise InputError(f"a number of {bits:,} bits")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _size(value: Any) -> int:
    """Estimate the characters of `str(value)`, indented, without making it.

    Counting stops beyond the budget: a list that holds itself, or one that holds another twice,
    which holds a third twice, and so on, is small in memory, and its text is not. Raises
    `InputError` for an object that has no text.
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
    """Return JSON as Hugging Face's filter does: jinja2's own escapes `<` and `>` for HTML."""
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
    """Make a namespace as jinja2 does, without attributes that begin with an underscore.

    Such attributes would pose as Python's own.
    """
    attributes = dict(*args, **kwargs)
    _check_attributes(attributes)
    return Namespace(attributes)


def _check_attributes(names: Iterable[Any]) -> None:
    for name in names:
        if not isinstance(name, str) or name.startswith("_"):
            raise InputError(f"a namespace cannot have an attribute {name!r}")
