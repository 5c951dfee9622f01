"""Search for the cause of a difference: a mistake of the catalogue, or else a description.

Mistakes are tried in the order of the catalogue (diff/mistakes.py). The first whose result is the
second matrix, within what both formats allow, is the cause. If none is, the first that nearly is:
codes that saturate, and formats that quantise coarsely, hide a mistake so. If none is that either,
the difference is described: which codes, scales or values differ, how many, and by how much.
"""

from math import prod

import numpy as np

from refmoe.lint.diff.mistakes import MISTAKES
from refmoe.lint.diff.suspect import Cause, Suspect
from refmoe.lint.diff.weights import LOOSE, Compared, is_float, same_format
from refmoe.lint.matrices import widen
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.coded import Coded
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import Matrix
from refmoe.weights.checkpoint import Checkpoint

CAUSE_LIMIT = 20_000_000  # elements of a tensor whose cause is sought; K2's q_b_proj has 18.9 M
NEARLY = 0.02  # Σ(candidate - y)² / Σ candidate²: as near as a format of four bits leaves them
FACTOR = 1e-3  # from which on a factor is told
UNKNOWN = "no simple cause found"


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
    """Return whether codes or scales differ; `unknown` if both do, or codes by several steps."""
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
