"""Name the mistake that turns one matrix into another: one catalogue for every comparison.

A mistake is one registered function. It is given a suspect, a pair that differs, and yields what
the second matrix would hold if the mistake had been made, with the words for it. The first that is
the second matrix, within what both formats allow, is the cause. If none is, the first that nearly
is: codes that saturate, and formats that quantise coarsely, hide a mistake so. If none is that
either, the difference is described.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.lint.diff.weights import (
    LOOSE,
    Compared,
    half_step,
    half_unit,
    is_float,
    same_format,
)
from refmoe.lint.matrices import matrix_of, parts_of, widen
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.coded import Coded
from refmoe.model.formats.fp8_block import E4M3, Fp8Block
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import Matrix, rows
from refmoe.weights.checkpoint import Checkpoint

CAUSE_LIMIT = 20_000_000  # elements of a tensor whose cause is sought; K2's q_b_proj has 18.9 M
NEARLY = 0.02  # Σ(candidate - y)² / Σ candidate²: as near as a format of four bits leaves them
FACTOR = 1e-3  # from which on a factor is told
UNKNOWN = "no simple cause found"


class Cause(NamedTuple):
    """What turns the first matrix into the second."""

    category: str  # the same for one mistake, whatever numbers its text has
    text: str


class Seen(NamedTuple):
    """Values, and how far the numbers meant may be from each."""

    values: np.ndarray
    bound: np.ndarray

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> "Seen":
        """Return them in another order or shape."""
        return Seen(move(self.values), move(self.bound))

    def is_(self, other: "Seen") -> bool:
        """Return whether both may have been made of the same numbers."""
        if self.values.shape != other.values.shape:
            return False
        return bool((np.abs(self.values - other.values) <= self.bound + other.bound).all())

    def off(self, other: "Seen") -> float:
        """Return Σ(self - other)² / Σ self²; infinite if the shapes differ."""
        if self.values.shape != other.values.shape:
            return np.inf
        square = float((self.values**2).sum())
        away = float(((self.values - other.values) ** 2).sum())
        return away / square if square > 0 and np.isfinite(away) else np.inf


@dataclass(frozen=True)
class Suspect:
    """Two matrices of one key that do not hold the same weights."""

    key: str
    ours: Checkpoint
    a: Matrix  # ours, taken to be right
    b: Matrix
    x: Seen = field(init=False)
    y: Seen = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", see(self.a, self.b))
        object.__setattr__(self, "y", see(self.b, self.a))

    @property
    def cfg(self) -> Config:
        """The settings of our checkpoint."""
        return self.ours.cfg


Candidate = tuple[Cause, Seen]
Mistake = Callable[[Suspect], Iterator[Candidate]]
MISTAKES: list[Mistake] = []  # in the order in which they are tried


def mistake(f: Mistake) -> Mistake:
    """Register a mistake at the end of the catalogue."""
    MISTAKES.append(f)
    return f


def see(m: Matrix, other: Matrix) -> Seen:
    """Return the values of a matrix with the rounding that a mistake may hide behind.

    Between two matrices in one format that is the rounding of scales, not of codes.
    """
    w = widen(m)
    bound = half_unit(m, w)
    if not _one_grid(m, other):
        bound = bound + half_step(m, w, w)
    elif not isinstance(m, BF16 | np.ndarray):
        unit = {Int4: 2.0**-8, Fp8Block: 2.0**-24}.get(type(m), 2.0**-11)
        bound = bound + unit * np.abs(w)
    return Seen(w, np.broadcast_to(bound, w.shape))


def _one_grid(a: Matrix, b: Matrix) -> bool:
    return same_format(a, b) or (isinstance(a, Int4 | Q4) and isinstance(b, Int4 | Q4))


def find_cause(key: str, a: Matrix, b: Matrix, ours: Checkpoint, how: Compared) -> Cause:
    """Return the mistake that turns a into b, or in what they differ if none is known."""
    if how.factor is not None:
        return Cause("factor", f"the right one times {how.factor:.4g}")
    if not is_float(a) or not is_float(b):
        return Cause("bits", "not the same bits, and no numbers to compare")
    if prod(b.shape) > CAUSE_LIMIT:
        return Cause(UNKNOWN, f"{UNKNOWN}; too large to be looked into")
    with np.errstate(all="ignore"):  # values that are not finite are equal to nothing
        s = Suspect(key, ours, a, b)
        if found := _search(s):
            return found
        described = describe_difference(a, b, s.x.values, s.y.values)
        return (described.category == UNKNOWN and _scaled_nearly(s)) or described


def _limit(s: Suspect) -> float:
    """Return how far off a candidate may be that explains most of the difference."""
    return min(LOOSE**2 if isinstance(s.b, Coded) else NEARLY, s.x.off(s.y) / 4)


def _search(s: Suspect) -> Cause | None:
    """Return the first mistake that is exactly the second matrix, or else nearly."""
    if not s.y.values.any():
        return Cause("all zero", "all zero: never loaded?")
    limit = _limit(s)
    nearly: Cause | None = None
    for each in MISTAKES:
        for cause, candidate in each(s):
            if candidate.is_(s.y):
                return cause
            if nearly is None and candidate.off(s.y) <= limit:
                nearly = cause
    return nearly


def _scaled_nearly(s: Suspect) -> Cause | None:
    """Return the factor that nearly turns the first matrix into the second, if one does."""
    x, y = s.x.values, s.y.values
    if x.shape != y.shape:
        return None
    top = float((x * y).sum() / max(float((x * x).sum()), 1e-300))
    scaled = s.x.moved(lambda w: w * top)
    if abs(top) > FACTOR and abs(top - 1) > FACTOR and scaled.off(s.y) <= _limit(s):
        return Cause("factor", f"the right one times {top:.4g}")
    return None


# --- numbers in another order


def _in_order(s: Suspect, text: str, order: np.ndarray, axis: int = 0) -> Candidate:
    return Cause(text, text), s.x.moved(lambda w: np.take(w, order, axis=axis))


@mistake
def transposed(s: Suspect) -> Iterator[Candidate]:
    """Yield the matrix with rows for columns."""
    if s.x.values.ndim == 2:
        yield Cause("transposed", "transposed"), s.x.moved(lambda w: w.T)


@mistake
def rows_reordered(s: Suspect) -> Iterator[Candidate]:
    """Yield rows in the orders of merged, split and paired halves."""
    O = s.x.values.shape[0]
    if s.x.values.ndim < 2 or O % 2:
        return
    order = np.arange(O)
    for text, rows_ in (
        ("halves of its rows swapped", np.roll(order, O // 2)),
        ("rows of both halves interleaved", order.reshape(2, -1).T.reshape(-1)),
        ("even rows before odd ones", order.reshape(-1, 2).T.reshape(-1)),
        ("rows in pairs, each pair turned", order ^ 1),
    ):
        yield _in_order(s, text, rows_)


@mistake
def rope_order(s: Suspect) -> Iterator[Candidate]:
    """Yield rows of the rotated channels taken from pairs to halves, or back, or put first."""
    O, R = s.x.values.shape[0], s.cfg.qk_rope_head_dim
    if s.key.endswith(("q_b_proj.weight", "q_proj.weight")) and O % s.cfg.qk_head_dim == 0:
        head = s.cfg.qk_head_dim
    elif s.key.endswith("kv_a_proj_with_mqa.weight"):
        head = O
    else:
        return
    halves = np.concatenate((np.arange(0, R, 2), np.arange(1, R, 2)))
    for text, turn in (
        ("rows of the rotated channels permuted from pairs to halves", halves),
        ("rows of the rotated channels permuted from halves to pairs", np.argsort(halves)),
    ):
        order = np.arange(O).reshape(-1, head)
        order[:, head - R :] = order[:, head - R :][:, turn]
        yield _in_order(s, text, order.reshape(-1))
    order = np.roll(np.arange(O).reshape(-1, head), R, axis=1)
    yield _in_order(s, "rotated channels before the others in each head", order.reshape(-1))


@mistake
def keys_and_values(s: Suspect) -> Iterator[Candidate]:
    """Yield kv_b_proj with keys untransposed, after the values, or all keys before all values."""
    H, N = s.cfg.num_attention_heads, s.cfg.qk_nope_head_dim
    O = s.x.values.shape[0]
    if not s.key.endswith("kv_b_proj.weight") or H * (N + s.cfg.v_head_dim) != O:
        return

    def untransposed(w: np.ndarray) -> np.ndarray:
        by_head = w.reshape(H, -1, w.shape[1]).copy()
        keys = by_head[:, :N]
        by_head[:, :N] = keys.transpose(0, 2, 1).reshape(keys.shape)
        return by_head.reshape(w.shape)

    text = "attn_k_b read without its transposition"
    yield Cause(text, text), s.x.moved(untransposed)
    order = np.arange(O).reshape(H, -1)
    yield _in_order(s, "values before keys in each head", np.roll(order, -N, axis=1).reshape(-1))
    apart = np.concatenate((order[:, :N].reshape(-1), order[:, N:].reshape(-1)))
    yield _in_order(s, "keys of all heads before values of all heads", apart)
    yield _in_order(s, "keys and values taken head by head from a file without", np.argsort(apart))


@mistake
def heads_permuted(s: Suspect) -> Iterator[Candidate]:
    """Yield heads in the order in which the first row, or column, of each is found again."""
    cfg, (axis, width) = s.cfg, (0, 0)
    if s.key.endswith(("q_b_proj.weight", "q_proj.weight")):
        width = cfg.qk_head_dim
    elif s.key.endswith("kv_b_proj.weight"):
        width = cfg.qk_nope_head_dim + cfg.v_head_dim
    elif s.key.endswith("o_proj.weight"):
        axis, width = 1, cfg.v_head_dim
    H = cfg.num_attention_heads
    if not width or s.x.values.shape != s.y.values.shape or s.x.values.shape[axis] != H * width:
        return
    ours, theirs = (np.take(m.values, np.arange(H) * width, axis=axis) for m in (s.x, s.y))
    ours, theirs = (m.T if axis else m for m in (ours, theirs))  # [H, ·]
    nearest = np.array([((ours - row) ** 2).sum(axis=1).argmin() for row in theirs])
    if sorted(nearest) != list(range(H)) or (nearest == np.arange(H)).all():
        return
    order = (nearest[:, None] * width + np.arange(width)).reshape(-1)
    first = int(np.flatnonzero(nearest != np.arange(H))[0])
    text = f"heads in another order: its head {first} is our head {nearest[first]}"
    yield Cause("heads permuted", text), _in_order(s, text, order, axis)[1]


@mistake
def nibble_order(s: Suspect) -> Iterator[Candidate]:
    """Yield codes unpacked from words and blocks in another order."""
    if s.x.values.ndim < 2 or s.x.values.shape[1] % 32:
        return
    c = np.arange(s.x.values.shape[1])
    for text, order in (
        ("nibbles swapped in each byte", c ^ 1),
        ("nibbles read from the highest of each word", c ^ 7),
        ("bytes of each word reversed", c ^ 6),
        ("nibbles in Q4_0's order, j beside j + 16", c // 32 * 32 + c % 2 * 16 + c % 32 // 2),
        ("Q4_0's nibbles taken as consecutive", c // 32 * 32 + c % 16 * 2 + c % 32 // 16),
    ):
        yield _in_order(s, text, order, 1)


# --- codes taken for other numbers


@mistake
def zero_point(s: Suspect) -> Iterator[Candidate]:
    """Yield codes of INT4 or Q4_0 less another offset than 8, or read as two's complement."""
    for m, w, v, back in _both_ways(s):
        if not isinstance(m, Int4 | Q4):
            continue
        d = m.steps()
        k = _median_step(v.values - w.values, d)
        if k:
            text = f"codes read with an offset of {8 - k:.0f} instead of 8"
            yield Cause("zero point", text), back(Seen(w.values + k * d, w.bound))
        signed = np.where(w.values * np.sign(d) < 0, 8 * d, -8 * d)
        text = "codes read as two's complement instead of offset by 8"
        yield Cause("signed nibbles", text), back(Seen(w.values + signed, w.bound))


