"""Find which known mistake turns one matrix into another."""

import re
from collections.abc import Callable, Iterator
from math import prod
from typing import NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.lint.diff import verify as quant_verify
from refmoe.lint.diff.steps import _coarse, _fine, _is_float, _stored
from refmoe.lint.matrices import _matrix, _wide
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.matrix import Matrix, rows
from refmoe.weights.checkpoint import (
    Checkpoint,
)

CAUSES = 100  # wrong tensors whose cause is sought: each takes seconds at K2's sizes
CAUSE_LIMIT = 20_000_000  # elements of such a tensor; K2's q_b_proj has 18.9 million


# --- what a wrong tensor is


class Seen(NamedTuple):
    values: np.ndarray
    bound: np.ndarray  # how far the number meant may be from the one stored

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> "Seen":
        return Seen(move(self.values), move(self.bound))

    def is_(self, other: "Seen") -> bool:
        if self.values.shape != other.values.shape:
            return False
        return bool((np.abs(self.values - other.values) <= self.bound + other.bound).all())


def _see(m: Matrix, other: Matrix) -> Seen:
    w = _wide(m)
    return Seen(w, np.broadcast_to(_fine(m, w, other) + _coarse(m, other), w.shape))


def _cause(key: str, a: Matrix, b: Matrix, ours: Checkpoint) -> tuple[str, str] | None:
    """The first simple cause that turns our tensor into theirs: category and text."""
    if prod(b.shape) > CAUSE_LIMIT or not _is_float(a) or not _is_float(b):
        return None
    with np.errstate(all="ignore"):  # values that are not finite are equal to nothing
        return _sought(key, a, b, ours)


def _sought(key: str, a: Matrix, b: Matrix, ours: Checkpoint) -> tuple[str, str] | None:
    x, y = _see(a, b), _see(b, a)
    if not y.values.any():
        return "all zero", "all zero: never loaded?"
    for text, move in _moves(key, x.values.shape, ours.cfg):
        if x.moved(move).is_(y):
            return text, text
    if found := _misread(a, b, x, y):
        return found
    for category, other in _others(key, ours):
        m = _matrix(ours, other)
        if m.shape == b.shape and _first_row(m, b) and _see(m, b).is_(y):
            return category, f"{category}: it is our {other}"
    return None


def _moves(
    key: str, shape: tuple[int, ...], cfg: Config
) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """The same numbers in another order."""
    if len(shape) < 2:
        return
    O, I = shape
    yield "transposed", lambda w: w.T
    if O % 2 == 0:
        yield "halves of its rows swapped", lambda w: np.roll(w, O // 2, axis=0)
    for text, order in _rope_orders(key, O, cfg):
        yield text, lambda w, order=order: w[order]  # type: ignore[misc]
    if I % 32 == 0:
        c = np.arange(I)
        for text, order in (
            ("nibbles swapped in each byte", c ^ 1),
            ("nibbles read from the highest of each word", c ^ 7),
            ("bytes of each word reversed", c ^ 6),
            ("nibbles in Q4_0's order, j beside j + 16", c // 32 * 32 + c % 2 * 16 + c % 32 // 2),
            ("Q4_0's nibbles taken as consecutive", c // 32 * 32 + c % 16 * 2 + c % 32 // 16),
        ):
            yield text, lambda w, order=order: w[:, order]  # type: ignore[misc]


def _rope_orders(key: str, O: int, cfg: Config) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of the rotated channels taken from pairs to halves, or back."""
    R = cfg.qk_rope_head_dim
    if key.endswith(("q_b_proj.weight", "q_proj.weight")) and O % cfg.qk_head_dim == 0:
        head = cfg.qk_head_dim
    elif key.endswith("kv_a_proj_with_mqa.weight"):
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
        yield text, order.reshape(-1)


def _misread(a: Matrix, b: Matrix, x: Seen, y: Seen) -> tuple[str, str] | None:
    """The same stored numbers taken for others: zero point, sign, scale, offset."""
    if x.values.shape != y.values.shape:
        return None
    for m, w, v in ((a, x, y), (b, y, x)):
        match m:
            case Int4() | Q4():
                s = quant_verify.signed_steps(m)
                k = np.rint(np.median((v.values - w.values)[s != 0] / s[s != 0])) if s.any() else 0
                if k and Seen(w.values + k * s, w.bound).is_(v):
                    return "zero point", f"codes read with an offset of {8 - k:.0f} instead of 8"
                signed = np.where(w.values * np.sign(s) < 0, 8 * s, -8 * s)
                if Seen(w.values + signed, w.bound).is_(v):
                    text = "codes read as two's complement instead of offset by 8"
                    return "signed nibbles", text
            case Fp8Block(bits, scale, (r, c)):
                O, I = bits.shape
                s = np.repeat(np.repeat(scale, r, axis=0)[:O], c, axis=1)[:, :I].astype(np.float64)
                if Seen(w.values / s, w.bound / s).is_(v):
                    return "no scale", "its codes without their block scales"
                if Seen(w.values / s**2, w.bound / s**2).is_(v):
                    return "inverted scales", "codes divided by weight_scale_inv"
    if x.values.ndim == 1:
        k = float(np.median(y.values - x.values))
        if Seen(x.values + k, x.bound + 2.0**-52 * abs(k)).is_(y):
            return "offset", f"the right one plus {k:.6g}"
    return None


def _others(key: str, ours: Checkpoint) -> Iterator[tuple[str, str]]:
    """Tensors this one may have been confused with."""
    for one, two in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
        if key.endswith(f".{one}.weight"):
            yield "gate and up swapped", key.replace(f".{one}.", f".{two}.")
    expert = re.match(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)(\..*)", key)
    if expert:
        for e in range(ours.cfg.n_routed_experts):
            other = f"{expert[1]}{e}{expert[3]}"
            if e != int(expert[2]) and _stored(ours, other):
                yield "another expert's", other


def _first_row(a: Matrix, b: Matrix) -> bool:
    """Whether the first rows (of FP8, the first block's) could be the same: cheap to look at."""
    first = slice(0, min(128, a.shape[0]) if isinstance(a, Fp8Block) else 1)
    if isinstance(b, Fp8Block):
        first = slice(0, min(b.block[0], b.shape[0]))
    p, q = rows(a, first), rows(b, first)
    return _see(p, q).is_(_see(q, p))
