"""Compare two checkpoints, matrix by matrix."""

import re
from collections.abc import Iterator
from math import sqrt
from typing import NamedTuple

import numpy as np

from refmoe.lint.base import TILE, _Findings, _same_bytes, _watched
from refmoe.lint.diff import verify as quant_verify
from refmoe.lint.diff.mistakes import CAUSES, _cause
from refmoe.lint.diff.steps import _coarse, _fine, _is_float, _stored
from refmoe.lint.matrices import _keys, _matrix, _named, _wide
from refmoe.lint.router import DRAWS, _flips
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.coded import Coded
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import Matrix, dequantize, round_bf16, rows, tiles
from refmoe.weights.checkpoint import (
    Checkpoint,
    known_extra,
    tensor_class,
)
from refmoe.weights.gguf import Gguf


def _two_checkpoints(a: Checkpoint, b: Checkpoint, out: _Findings) -> None:
    """Every tensor of both; equal ones are counted by class, the others named."""
    ours, theirs = _keys(a), _keys(b)
    there = set(theirs)
    for key in sorted(set(ours) - there):
        extra = known_extra(key, a.cfg)
        kind = "extra tensors only here" if extra else "tensors the other lacks"
        out.add("note" if extra else "error", kind, key, f"not in {b.path}")
    unnamed = set(b.unread) - b.tensors.keys() if isinstance(b, Gguf) else set()
    for key in sorted((there - set(ours)) | unnamed):
        extra = known_extra(key, b.cfg)
        kind = "extra tensors only there" if extra else "tensors only the other has"
        out.add("note" if extra else "warning", kind, key, f"only in {b.path}")

    def size(key: str) -> int:
        return sum(c.tensors[n].nbytes for c in (a, b) for n in _stored(c, key))

    equal: dict[tuple[str, str], list[float]] = {}
    wrong = 0
    for key in _watched([key for key in ours if key in there], size):
        try:
            x, y = _matrix(a, key), _matrix(b, key)
            found = _compare(x, y)
        except (KeyError, ValueError, IndexError) as e:  # a part is missing or of a wrong shape
            out.add("error", "damaged tensors", key, f"cannot be compared: {e}")
            continue
        kinds = dict.fromkeys((_kind(a, key), _kind(b, key)))
        if found.verdict == "wrong":
            wrong += 1
            cause = found.cause or (_cause(key, x, y, a) if wrong <= CAUSES else None)
            if cause is None and _quantised(x, y) and x.shape == y.shape and wrong <= CAUSES:
                likely = quant_verify.likely(key.removesuffix(".weight"), a, x, y)
                cause = None if likely is None else (likely, likely)
            category, text = cause or ("wrong", "no simple cause found")
            how = f"relative error {found.error:.2g}: " if found.error is not None else ""
            how = f"shape {list(y.shape)} for {list(x.shape)}: " if x.shape != y.shape else how
            out.add("error", category, key, how + text, found.error or np.inf)
        else:
            kind = f"{tensor_class(key, a.cfg)}, {' and '.join(kinds)}"
            equal.setdefault((found.verdict, kind), []).append(found.error or 0.0)
            if found.verdict != "the same bits" and key.endswith("e_score_correction_bias"):
                _two_biases(a, b, key, out)
    for (verdict, kind), errors in sorted(equal.items()):
        worst = f", relative error up to {max(errors):.2g}" if max(errors) else ""
        out.add("note", verdict + kind, None, f"{verdict}: {len(errors):,} of {kind}{worst}")


def _kind(checkpoint: Checkpoint, key: str) -> str:
    match _matrix(checkpoint, key):
        case Int4():
            return "INT4"
        case Fp8Block():
            return "FP8"
        case _:
            tensors = checkpoint.tensors
            return "/".join(dict.fromkeys(tensors[name].dtype for name in _stored(checkpoint, key)))


def _two_biases(a: Checkpoint, b: Checkpoint, key: str, out: _Findings) -> None:
    bias, other = _named(a, key), _named(b, key)
    layer = re.match(r"model\.layers\.(\d+)\.mlp\.gate\.", key)
    if (
        (bias == other).all()
        or not layer
        or key.replace("e_score_correction_bias", "weight") not in a.tensors
    ):
        return
    share = _flips(a, int(layer[1]), bias, other)
    text = (
        f"rounded to {b.tensors[key].dtype}: {len(np.unique(bias))} distinct values are "
        f"{len(np.unique(other))}, and {share:.1%} of tokens choose other experts, by {DRAWS:,} "
        "draws of logits ~ N(0, |w_e|²); it must stay F32 (huggingface/transformers#42580)"
    )
    out.add("warning", "router bias", key, text, share)


class Compared(NamedTuple):
    verdict: str  # the same bits, the same values, rounded, within a step; or wrong
    error: float | None = None  # of the second, relative to the first in the 2-norm
    cause: tuple[str, str] | None = None  # category and text