@mistake
def codes_shifted(s: Suspect) -> Iterator[Candidate]:
    """Yield codes of Q8_0 with a constant added, and codes of FP8 one step away from zero."""
    for m, w, v, back in _both_ways(s):
        if isinstance(m, Q8) and (k := _median_step(v.values - w.values, m.steps())):
            text = f"codes with {k:+.0f} added to each"
            yield Cause("zero point", text), back(Seen(w.values + k * m.steps(), w.bound))
        if isinstance(m, Fp8Block):
            for up, text in ((1, "larger"), (-1, "smaller")):
                moved = np.clip((m.bits & 0x7F).astype(np.int16) + up, 0, 0x7E)
                values = E4M3.astype(np.float64)[(m.bits & 0x80) | moved.astype(np.uint8)]
                text = f"every code one step {text if m is s.a else _TURNED[text]} in magnitude"
                yield Cause("codes", text), back(Seen(values * m.steps(), w.bound))


_TURNED = {"larger": "smaller", "smaller": "larger"}


@mistake
def block_scales(s: Suspect) -> Iterator[Candidate]:
    """Yield codes of FP8 without their scales, and divided by them."""
    for m, w, _, back in _both_ways(s):
        if isinstance(m, Fp8Block):
            d = m.steps()
            text = "its codes without their block scales"
            yield Cause("no scale", text), back(Seen(w.values / d, w.bound / d))
            text = "codes divided by weight_scale_inv"
            yield Cause("inverted scales", text), back(Seen(w.values / d**2, w.bound / d**2))


