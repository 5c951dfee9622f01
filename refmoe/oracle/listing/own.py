"""refmoe's own form: {"tokens": [...], "top_logprobs": [{"id": logprob, ...} or null, ...]}.

Entry t of top_logprobs is of what follows token t.
"""

from collections.abc import Mapping
from typing import Any

from refmoe.files import InputError
from refmoe.oracle.listing.base import Entry, Form, Listing, Slot, number, whole
from refmoe.oracle.readers.base import read_ids


def by_id(where: str, row: Any) -> tuple[Entry, ...]:
    """Return the entries of {id: logprob} or {id: {"logprob": x, ...}}; none for null."""
    if row is None:
        return ()
    out = []
    try:
        for key, x in row.items():
            value = number(where, x["logprob"] if isinstance(x, dict) else x)
            out.append(Entry(whole(where, key), value=value))
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{where} is no object of token ids and log-probabilities") from None
    if len({e.id for e in out}) != len(out):
        raise InputError(f"{where}: the same token twice; the keys must be ids, not texts")
    return tuple(out)


def read(where: str, response: Mapping[str, Any]) -> list[Listing]:
    """Read the form that other tools are asked to write."""
    rows = response.get("top_logprobs")
    if not isinstance(rows, list) or not rows:
        return []
    found = [by_id(f"{where}: position {t}", row) for t, row in enumerate(rows)]
    tokens = response.get("tokens", response.get("prompt_token_ids"))
    if tokens is None:  # what follows the last one needs no token of its own
        slots = (Slot(None), *(Slot(None, row) for row in found))
        return [Listing(OWN.name, slots, prompt=[])]
    ids = read_ids(f"{where}: tokens", tokens)
    if len(ids) != len(rows):
        raise InputError(
            f"{where}: log-probabilities of {len(rows)} positions, and other tokens ({len(ids)})"
        )
    named = [Entry(i) for i in ids]
    slots = (Slot(named[0]), *(Slot(e, row) for e, row in zip(named[1:], found, strict=False)))
    return [Listing(OWN.name, (*slots, Slot(None, found[-1])), prompt=[])]


OWN = Form("top_logprobs by token id", read)