def _compare(a: Matrix, b: Matrix) -> Compared:
    if _same_parts(a, b):
        return Compared("the same bits")
    if a.shape != b.shape:
        return Compared("wrong")
    if not _is_float(a) or not _is_float(b):
        return Compared("wrong", cause=("bits", "not the same bits, and no numbers to compare"))
    exact = np.float32 if _fits_float32(a) and _fits_float32(b) else np.float64
    aa = ab = dd = 0.0
    equal = near = step = True
    with np.errstate(invalid="ignore", over="ignore"):
        for p, q in _tile_pairs(a, b):
            x, y = dequantize(p, exact), dequantize(q, exact)
            if np.array_equal(x, y):  # most tiles, and the rest of the sums is for what differs
                square = float(np.vdot(x, x))
                aa, ab = aa + square, ab + square
                continue
            if exact is np.float32 and _rounds_to_bf16(p, x, q, y):
                equal = False
                aa, ab = aa + float(np.vdot(x, x)), ab + float(np.vdot(x, y))
                dd += float(np.vdot(x - y, x - y))
                continue
            x, y = x.astype(np.float64), y.astype(np.float64)
            same = (x == y) | (np.isnan(x) & np.isnan(y))
            d = np.where(same, 0.0, np.abs(x - y))
            fine = _fine(p, x, q) + _fine(q, y, p)
            equal = equal and bool(same.all())
            near = near and bool((d <= fine).all())
            step = step and bool((d <= fine + _coarse(p, q) + _coarse(q, p)).all())
            aa, ab, dd = aa + (x * x).sum(), ab + (x * y).sum(), dd + (d * d).sum()
    if equal:
        return Compared("the same values")
    error = sqrt(dd / aa) if aa > 0 and np.isfinite(dd / aa) else None
    if _coded(a) or _coded(b):
        step = error is not None and error <= quant_verify.LOOSE
    if near:
        return Compared("equal but for rounding", error)
    if aa > 0 and np.isfinite(ab):
        factor = ab / aa
        # a rounded scale is off by up to 2^-9 as a whole: not a factor anyone multiplied by
        if abs(factor - 1) > 2.0**-8 and factor != 0 and _scaled(a, b, factor):
            return Compared("wrong", error, ("factor", f"the right one times {factor:.4g}"))
    return Compared("within a quantisation step" if step else "wrong", error)


def _rounds_to_bf16(a: Matrix, x: np.ndarray, b: Matrix, y: np.ndarray) -> bool:
    """The commonest rounding, four times quicker than looking for it in general."""
    if isinstance(a, BF16) == isinstance(b, BF16):
        return False
    wide, narrow = (x, y) if isinstance(b, BF16) else (y, x)
    return np.array_equal(round_bf16(wide), narrow)


def _fits_float32(m: Matrix) -> bool:
    """A code of INT4 times a bf16 scale has 11 significant bits; e4m3 times float32 has 28."""
    if isinstance(m, Heads):
        return _fits_float32(m.k_b) and _fits_float32(m.v_b)
    return not isinstance(m, Fp8Block) and not (isinstance(m, np.ndarray) and m.dtype == np.float64)


def _same_parts(a: Matrix, b: Matrix) -> bool:
    if type(a) is not type(b) or a.shape != b.shape:
        return False
    parts = zip(_arrays(a), _arrays(b), strict=True)
    return all(x.dtype == y.dtype and _same_bytes(x, y) for x, y in parts)


def _arrays(m: Matrix) -> list[np.ndarray]:
    return list(m.arrays().values()) if hasattr(m, "arrays") else [m]


def _tile_pairs(a: Matrix, b: Matrix) -> Iterator[tuple[Matrix, Matrix]]:
    if len(a.shape) < 2 or isinstance(a, Heads) or isinstance(b, Heads):  # whose rows are columns
        yield a, b
        return
    blocked = a if isinstance(a, Fp8Block) or not isinstance(b, Fp8Block) else b
    for tile, _ in tiles(blocked, TILE // 4):  # several float64 arrays of this size are alive
        yield rows(a, tile), rows(b, tile)


def _scaled(a: Matrix, b: Matrix, factor: float) -> bool:
    """Whether b is a times a factor, both as exactly as they are stored."""
    # a scale in bf16 was rounded once more; else the fit is off by less than roundings are
    unit = 2.0**-8 if isinstance(a, Int4) or isinstance(b, Int4) else 2.0**-12
    for p, q in _tile_pairs(a, b):
        x, y = factor * _wide(p), _wide(q)
        bound = abs(factor) * _fine(p, x / factor, q) + _fine(q, y, p) + unit * np.abs(x)
        if not (np.abs(x - y) <= bound).all():
            return False
    return True


def _quantised(*each: Matrix) -> bool:
    return any(isinstance(m, Q8 | Q4 | Coded | Heads) for m in each)


def _coded(m: Matrix) -> bool:
    """Whether nobody here knows its steps."""
    return isinstance(m, Coded) or (isinstance(m, Heads) and (_coded(m.k_b) or _coded(m.v_b)))