@mistake
def offset(s: Suspect) -> Iterator[Candidate]:
    """Yield a vector plus a constant: gains stored less 1."""
    if s.x.values.ndim == 1 and s.x.values.shape == s.y.values.shape:
        k = float(np.median(s.y.values - s.x.values))
        if abs(k) <= np.median(s.x.bound + s.y.bound):
            return
        moved = Seen(s.x.values + k, s.x.bound + 2.0**-52 * abs(k))
        yield Cause("offset", f"the right one plus {k:.6g}"), moved


def _both_ways(
    s: Suspect,
) -> Iterator[tuple[Matrix, Seen, Seen, Callable[[Seen], Seen]]]:
    """Yield each matrix as the one whose codes were misread, with a way back to a candidate.

    If it is the second whose codes explain the first, the candidate is the second itself where
    they do, and nothing like it elsewhere.
    """
    if s.x.values.shape != s.y.values.shape:
        return
    yield s.a, s.x, s.y, lambda made: made
    yield s.b, s.y, s.x, lambda made: s.y if made.is_(s.x) else Seen(s.y.values * np.nan, s.y.bound)


def _median_step(difference: np.ndarray, d: np.ndarray) -> float:
    """Return the median of difference / step, rounded to a whole number."""
    used = d != 0
    return float(np.rint(np.median(difference[used] / d[used]))) if used.any() else 0.0


