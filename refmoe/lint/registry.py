"""Register rules, list them, and choose some of them.

A rule is one decorated function in a file of lint/rules/, found there by itself:

    @rule("error", example="1 of 96 groups have codes and a scale of 0", reference="owner/repo#1")
    def int4_zero_scale(m: Int4Matrix) -> Iterator[Found]:
        \"\"\"A group of INT4 codes has a scale of zero.

        Why that matters: one or more paragraphs.
        \"\"\"
        if m.lost:
            yield Found(...)

Its name with hyphens is its id, the annotation of its parameter says which facts it needs, its
docstring is its documentation. The part of an id before the first hyphen is its family.
"""

import difflib
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

from refmoe.files import InputError
from refmoe.lint import rules as rules_package
from refmoe.lint.base import LISTED, Found, Level, Rule

Check = TypeVar("Check", bound=Callable[[Any], Iterable[Found]])
_REGISTERED: dict[str, Rule] = {}


def rule(
    level: Level, *, example: str, reference: str = "", listed: int | None = LISTED
) -> Callable[[Check], Check]:
    """Register the decorated function as a rule; it stays a plain function.

    level: of its findings, unless one says otherwise
    example: the text of one finding
    reference: where the matter was met, as repository#issue or repository and file
    listed: how many findings are listed before the rest is counted; None: all
    """

    def register(check: Check) -> Check:
        name = check.__name__.replace("_", "-")
        summary, _, why = (inspect.getdoc(check) or "").partition("\n")
        parameter = next(iter(inspect.signature(check).parameters))
        facts = typing.get_type_hints(check)[parameter]
        made = Rule(name, level, summary, why.strip(), example, reference, facts, check, listed)
        if name in _REGISTERED:
            raise ValueError(f"two lint rules are called {name}")
        _REGISTERED[name] = made
        return check

    return register


@cache
def rules() -> tuple[Rule, ...]:
    """Return every rule, by id, after importing all files of lint/rules/."""
    for module in pkgutil.iter_modules(rules_package.__path__):
        importlib.import_module(f"{rules_package.__name__}.{module.name}")
    return tuple(_REGISTERED[name] for name in sorted(_REGISTERED))


def select(select: Sequence[str] = (), ignore: Sequence[str] = ()) -> tuple[Rule, ...]:
    """Return the rules whose ids begin with an entry of `select` and with none of `ignore`.

    An entry is an id, a family (`int4`), or any other beginning of ids. Without `select` all are
    taken. Raises `InputError` for an entry that no id begins with, naming the nearest ids.
    """
    every = rules()
    for entry in (*select, *ignore):
        if not entry or not any(r.id.startswith(entry) for r in every):
            known = sorted({r.id for r in every} | {r.id.partition("-")[0] for r in every})
            near = difflib.get_close_matches(entry, known, 3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise InputError(f"no lint rule is called {entry!r}: {hint}`refmoe lint --rules`")
    chosen = [r for r in every if not select or r.id.startswith(tuple(select))]
    return tuple(r for r in chosen if not ignore or not r.id.startswith(tuple(ignore)))
