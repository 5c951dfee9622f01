"""Tell which tokens a dump is of by the rows of its embedding, or of the first norm after it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from refmoe.model import matrix
from refmoe.model.decoder import Decoder
from refmoe.model.matrix import dequantize

EMBEDDING = "model.embed_tokens"
NORM = "model.layers.0.input_layernorm"
TILE = 4096  # words whose rows are compared at once
SURE = 0.1  # relative distance of a row from a word's: rounding to 8 bits is 0.03


class Named(NamedTuple):
    """The words whose rows are nearest to those of a dump."""

    ids: np.ndarray  # [n]
    sure: np.ndarray  # [n] bool: so near that it is this word's and only rounded


def name_rows(x: np.ndarray, decoder: Decoder, point: str = EMBEDDING) -> Named:
    """Return for each row of x [n, D] the word with the nearest row of the embedding.

    point  of which x are the rows: the embedding, or the norm of layer 0, which is each row of the
           embedding times a number of its own, times the gain
    """
    rows = x.reshape(len(x), -1).astype(np.float64)
    rows = np.where(np.isfinite(rows), rows, 0)
    gain = np.ones(decoder.cfg.hidden_size)
    if point == NORM:
        gain = dequantize(decoder.layers[0].input_layernorm, np.float64).reshape(-1)
    length = np.sqrt((rows * rows).sum(axis=1))
    best = np.full(len(rows), -np.inf)
    ids = np.zeros(len(rows), int)
    words = decoder.embed_tokens.shape[0]
    for start in range(0, words, TILE):
        some = np.arange(start, min(start + TILE, words))
        w = dequantize(matrix.rows(decoder.embed_tokens, some), np.float64) * gain
        size = np.sqrt((w * w).sum(axis=1))
        cosine = rows @ (w / np.maximum(size, 1e-300)[:, None]).T
        near = np.argmax(cosine, axis=1)
        value = cosine[np.arange(len(rows)), near]
        better = value > best
        best, ids = np.where(better, value, best), np.where(better, some[near], ids)
    cosine = best / np.maximum(length, 1e-300)
    sure = np.sqrt(np.maximum(0, 2 - 2 * cosine)) < SURE
    return Named(ids, sure & (length > 0))


def wrong_list(given: Sequence[int], named: Named) -> str | None:
    """Say how a list of tokens differs from the ids that the rows [T] name; None: it does not.

    Where one rule makes the named ids of the given ones (each less one, halves exchanged), the list
    may be right and the lookup wrong: the engine is judged as it is.
    """
    ids, listed = named.ids, np.asarray(given)
    differ = named.sure & (ids != listed)
    if len(ids) != len(listed) or differ.sum() <= len(ids) / 2:
        return None
    steps = np.unique((ids - listed)[differ])
    for k in range(1, max(2, len(ids) // 2)):
        if k >= len(ids):
            break
        for said, a, b in (
            ("behind", ids[k:], listed[:-k]),
            ("ahead of", ids[:-k], listed[k:]),
        ):
            if len(a) > 1 and (a == b).all() and len(np.unique(a)) > 1:
                return f"the list is {k} {'row' if k == 1 else 'rows'} {said} the dump"
    if len(steps) <= 2 and len(np.unique(listed)) > len(steps):
        return None
    return "the list is of another text"
