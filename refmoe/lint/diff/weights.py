"""Decide whether two stored matrices hold the same weights. The only such decision in the house.

    refmoe lint --against, refmoe quant verify  →  compare(a, b)

Values x of the first and y of the second are compared tile by tile in float64, where every stored
format is exact (in float32 where that is exact as well). The formats of both sides decide what may
differ:

    one format     nothing. Both hold codes of the same kind, so a difference is another weight,
                   be it one step of bf16, one code of INT4, or one scale of FP8.
    two formats    what storing one number in both can produce:

        |x - y| ≤ h(a) + h(b)

    where h(m) is the most by which a number may be from the value that m stores for it. A quantised
format states it as `half_step` (model/formats/):

        float64, float32, float16, bf16    half a unit in the last place
        INT4     s·(1/2 + 8·2⁻⁸)     half a code, and 8 codes times the rounding of s to bf16
        Q8_0     s·(1/2 + 127·2⁻¹¹)  half a code, and 127 codes times the rounding of s to float16
        Q4_0     d·(1/2 + 8·2⁻¹¹)    as above; and d·(1 + 8·2⁻¹¹) above code 7 alone: ggml takes
                                     d = max/-8, so that numbers up to 8·d are cut to 7·d
        FP8      s·u/2·(1 + 10⁻⁶)    half a unit of e4m3, and the rounding of s to float32
        others   no bound for one value: √(Σ(x - y)² / Σx²) ≤ `LOOSE` (K-quants, IQ)

    h adds up because both may have been made of a third, a bf16 original.

    INT4 and Q4_0  have one grid where one scale is the other's rounding, as a repack leaves it:
                   then codes must be equal, and only |x|·|1 - d/s| is allowed. Where scales are
                   nearly but not so related (within 2⁻⁶) nothing is. Else the grids are different,
                   as where llama.cpp quantised anew, and the rule for two formats holds.

Whatever passes by steps, and is the first times a factor that no rounding makes, is wrong too.
"""

from collections.abc import Iterator
from math import sqrt
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from refmoe.fast.threads import single_blas_thread
from refmoe.lint.base import TILE, same_bytes
from refmoe.lint.matrices import widen
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import Matrix, dequantize, round_bf16, rows, tiles

Verdict: TypeAlias = Literal["same bits", "same values", "rounded", "within a step", "wrong"]

LOOSE = 0.35  # relative RMS of formats without a bound for one value: two bits are off by a quarter
NEARLY = 2.0**-6  # scales closer than this and not each other's rounding are a damaged repack
FACTOR = 2.0**-8  # a rounded scale is off by up to 2⁻⁹ as a whole: not a factor anyone meant
EXPONENT = np.uint64(0x7FF << 52)  # the bits of a float64 that hold its exponent
PRECISION = {"float16": (11, -14), "float32": (24, -126), "float64": (53, -1022)}


class Compared(NamedTuple):
    """How the second of two matrices stands to the first."""

    verdict: Verdict
    error: float | None = None  # √(Σ(x - y)² / Σx²); None where values cannot be compared
    largest: float | None = None  # max|x - y| / max|x|
    factor: float | None = None  # the second is the first times this


def compare(a: Matrix, b: Matrix) -> Compared:
    """Compare two stored matrices by the rule above; `a` is taken to be right."""
    if a.shape != b.shape:
        return Compared("wrong")
    if _same_parts(a, b):
        return Compared("same bits", 0.0, 0.0)
    if not is_float(a) or not is_float(b):
        return Compared("wrong")
    with np.errstate(invalid="ignore", over="ignore"):
        return _compare_values(a, b)


