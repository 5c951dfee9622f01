"""From listings to rows: which tokens the sequence has, and what is listed after each of them.

Row t is the distribution of what follows token t. A row is kept if every token up to t is known:
by id, by bytes or text where one token alone can be meant, by --tokens, or by the text of all
slots, if its tokenisation has as many tokens as there are slots and contradicts none of them.
Whatever cannot be told is left out, counted, and said.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refmoe.files import InputError
from refmoe.oracle.listing.base import Entry, Listing, Slot
from refmoe.oracle.listing.vocabulary import Vocabulary
from refmoe.text.explain import explain, spelled

MOST_PROBABILITY = 1.1  # sum of a row's probabilities; some servers print few digits
HIGHEST = 1e-3  # log-probability that rounding makes of 0
LOGIT_ROWS = 2  # rows whose numbers are no logarithms of probabilities, to be taken for logits
SAME = 1e-3  # two numbers of one token in one row, one of them rounded


@dataclass(frozen=True)
class Settled:
    """The rows of one sequence: ids [T, K] (-1: none) and numbers [T, K] (-inf: cannot come)."""

    tokens: list[int]
    ids: np.ndarray
    values: np.ndarray
    logits: bool  # the numbers are logits; else log-probabilities
    prompt: int  # tokens that were not generated, as far as is known
    notes: tuple[str, ...]


def settle(
    path: Path,
    listing: Listing,
    given: Sequence[int] | None = None,
    words: Vocabulary | None = None,
    bos: int | None = None,
) -> Settled:
    """Return the rows of a listing.

    given  tokens of the prompt, or of all, beside the response
    words  without a vocabulary, texts tell no token
    bos    put in front of a prompt's text by the server
    Raises `InputError` where the tokens are not known, or are others than the response's own.
    """
    texts = words is None and _has_texts(listing)
    slots = [_find(s.token, words) if s.token else None for s in listing.slots]
    prompt, notes = _prompt(path, listing, slots, given, words, bos)
    if given is not None:
        slots = _fill(path, prompt, slots, given, words)
    slots, filled = _fill_by_text(listing, slots, words)
    tokens, rows, unread, after = list(prompt), {}, 0, 0
    for n, (slot, token) in enumerate(zip(listing.slots, slots, strict=True)):
        entries = _entries(slot)
        if n and slots[n - 1] is None:
            after += sum(bool(_entries(s)) for s in listing.slots[n:])
            break
        if entries and tokens:
            whole = words is None or words.ends_whole(tokens)
            found, lost = _row(f"{path}: position {len(tokens) - 1}", entries, words, whole)
            unread += lost
            if found:
                rows[len(tokens) - 1] = found
        if token is not None:
            tokens.append(token)
    total = sum(len(_entries(s)) for s in listing.slots)
    if texts and (not rows or unread or after):
        raise InputError(
            f"{path}: its tokens are texts, which need the model's vocabulary; judge it with the "
            "model, or ask the server for token ids"
        )
    if not rows:
        raise InputError(_nothing(path, listing, tokens, unread, after))
    notes += filled
    if unread:
        notes.append(
            f"{unread} of {total} entries not read: their text is no token, or that of several"
        )
    if after:
        known = len(tokens)
        notes.append(
            f"{after} positions not read, after token {known}, which cannot be told from its text; "
            "give all tokens (--tokens FILE)"
        )
    ids, values = _arrays(rows, len(tokens))
    if listing.probabilities:
        with np.errstate(divide="ignore"):
            values = np.log(values)
    gone = int(((ids >= 0) & np.isneginf(values)).sum())
    if gone:
        notes.append(f"{gone} of {total} entries are of tokens that cannot come (-inf or -9999)")
    logits = are_logits(path, listing)
    begins = len(prompt) + (listing.prompted or 0)
    return Settled(tokens, ids, values, logits, begins or len(tokens), tuple(notes))


def needs_more(listing: Listing) -> bool:
    """Tell whether a vocabulary, or the prompt's tokens, are needed to settle a listing."""
    unknown = any(s.token is None for s in listing.slots[:-1])
    return listing.prompt is None or unknown or _has_texts(listing)


