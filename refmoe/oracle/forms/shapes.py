"""Bring an array of a dump into rows and a point's own axes, whatever stands before or between.

Engines add a batch axis, flatten heads or put them before the rows, and a rank of a tensor-parallel
group holds a part of the heads or columns. `split_axes` tells the axes of rows from a point's own:

    model.layers.0.mlp         [2, 24, D]       2 prompts of 24 rows
    model.layers.0.self_attn#q_pe [1, H, 24, R] 24 rows, heads before them
    ....self_attn.q_b_proj     [24, H(N+R)/2]   24 rows, half of the columns
"""

from typing import NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.model.points import AXES, Parsed, parse
from refmoe.oracle.readers.base import Arrays

VOCABULARY_PADDING = 1024  # columns at most that an engine adds to the head, to split it evenly


class Rows(NamedTuple):
    """An array with its rows in front: [batch, rows, ...] or [rows, ...], and what it lacks."""

    array: np.ndarray
    batch: int | None  # None: no such axis, or of length one
    height: int  # rows of one prompt of the batch
    parts: int  # of how many equal parts along the point's first own axis it is one; 1: whole


def split_axes(name: str, x: np.ndarray, cfg: Config) -> Rows | None:
    """Return the rows of an array that bears a point's name; None where its axes are not those."""
    parsed = parse(name.removesuffix("#sketch"))
    if parsed.point is None or not x.ndim or not x.size:
        return None
    own = _own_axes(parsed, x, cfg)
    if name.endswith("#sketch"):
        own = [x.shape[-1]]
    arranged = _arrange(x, own)
    if arranged is None:
        return None
    before = arranged.ndim - len(own)
    axes = arranged.shape[before:]
    lead = tuple(n for n in arranged.shape[:before] if n != 1) or (1,)
    if len(lead) > 2:
        return None
    batch = lead[0] if len(lead) == 2 else None
    parts = own[0] // axes[0] if own else 1
    return Rows(arranged.reshape(*lead, *axes), batch, lead[-1], parts)


def cut_vocabulary(arrays: Arrays, cfg: Config) -> tuple[Arrays, tuple[str, ...]]:
    """Return the arrays with the head's columns of the vocabulary alone, and what is to be said."""
    x = arrays.get("lm_head")
    extra = 0 if x is None or not x.ndim else x.shape[-1] - cfg.vocab_size
    if x is None or not 0 < extra <= VOCABULARY_PADDING or x.dtype.kind != "f":
        return arrays, ()
    said = f"lm_head has {extra} columns beyond the vocabulary, which are not compared"
    return arrays | {"lm_head": x[..., : cfg.vocab_size]}, (said,)


def _own_axes(parsed: Parsed, x: np.ndarray, cfg: Config) -> list[int]:
    """Return the sizes of a point's axes but the first; S is what the array has."""
    assert parsed.point is not None
    return [x.shape[-1] if a in ("T", "S") else AXES[a](cfg) for a in parsed.point.axes[1:]]


def _arrange(x: np.ndarray, own: list[int]) -> np.ndarray | None:
    """Return the array with the point's own axes last, the first of them maybe in part."""
    s = x.shape
    if not own:
        return x
    if len(own) == 1:
        if own[0] % s[-1] == 0 and (s[-1] == own[0] or x.ndim < 3 or own[0] != s[-1] * s[-2]):
            return x
        return x.reshape(*s[:-2], -1) if x.ndim > 2 and own[0] == s[-1] * s[-2] else None
    heads, width = own
    if s[-1] == width and x.ndim > 1:
        if s[-2] == heads or (x.ndim == 3 and s[0] != heads and heads % s[-2] == 0):
            return x
        if x.ndim == 4 and heads % s[1] == 0:  # heads before the rows
            return x.transpose(0, 2, 1, 3)
        if x.ndim == 3 and s[0] == heads:
            return x.transpose(1, 0, 2)
    if s[-1] % width == 0 and heads % (s[-1] // width) == 0 and s[-1] != width:
        return x.reshape(*s[:-1], -1, width)
    return None
