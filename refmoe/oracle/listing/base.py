"""Define what a server's response lists of a distribution, and the forms in which servers write it.

A response is a sequence of tokens, some of them with the distribution that they were drawn from:

    prompt    ids of the tokens in front of the first slot; None where the response lacks them
    slot      a token, and entries of the distribution that it was drawn from, if listed
    entry     a token, by id, bytes or text, and its log-probability (or probability, or logit)

Texts become ids when a vocabulary is at hand (settle.py). A form is one way of writing this:

    def read(where: str, response: dict[str, Any]) -> list[Listing]:
        rows = response.get("mine")                     none of this form: return []
        return [Listing("mine", slots, prompt=...)]     one for each sequence

    MINE = Form("mine", read)

and an entry of `FORMS` (forms.py). Functions that read entries are below; all raise `InputError`
that begins with `where`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from refmoe.files import InputError

NONE_BELOW = -9000.0  # vLLM and others write -9999, llama-server -3.4e38, for no probability at all
TOKEN_ID = "token_id:"  # vLLM's return_tokens_as_token_ids
BYTES = "bytes:"  # OpenAI's completions write bytes that are no UTF-8 as bytes:\\xe2\\x80


class Entry(NamedTuple):
    """A token of a row and its number: -inf for a token that cannot come, NaN for none given."""

    id: int | None
    text: str | None = None
    raw: bytes | None = None
    value: float = math.nan


class Slot(NamedTuple):
    """A token of the sequence, None if unknown, and what is listed of its distribution."""

    token: Entry | None
    listed: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class Listing:
    """The log-probabilities of one sequence, as a response gives them."""

    form: str  # for a report: "SGLang's /generate"
    slots: tuple[Slot, ...]
    prompt: list[int] | None = None  # before the first slot
    count: int | None = None  # tokens before the first slot, where their ids are not given
    prompted: int | None = None  # slots of the prompt, the others are generated
    prompt_text: str | None = None  # whole, special tokens included
    text: str | None = None  # of the slots' tokens together
    probabilities: bool = False  # numbers are probabilities, not their logarithms
    sampled: bool = False  # the response says that they are of after sampling
    drawn: bool = True  # a slot's token is the one that was drawn, not just some token of the list
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Form:
    """A way of writing log-probabilities: its name, and what reads it."""

    name: str
    read: Callable[[str, Mapping[str, Any]], list[Listing]]


def number(where: str, value: Any) -> float:
    """Return a number of a response: NaN for null, -inf where a server writes none."""
    if value is None:
        return math.nan
    try:
        if isinstance(value, bool | str):
            raise TypeError
        x = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where} has {value!r} for a log-probability") from None
    if math.isnan(x):
        raise InputError(f"{where} has log-probability nan")
    return -math.inf if x <= NONE_BELOW else x


def name(where: str, key: Any, value: Any = None) -> Entry:
    """Return the entry that a text names: token_id:N is an id, bytes:\\x.. bytes, else itself."""
    if not isinstance(key, str):
        raise InputError(f"{where} has a token {key!r}, expected a text")
    x = number(where, value)
    if key.startswith(TOKEN_ID):
        return Entry(whole(where, key.removeprefix(TOKEN_ID)), value=x)
    if key.startswith(BYTES + "\\x"):
        digits = key.removeprefix(BYTES).replace("\\x", "")
        try:
            return Entry(None, raw=bytes.fromhex(digits), value=x)
        except ValueError:
            pass  # a text that begins so
    return Entry(None, key, value=x)


def whole(where: str, value: Any) -> int:
    """Return a token id that is a number or the text of one."""
    try:
        if isinstance(value, bool | float):
            raise ValueError
        i = int(value)
    except (TypeError, ValueError):
        raise InputError(f"{where} has a token id {value!r}, expected a number") from None
    if not 0 <= i < 2**31:
        raise InputError(f"{where} has a token id {i}, expected one from 0")
    return i


def described(where: str, item: Any, value: str = "logprob", ids: str = "id") -> Entry:
    """Return the entry of an object {token, bytes, logprob}, with an id where a server adds one."""
    if not isinstance(item, dict):
        raise InputError(f"{where} is {item!r}, expected an object with a token and its {value}")
    found = item.get(ids, item.get("token_id"))
    entry = (
        Entry(whole(where, found))
        if found is not None
        else name(where, item.get("token", item.get("text")))
    )
    raw = item.get("bytes")
    if isinstance(raw, list) and all(type(b) is int and 0 <= b < 256 for b in raw):
        entry = entry._replace(raw=bytes(raw))
    return entry._replace(text=item.get("token"), value=number(where, item.get(value)))


def items(where: str, value: Any) -> Sequence[Any]:
    """Return a list of a response; null and nothing are an empty one."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise InputError(f"{where} is a {type(value).__name__}, expected a list")
    return value


def part(response: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return an object inside an object; an empty one where there is none."""
    value = response.get(key)
    return value if isinstance(value, dict) else {}


def count_of(value: Any) -> int | None:
    """Return a count of tokens, None where a response has none."""
    return value if type(value) is int and value > 0 else None