def _has_texts(listing: Listing) -> bool:
    """Tell whether some token is known by its text or bytes alone."""
    every = [e for s in listing.slots for e in (s.token, *s.listed) if e is not None]
    return any(e.id is None for e in every) or (
        listing.prompt is None and listing.prompt_text is not None
    )


def _find(entry: Entry, words: Vocabulary | None) -> int | None:
    """Return the id of an entry, None where it cannot be told."""
    return entry.id if words is None else words.find(entry)


# --- the tokens


def _prompt(
    path: Path,
    listing: Listing,
    slots: Sequence[int | None],
    given: Sequence[int] | None,
    words: Vocabulary | None,
    bos: int | None,
) -> tuple[list[int], list[str]]:
    """Return the tokens in front of the first slot, and what is to be said of them."""
    own, notes = listing.prompt, []
    if own is None and given is None and listing.prompt_text is not None and words is not None:
        own = words.words.encode(listing.prompt_text)
        if bos is not None and own[:1] != [bos]:
            own = [bos, *own]
        if listing.count not in (None, len(own)):
            raise InputError(
                f"{path}: the prompt's text has {len(own)} tokens here, the server counted "
                f"{listing.count}; give the server's own ids (--tokens FILE)"
            )
        notes.append(f"the {len(own)} tokens of the prompt were made of its text")
    if own is None and given is None:
        size = f", {listing.count} tokens," if listing.count else ""
        raise InputError(
            f"{path}: the prompt{size} is not in the response; give its token ids "
            "(--tokens FILE), or ask the server for them (vLLM: return_token_ids)"
        )
    if own is not None:
        if given is not None:
            every = [*own, *slots]
            first = len(every) if listing.prompted is None else listing.prompted
            _compare(path, every, len(own) or first, given, words)
        return own, notes
    assert given is not None
    count = listing.count
    if count is None:
        n = len(slots)
        ends = n > 1 and len(given) > n and list(given[-n:]) == list(slots)
        count = len(given) - n if ends else len(given)
    if len(given) < count:
        hint = "; is a BOS in front of the server's?" if len(given) + 1 == count else ""
        raise InputError(
            f"{path}: --tokens has {len(given)} ids, the server counted {count} of the prompt{hint}"
        )
    return list(given[:count]), notes


def _compare(
    path: Path,
    own: Sequence[int | None],
    prompt: int,
    given: Sequence[int],
    words: Vocabulary | None,
) -> None:
    """Raise `InputError` where the given tokens are neither the response's own nor its prompt."""
    known = [i for i in own if i is not None]
    if len(known) < len(own):  # texts are left to be filled
        known = [g if i is None else i for i, g in zip(own, given, strict=False)]
    n = min(len(known), len(given))
    if list(given[:n]) == known[:n] and n >= min(prompt, len(known)):
        return
    cut = known[: max(prompt, 1)] if len(given) <= prompt + 1 else known
    if words is None:
        raise InputError(
            f"{path}: --tokens has other tokens ({len(given)}) than the response ({len(known)})"
        )
    found = explain(words.words, given, cut) or explain(words.words, given, known)
    told = found.explanation if found else "one is longer"
    raise InputError(
        f"{path}: --tokens and the response's own ids differ (here: --tokens, there: the "
        f"response): {told}; leave --tokens out to judge what the server computed"
    )


def _fill(
    path: Path,
    prompt: Sequence[int],
    slots: Sequence[int | None],
    given: Sequence[int],
    words: Vocabulary | None,
) -> list[int | None]:
    """Return the slots with the given tokens behind the prompt where they were not known."""
    out = list(slots)
    for n, i in enumerate(given[len(prompt) : len(prompt) + len(slots)]):
        known = out[n]
        if known is None:
            out[n] = i
        elif known != i:
            own = spelled(words.words, [known]) if words else known
            raise InputError(
                f"{path}: token {len(prompt) + n} is {i} in --tokens and {own} in the response"
            )
    return out


def _fill_by_text(
    listing: Listing, slots: list[int | None], words: Vocabulary | None
) -> tuple[list[int | None], list[str]]:
    """Return the slots with the tokens of their text, where it has as many and contradicts none."""
    unknown = [n for n, i in enumerate(slots) if i is None]
    if not unknown or words is None or not listing.text:
        return slots, []
    found = words.words.encode(listing.text)
    missing = len(slots) - len(found)
    if missing not in (0, 1):  # the last may end the text
        return slots, []
    for n, i in enumerate(found):
        own = slots[n]
        if own not in (None, i):
            return slots, []
        listed = [words.find(e) for e in listing.slots[n].listed]
        if not listing.drawn and i not in listed:
            return slots, []
    out = [*found, *slots[len(found) :]]
    filled = sum(out[n] is not None for n in unknown)
    return out, [f"{filled} tokens were made of the text"]