# --- another tensor


@mistake
def another_tensor(s: Suspect) -> Iterator[Candidate]:
    """Yield gate for up, up for gate, and the matrices of other experts."""
    for category, other in _others(s.key, s.ours):
        m = matrix_of(s.ours, other)
        if m.shape == s.b.shape and _first_rows_alike(m, s.b):
            yield Cause(category, f"{category}: it is our {other}"), see(m, s.b)


def _others(key: str, ours: Checkpoint) -> Iterator[tuple[str, str]]:
    for one, two in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
        other = key.replace(f".{one}.", f".{two}.")
        if key.endswith(f".{one}.weight") and parts_of(ours, other):
            yield "gate and up swapped", other
    expert = re.match(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)(\..*)", key)
    if expert:
        for e in range(ours.cfg.n_routed_experts):
            other = f"{expert[1]}{e}{expert[3]}"
            if e != int(expert[2]) and parts_of(ours, other):
                yield "another expert's", other


def _first_rows_alike(a: Matrix, b: Matrix) -> bool:
    """Return whether the first rows (of FP8, the first blocks') may be the same: quickly seen."""
    units = [m.block[0] for m in (a, b) if isinstance(m, Fp8Block)]
    first = slice(0, min(max(units, default=1), a.shape[0]))
    p, q = rows(a, first), rows(b, first)
    one, other = see(p, q), see(q, p)
    return one.is_(other) or one.off(other) <= LOOSE**2