@single_blas_thread()
def _compare_values(a: Matrix, b: Matrix) -> Compared:
    """Compare two matrices of numbers and one shape, whose bytes differ."""
    exact = np.float32 if _fits_float32(a) and _fits_float32(b) else np.float64
    strict = same_format(a, b)
    aa = ab = dd = most = worst = 0.0
    equal = True
    near = step = not strict
    for p, q in pairs_of_tiles(a, b):
        x, y = dequantize(p, exact), dequantize(q, exact)
        if np.array_equal(x, y):  # most tiles, and the rest of the sums is for what differs
            square = float(np.vdot(x, x))
            aa, ab = aa + square, ab + square
            most = max(most, float(np.abs(x).max(initial=0)))
            continue
        bf16 = not strict and exact is np.float32 and _rounds_to_bf16(p, x, q, y)
        x, y = x.astype(np.float64), y.astype(np.float64)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        d = np.where(same, 0.0, np.abs(x - y))
        equal = equal and bool(same.all())
        most = max(most, float(np.abs(x).max(initial=0)))
        worst = max(worst, float(d.max(initial=0)))
        aa, ab, dd = aa + (x * x).sum(), ab + (x * y).sum(), dd + (d * d).sum()
        if strict or bf16:
            continue
        rounding, steps = allowed(p, x, q, y)
        near = near and bool((d <= rounding).all())
        step = step and bool((d <= rounding + steps).all())
    if equal:
        return Compared("same values", 0.0, 0.0)
    error = sqrt(dd / aa) if aa > 0 and np.isfinite(dd / aa) else None
    largest = worst / most if most else worst
    if near:
        return Compared("rounded", error, largest)
    if not strict and (_has_no_steps(a) or _has_no_steps(b)):
        step = error is not None and error <= LOOSE
    if aa > 0 and np.isfinite(ab):
        factor = ab / aa
        if abs(factor - 1) > FACTOR and factor != 0 and _is_scaled(a, b, factor):
            return Compared("wrong", error, largest, factor)
    return Compared("within a step" if step else "wrong", error, largest)


def same_format(a: Matrix, b: Matrix) -> bool:
    """Return whether both matrices are stored in one format, so that nothing may differ.

    kv_b_proj in halves is in one format with a whole one only if that is plain: blocks of its
    transposed keys run along the other axis.
    """
    if isinstance(a, Heads) and isinstance(b, Heads):
        return same_format(a.k_b, b.k_b) and same_format(a.v_b, b.v_b)
    if isinstance(a, Heads) or isinstance(b, Heads):
        halves, whole = (a, b) if isinstance(a, Heads) else (b, a)
        assert isinstance(halves, Heads)
        plain = isinstance(whole, BF16 | np.ndarray)
        return plain and same_format(halves.k_b, whole) and same_format(halves.v_b, whole)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype == b.dtype
    kinds = [(type(m), getattr(m, "block", None), getattr(m, "name", None)) for m in (a, b)]
    return kinds[0] == kinds[1]


def allowed(
    a: Matrix, x: np.ndarray, b: Matrix, y: np.ndarray
) -> tuple[np.ndarray | float, np.ndarray | float]:
    """Return how far x and y may be apart: by rounding alone, and by quantisation on top of it.

    a, b: as stored, in two formats; x, y: their values [O, I] or [I] in float64
    """
    if isinstance(a, Int4) and isinstance(b, Q4):
        return _on_one_grid(a, b, x, y)
    if isinstance(a, Q4) and isinstance(b, Int4):
        return _on_one_grid(b, a, y, x)
    rounding = half_unit(a, x) + half_unit(b, y)
    return rounding, half_step(a, x, y) + half_step(b, y, x)


def _on_one_grid(
    int4: Int4, q4: Q4, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray | float, np.ndarray | float]:
    """Return how far INT4 x and Q4_0 y may be apart, as `allowed` does.

    A repack leaves both on one grid, where only the rounding of scales is allowed.
    """
    s, d = np.abs(int4.steps()), np.abs(q4.steps())
    repacked = (s.astype(np.float16) == d) | (round_bf16(d.astype(np.float32)) == s)
    off = np.abs(s - d)
    rounding = np.where(
        repacked, np.abs(x) * np.divide(off, s, out=np.zeros_like(s), where=s > 0), 0
    )
    apart = ~repacked & (off > NEARLY * s)
    steps = half_step(int4, x, y) + half_step(q4, y, x)
    return rounding * (1 + 1e-12), np.where(apart, steps, 0.0)  # 1e-12: of this computation itself


def half_unit(m: Matrix, w: np.ndarray) -> np.ndarray | float:
    """Return half a unit in the last place of each value w, if m is stored in a plain format."""
    if isinstance(m, Heads):
        return _of_halves(m, half_unit(m.k_b, widen(m.k_b)), half_unit(m.v_b, widen(m.v_b)))
    if not isinstance(m, BF16 | np.ndarray):
        return 0.0
    digits, least = (8, -126) if isinstance(m, BF16) else PRECISION[m.dtype.name]
    bits = np.ascontiguousarray(w, np.float64).view(np.uint64) & EXPONENT
    power = np.maximum(bits.view(np.float64), 2.0**least)  # 2^⌊log2|w|⌋
    return np.where(np.isfinite(power), power * 2.0**-digits, 0.0)


