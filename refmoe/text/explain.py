"""Find where two tokenisations of one prompt first differ, and what explains it.

The first question of every investigation is whether a difference is numeric or in the prompt.
Ids are compared through the bytes they stand for:

    a special token more in front or at the end    special tokens: a BOS, an end
    special ids that stand for others throughout   special tokens: mapped
    the texts differ                               template (or an added or missing special token)
    same text, a special token on one side only    special tokens: spelled out, or made special
    same text, a token crosses, or ends within,    pre-tokenisation: another regular expression
    a piece of K2's pattern
    same pieces, other tokens in one               merges: another vocabulary or merge order
"""

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

from refmoe.text.tokenizer import Tokenizer


class Difference(NamedTuple):
    """The first difference of two lists of token ids."""

    byte: int  # where it is in the text, from 0
    token: int  # index of the first differing token
    cause: str  # template | special tokens | pre-tokenisation | merges
    explanation: str


def explain(words: Tokenizer, ours: Sequence[int], theirs: Sequence[int]) -> Difference | None:
    """Return the first difference of two lists of token ids, or None if they are equal.

    Raises `InputError` for an id that the vocabulary does not have.
    """
    if list(ours) == list(theirs):
        return None
    special_ids = _explain_special_ids(words, list(ours), list(theirs))
    if special_ids is not None:
        return special_ids
    token = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    start = sum(len(words.token_bytes(i)) for i in ours[:token])
    ours_text, theirs_text = (b"".join(map(words.token_bytes, ids)) for ids in (ours, theirs))
    if ours_text != theirs_text:
        return _explain_texts(words, ours, theirs, token, ours_text, theirs_text)
    special = set(words.special.values())
    here, there = ours[token], theirs[token]
    if (here in special) != (there in special):
        side, other = ("here", "there") if here in special else ("there", "here")
        name = words.decode([here if here in special else there])
        plain = "it is spelled out in plain tokens"
        return Difference(
            start, token, "special tokens", f"{name} is one special token {side}; {other} {plain}"
        )
    return _explain_pieces(words, ours, theirs, token, start, ours_text)


def spelled(words: Tokenizer, ids: Sequence[int]) -> str:
    """Return ids with what they stand for, in a message: [BOS] (163584)."""
    shown = (words.decode([i]) if 0 <= i < words.size else "no token here" for i in ids)
    return ", ".join(f"{text} ({i})" for i, text in zip(ids, shown, strict=True))


def _explain_special_ids(words: Tokenizer, ours: list[int], theirs: list[int]) -> Difference | None:
    """Explain ids that are the same but for a BOS in front, a map of special ids, or both."""
    first = min(words.special.values(), default=words.size)
    added, rest = "", (ours, theirs)
    for side, longer, shorter in (("there", theirs, ours), ("here", ours, theirs)):
        if len(longer) != len(shorter) + 1 or longer[0] < first:
            continue
        cut = (ours, longer[1:]) if side == "there" else (longer[1:], theirs)
        if _mapped(*cut, first) is not None:
            added = f"a BOS in front: {spelled(words, longer[:1])} stands only {side}"
            rest = cut
    found = _mapped(*rest, first)
    if found is None or not (added or found):
        return None
    start = 0
    token = 0
    if not added:
        token = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        start = sum(len(words.token_bytes(i)) for i in ours[:token])
    parts = [added] if added else []
    if found:
        moved = {b - a for a, b in found.items()}
        by = f", all by {moved.pop():+d}" if len(found) > 1 == len(moved) else ""
        pairs = ", ".join(f"{a}→{b}" for a, b in found.items())
        names = spelled(words, list(found))
        parts.append(f"special ids mapped{by}: {pairs}; here they are {names}")
    told = ", and ".join(parts)
    return Difference(
        start, token, "special tokens", f"the ids differ by {told}; the rest is the same"
    )


def _mapped(ours: Sequence[int], theirs: Sequence[int], first: int) -> dict[int, int] | None:
    """Return the map of special ids, from `first` on, that makes ours theirs; None: there is none.

    Every occurrence must be mapped alike, and no two ids to one.
    """
    if len(ours) != len(theirs):
        return None
    out: dict[int, int] = {}
    for a, b in zip(ours, theirs, strict=True):
        if a != b and min(a, b) < first:
            return None
        if out.setdefault(a, b) != b:
            return None
    if len(set(out.values())) != len(out):
        return None
    return {a: b for a, b in out.items() if a != b}


def _explain_texts(
    words: Tokenizer,
    ours: Sequence[int],
    theirs: Sequence[int],
    token: int,
    a: bytes,
    b: bytes,
) -> Difference:
    """Explain texts that differ: a special token that stands on one side only, or the template."""
    byte = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    special = set(words.special.values())
    for side, longer, shorter in (("there", theirs, ours), ("here", ours, theirs)):
        extra = longer[token : token + 1]
        added = list(longer[token + 1 :]) == list(shorter[token:])
        if extra and extra[0] in special and added:
            name = words.decode(extra)
            return Difference(
                byte, token, "special tokens", f"{name} stands only {side}; the rest is the same"
            )
    around = slice(max(0, byte - 20), byte + 20)
    return Difference(
        byte,
        token,
        "template",
        f"the texts differ: here {a[around]!r}, there {b[around]!r}",
    )


def _explain_pieces(
    words: Tokenizer,
    ours: Sequence[int],
    theirs: Sequence[int],
    token: int,
    start: int,
    text: bytes,
) -> Difference:
    """Explain different plain tokens of one text: do their tokens end where K2's pieces do?"""
    piece_ends = _piece_ends(words, ours)
    begin = max((e for e in piece_ends if e <= start), default=0)
    end = next(e for e in piece_ends if e > start)
    piece = text[begin:end]
    ends = list(accumulate(len(words.token_bytes(i)) for i in theirs))
    inside = [i for i, e in enumerate(ends) if begin < e <= end]
    if not inside or ends[inside[-1]] != end:
        crossing = words.token_bytes(theirs[inside[-1] + 1 if inside else token])
        return Difference(
            start,
            token,
            "pre-tokenisation",
            f"their token {crossing!r} crosses the end of the piece {piece!r}",
        )
    tokens = [theirs[i] for i in inside]
    for at in (ends[i] - begin for i in inside[:-1]):
        halves = [p.decode("utf-8", "replace") for p in (piece[:at], piece[at:])]
        if [i for half in halves for i in words.encode(half, ())] == tokens:
            return Difference(
                start,
                token,
                "pre-tokenisation",
                f"they cut the piece {piece!r} into {piece[:at]!r} and {piece[at:]!r}",
            )
    shown = [words.token_bytes(i) for i in tokens]
    return Difference(start, token, "merges", f"the piece {piece!r} is {shown} there")


def _piece_ends(words: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return where the pieces end, in bytes; a special token is a piece of its own."""
    special = set(words.special.values())
    sizes: list[int] = []
    for is_special, run in groupby(ids, lambda i: i in special):
        parts = [words.token_bytes(i) for i in run]
        if is_special:
            sizes += map(len, parts)
        else:
            text = b"".join(parts).decode("utf-8", "surrogateescape")
            sizes += (len(p.encode("utf-8", "surrogateescape")) for p in words.pieces(text))
    return list(accumulate(sizes))