# --- no mistake known


def describe_difference(a: Matrix, b: Matrix, x: np.ndarray, y: np.ndarray) -> Cause:
    """Return in what two matrices differ: codes, scales or values, how many, by how much."""
    if x.shape != y.shape:
        return Cause(UNKNOWN, UNKNOWN)
    n = int((~((x == y) | (np.isnan(x) & np.isnan(y)))).sum())
    unknown = Cause(UNKNOWN, f"{UNKNOWN}; {n:,} of {x.size:,} values differ")
    if not same_format(a, b) or isinstance(a, Heads):
        return unknown
    if isinstance(a, Int4 | Q4 | Q8 | Fp8Block):
        return _describe_codes(a, b, unknown)
    if isinstance(a, Coded):
        return unknown
    steps = np.abs(_ordinal(a) - _ordinal(b))
    if not np.isfinite(x).all() or not np.isfinite(y).all() or steps.max() > 1:
        return unknown
    return Cause("values", f"{n:,} of {x.size:,} values differ, each by one step of its format")


def _describe_codes(a: Int4 | Q4 | Q8 | Fp8Block, b: Matrix, unknown: Cause) -> Cause:
    assert isinstance(b, Int4 | Q4 | Q8 | Fp8Block)
    (codes, scales), (others, their_scales) = (_codes_and_scales(m) for m in (a, b))
    off = np.abs(codes - others)
    wrong, most = int((off > 0).sum()), int(off.max())
    bad = ~((scales == their_scales) | (np.isnan(scales) & np.isnan(their_scales)))
    if wrong and bad.any():
        return unknown
    if not wrong:
        ratio = np.abs(their_scales[bad] / scales[bad])
        by = float(ratio[np.abs(np.log(ratio)).argmax()])
        text = f"codes are equal; {int(bad.sum()):,} of {scales.size:,} scales differ, by x{by:.4g}"
        return Cause("scales", text)
    if most > 1:
        return unknown
    return Cause("codes", f"{wrong:,} of {codes.size:,} codes differ, each by one step")


def _codes_and_scales(m: Int4 | Q4 | Q8 | Fp8Block) -> tuple[np.ndarray, np.ndarray]:
    """Return codes as whole numbers that one step changes by one, and scales, both float64."""
    match m:
        case Fp8Block(bits, scale, _):
            magnitude = (bits & 0x7F).astype(np.float64)
            return np.where(bits & 0x80, -magnitude, magnitude), scale.astype(np.float64)
        case Int4(packed, scale):
            one = np.full_like(scale, 0x3F80)  # 1.0 in bf16
            return widen(Int4(packed, one)), widen(BF16(scale))
        case _:
            half = np.ascontiguousarray(m.blocks[..., :2]).view(np.float16)[..., 0]
            one = m.blocks.copy()
            one[..., :2] = np.array([1.0], np.float16).view(np.uint8)
            return widen(type(m)(one)), half.astype(np.float64)


def _ordinal(m: Matrix) -> np.ndarray:
    """Return the bits of floats as whole numbers in the order of the floats."""
    bits = m.bits if isinstance(m, BF16) else m
    assert isinstance(bits, np.ndarray)
    size = bits.dtype.itemsize
    signed = bits.reshape(-1).view(f"i{size}").astype(np.int64)
    lowest = -(1 << (8 * size - 1))
    return np.where(signed < 0, lowest - signed, signed)