def half_step(m: Matrix, w: np.ndarray, other: np.ndarray) -> np.ndarray | float:
    """Return how far a number may be from the value w that a quantised format stores for it.

    other: the number, or what another file stores for it; Q4_0 cuts on one side alone.
    """
    if isinstance(m, Heads):
        keys, values = _split(m, other)
        k_b, v_b = m.k_b, m.v_b
        return _of_halves(m, half_step(k_b, widen(k_b), keys), half_step(v_b, widen(v_b), values))
    return m.half_step(w, other) if hasattr(m, "half_step") else 0.0


def _of_halves(m: Heads, keys: np.ndarray | float, values: np.ndarray | float) -> np.ndarray:
    """Return numbers that belong to the two halves of kv_b_proj in the order of the whole."""
    halves = [np.broadcast_to(n, h.shape) for n, h in ((keys, m.k_b), (values, m.v_b))]
    return widen(Heads(halves[0], halves[1], m.heads))


def _split(m: Heads, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return values of a whole kv_b_proj in the shapes of its halves, the inverse of `Heads`."""
    H, N = m.heads, m.k_b.shape[1]
    by_head = w.reshape(H, -1, w.shape[1])
    keys = by_head[:, :N].transpose(0, 2, 1).reshape(m.k_b.shape)
    return keys, by_head[:, N:].reshape(m.v_b.shape)


def is_float(m: Matrix) -> bool:
    """Return whether a matrix holds numbers that can be rounded; integers are only compared."""
    return not isinstance(m, np.ndarray) or np.issubdtype(m.dtype, np.floating)


def _has_no_steps(m: Matrix) -> bool:
    """Return whether m is in a format that states no `half_step`, or half of it is."""
    if isinstance(m, Heads):
        return _has_no_steps(m.k_b) or _has_no_steps(m.v_b)
    return not isinstance(m, np.ndarray) and not hasattr(m, "half_step") and not isinstance(m, BF16)


def _rounds_to_bf16(a: Matrix, x: np.ndarray, b: Matrix, y: np.ndarray) -> bool:
    """Return whether one is the other in bf16: the commonest rounding, and quick to look for."""
    if isinstance(a, BF16) == isinstance(b, BF16):
        return False
    wide, narrow = (x, y) if isinstance(b, BF16) else (y, x)
    return np.array_equal(round_bf16(wide), narrow)


def _fits_float32(m: Matrix) -> bool:
    """Return whether float32 holds every value: a code times its scale has few enough digits.

    INT4 times bf16 has 11 significant bits; e4m3 times float32 has 28.
    """
    if isinstance(m, Heads):
        return _fits_float32(m.k_b) and _fits_float32(m.v_b)
    return not isinstance(m, Fp8Block) and not (isinstance(m, np.ndarray) and m.dtype == np.float64)


def _same_parts(a: Matrix, b: Matrix) -> bool:
    """Return whether two matrices are in one format and have the same bytes."""
    if type(a) is not type(b) or not same_format(a, b):
        return False
    parts = zip(_arrays(a), _arrays(b), strict=True)
    return all(x.dtype == y.dtype and same_bytes(x, y) for x, y in parts)


def _arrays(m: Matrix) -> list[np.ndarray]:
    """Return the stored arrays of a matrix."""
    return list(m.arrays().values()) if hasattr(m, "arrays") else [m]


def pairs_of_tiles(a: Matrix, b: Matrix) -> Iterator[tuple[Matrix, Matrix]]:
    """Yield the same rows of both matrices, as stored, in pieces that fit in memory."""
    if len(a.shape) < 2 or isinstance(a, Heads) or isinstance(b, Heads):  # whose rows are columns
        yield a, b
        return
    blocked = a if isinstance(a, Fp8Block) or not isinstance(b, Fp8Block) else b
    for tile, _ in tiles(blocked, TILE // 4):  # several float64 arrays of this size are alive
        yield rows(a, tile), rows(b, tile)


def _is_scaled(a: Matrix, b: Matrix, factor: float) -> bool:
    """Return whether b is a times a factor, both as exactly as they are stored."""
    # a scale in bf16 was rounded once more; else the fit is off by less than roundings are
    unit = 2.0**-8 if isinstance(a, Int4) or isinstance(b, Int4) else 2.0**-12
    if isinstance(a, Q4 | Q8 | Heads) or isinstance(b, Q4 | Q8 | Heads):
        unit = max(unit, 2.0**-11)
    for p, q in pairs_of_tiles(a, b):
        x, y = factor * widen(p), widen(q)
        bound = abs(factor) * half_unit(p, x / factor) + half_unit(q, y) + unit * np.abs(x)
        if not (np.abs(x - y) <= bound).all():
            return False
    return True