# --- the rows


def _entries(slot: Slot) -> list[Entry]:
    """Return all entries of a slot that have a number, its own token's among them."""
    own = [slot.token] if slot.token is not None else []
    return [e for e in (*own, *slot.listed) if not math.isnan(e.value)]


def _numbers(slot: Slot) -> list[float]:
    """Return the numbers of a slot, its own token's once."""
    out = [e.value for e in slot.listed if not math.isnan(e.value)]
    own = math.nan if slot.token is None else slot.token.value
    if math.isnan(own) or any(own == x or abs(own - x) < SAME for x in out):
        return out
    return [*out, own]


def _row(
    where: str, entries: Sequence[Entry], words: Vocabulary | None, whole: bool
) -> tuple[dict[int, float], int]:
    """Return id → number of one row, and how many entries could not be told.

    A token that has two numbers here, as two of one text may, has none.
    """
    out: dict[int, float] = {}
    unread, twice = 0, set()
    for e in entries:
        i = e.id if words is None else words.find(e, whole)
        if i is None:
            unread += 1
        elif i in out and not (out[i] == e.value or abs(out[i] - e.value) < SAME):
            if e.id is not None:
                raise InputError(f"{where}: token {i} has {out[i]:.6g} and {e.value:.6g}")
            twice.add(i)
        else:
            out.setdefault(i, e.value)
    for i in twice:
        del out[i]
    return out, unread + 2 * len(twice)


def _arrays(rows: Mapping[int, Mapping[int, float]], T: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and numbers [T, K] of these rows."""
    width = max(map(len, rows.values()))
    ids, values = np.full((T, width), -1), np.full((T, width), np.nan)
    for t, row in rows.items():
        ids[t, : len(row)], values[t, : len(row)] = list(row), list(row.values())
    return ids, values


def are_logits(path: Path, listing: Listing) -> bool:
    """Tell whether numbers are logits: in most rows, no logarithms of probabilities.

    Raises `InputError` for numbers that are neither, and where there are none.
    """
    rows = [_numbers(s) for s in listing.slots]
    finite = [[x for x in row if math.isfinite(x)] for row in rows]
    every = [x for row in finite for x in row]
    if listing.probabilities:
        if any(not 0 <= x <= 1.001 for x in every):
            raise InputError(f"{path}: a probability is not between 0 and 1")
        if all(x in (0, 1) for x in every):
            raise InputError(f"{path}: every probability is 0 or 1: one token of each row was kept")
        return False
    if all(x == 0 for x in every):
        raise InputError(
            f"{path}: every log-probability is 0 or missing (as a log-probability -9999 is); the "
            "server gave none, or kept one token of each row"
        )
    wrong = []
    for n, row in enumerate(finite):
        total = math.fsum(math.exp(min(x, 700)) for x in row)
        if max(row, default=0) >= HIGHEST or total > MOST_PROBABILITY:
            wrong.append((n, max(row), total))
    if len(wrong) >= LOGIT_ROWS and 2 * len(wrong) > sum(map(bool, finite)):
        return True
    for n, most, total in wrong:
        at = f"{path}: row {n}"
        if most >= HIGHEST:
            raise InputError(f"{at} has log-probability {most:.6g}, expected one below 0")
        raise InputError(f"{at}: the probabilities add up to {total:.3g}; are they logarithms?")
    return False


def _nothing(path: Path, listing: Listing, tokens: Sequence[int], unread: int, after: int) -> str:
    """Return the message for a listing of which no row can be judged."""
    if after and not tokens and not listing.text:
        return f"{path}: it does not say its tokens; give them (--tokens FILE)"
    if unread or after:
        return (
            f"{path}: no row can be judged: {unread} entries have a text that is no token, or not "
            f"that of one alone, and {after} positions come after such a token; ask for token ids"
        )
    return f"{path}: no log-probabilities in {listing.form}"
