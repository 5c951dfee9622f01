"""List the mistakes that turn one matrix into another: one catalogue for every comparison.

A mistake is one registered function. It is given a suspect, a pair that differs, and yields what
the second matrix would hold if the mistake had been made, with the words for it. diff/cause.py
tries them in the order in which they stand here.
"""

import re
from collections.abc import Callable, Iterator

import numpy as np

from refmoe.lint.diff.suspect import Cause, Seen, Suspect, see
from refmoe.lint.diff.weights import LOOSE
from refmoe.lint.matrices import matrix_of, parts_of
from refmoe.model.formats.fp8_block import E4M3, Fp8Block
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.matrix import Matrix, rows
from refmoe.weights.checkpoint import Checkpoint

Candidate = tuple[Cause, Seen]
Mistake = Callable[[Suspect], Iterator[Candidate]]
MISTAKES: list[Mistake] = []  # in the order in which they are tried


def mistake(f: Mistake) -> Mistake:
    """Register a mistake at the end of the catalogue."""
    MISTAKES.append(f)
    return f


# --- numbers in another order


def _in_order(s: Suspect, text: str, order: np.ndarray, axis: int = 0) -> Candidate:
    """Return the candidate whose rows, or columns, stand in another order."""
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
    """Yield what a tensor may have been confused with: category and key."""
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
