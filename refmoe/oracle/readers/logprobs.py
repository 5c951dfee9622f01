"""Log-probabilities of the likeliest tokens: responses of servers, as JSON or as a stream.

listing/forms.py lists the forms. A file may hold one response, a list of them, one in each line,
or the events of a stream. Where texts are to become token ids, or the prompt's tokens are to be
given, the dump is settled once the model is at hand (`settle_dump`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from refmoe.files import InputError
from refmoe.oracle.listing.base import Listing
from refmoe.oracle.listing.forms import read_response
from refmoe.oracle.listing.settle import are_logits, needs_more, settle
from refmoe.oracle.listing.text import is_stream, read_responses
from refmoe.oracle.listing.vocabulary import Vocabulary
from refmoe.oracle.readers.base import Dump, Reader, register

SUFFIXES = (".json", ".jsonl", ".ndjson", ".sse")
DECIMALS = 7  # more than these are no rounding of what was written
FEWEST = 8  # numbers that show how many decimals are written


def recognise(path: Path) -> bool:
    """Tell whether this is a file of JSON, of JSON lines or of events."""
    return path.is_file() and path.suffix in SUFFIXES


def recognise_stream(path: Path) -> bool:
    """Tell whether this is a text that begins as a stream of events does."""
    if not path.is_file() or path.suffix not in (".txt", ".log"):
        return False
    with path.open("rb") as file:
        start = file.read(4096).decode("utf-8", "replace")
    return is_stream([line.strip() for line in start.splitlines() if line.strip()])


def read(path: Path) -> Dump:
    """Read every response; `rounded` is bfloat16, as nothing else is known of its precision."""
    responses = read_responses(path)
    listings: list[Listing] = []
    for n, response in enumerate(responses):
        where = str(path) if len(responses) == 1 else f"{path}: response {n}"
        listings += read_response(where, response)
    if not listings:
        raise InputError(
            f"{path}: no log-probabilities in it, neither top_logprobs nor prompt_logprobs, "
            "logprobs of choices, input_token_logprobs or completion_probabilities; ask the "
            "server for them (docs/dumps.md says how)"
        )
    first, *others = (_dump(path, listing) for listing in listings)
    return replace(first, others=tuple(others))


def _dump(path: Path, listing: Listing) -> Dump:
    """Return the dump of one listing, settled if nothing else is needed for that."""
    are_logits(path, listing)  # refuses numbers that are neither
    dump = Dump(path, {}, None, "bfloat16", form=listing.form, listing=listing)
    return dump if needs_more(listing) else settle_dump(dump)


def settle_dump(
    dump: Dump,
    tokens: Sequence[int] | None = None,
    words: Vocabulary | None = None,
    bos: int | None = None,
) -> Dump:
    """Return a dump of log-probabilities with its tokens and rows.

    tokens  given beside the file: of the prompt, or of all
    words   turn texts into ids
    bos     put in front of a prompt's text by the server
    Raises `InputError` where the tokens cannot be known, or are not the response's own.
    """
    if dump.listing is None:
        return dump
    found = settle(dump.path, dump.listing, tokens, words, bos)
    some = (found.ids >= 0) & np.isfinite(found.values)
    what = "probabilities after sampling" if dump.listing.sampled else "log-probabilities"
    what = "logits" if found.logits else what
    form = (
        f"{what} of {int(some.sum())} tokens at {int(some.any(axis=1).sum())} positions, in "
        f"{dump.listing.form}"
    )
    return replace(
        dump,
        tokens=found.tokens,
        top=(found.ids, found.values),
        form=form,
        logits=found.logits,
        sampled=dump.listing.sampled,
        generated=found.prompt,
        step=0.0 if dump.listing.probabilities else _half_step(found.values),
        notes=dump.notes + dump.listing.notes + found.notes,
    )


def _half_step(values: np.ndarray) -> float:
    """Return half of the last decimal that is written, 0 where numbers are not rounded so."""
    finite = values[np.isfinite(values)]
    finite = finite[finite != 0]
    if len(finite) < FEWEST:
        return 0.0
    for decimals in range(DECIMALS):
        if (np.abs(finite * 10**decimals - np.rint(finite * 10**decimals)) < 1e-6).all():
            return float(0.5 * 10.0**-decimals)
    return 0.0


register(Reader("event streams", ".sse", recognise_stream, read))
register(Reader("logprobs", ".json", recognise, read))
