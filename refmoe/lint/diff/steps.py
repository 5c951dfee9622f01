"""Measure how far apart two matrices are, in steps of their formats."""

from collections.abc import Callable

import numpy as np

from refmoe.lint.diff import verify as quant_verify
from refmoe.lint.matrices import KV_HALVES, _wide
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.coded import Coded
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.heads import Heads
from refmoe.model.formats.int4 import Int4
from refmoe.model.formats.q4_0 import Q4
from refmoe.model.formats.q8_0 import Q8
from refmoe.model.formats.tiled import Tiled
from refmoe.model.matrix import Matrix, widen_bf16
from refmoe.weights.checkpoint import (
    Checkpoint,
)
from refmoe.weights.gguf import Gguf


def _stored(checkpoint: Checkpoint, key: str) -> list[str]:
    names = [key + part for part in ("", "_packed", "_scale", "_scale_inv")]
    if isinstance(checkpoint, Gguf) and key.endswith(".kv_b_proj.weight"):
        names += [key.replace(".kv_b_proj.weight", half) for half in KV_HALVES]
    return [name for name in names if name in checkpoint.tensors]


def _is_float(m: Matrix) -> bool:
    return not isinstance(m, np.ndarray) or np.issubdtype(m.dtype, np.floating)


def _one_grid(a: Matrix, b: Matrix) -> bool:
    """Whether both have codes of one kind, so that only scales may have been rounded."""
    return type(a) is type(b) or (isinstance(a, Int4 | Q4) and isinstance(b, Int4 | Q4))


def _by_half(
    m: Heads, other: Matrix, of: Callable[[Matrix, Matrix], np.ndarray | float]
) -> np.ndarray:
    """What `of` says of each number, whose two halves are stored apart."""
    others = (other.k_b, other.v_b) if isinstance(other, Heads) else (other, other)
    pairs = zip((m.k_b, m.v_b), others, strict=True)
    halves = [np.broadcast_to(of(half, its), half.shape) for half, its in pairs]
    return _wide(Heads(halves[0], halves[1], m.heads))


PRECISION = {"float16": (11, -14), "float32": (24, -126), "float64": (53, -1022)}


def _fine(m: Matrix, w: np.ndarray, other: Matrix) -> np.ndarray | float:
    """Half a step of the plain type; where both are quantised alike, of their scales."""
    if isinstance(m, Heads):
        return _by_half(m, other, lambda half, its: _fine(half, _wide(half), its))
    if isinstance(m, Int4 | Fp8Block | Q8 | Q4 | Coded | Tiled):
        unit = {Int4: 2.0**-8, Fp8Block: 2.0**-24}.get(type(m), 2.0**-11)
        return unit * np.abs(w) if _one_grid(m, other) else 0.0
    if isinstance(m, BF16):
        digits, least = 8, -126
    else:
        assert isinstance(m, np.ndarray)
        digits, least = PRECISION[m.dtype.name]
    exponent = np.where(w == 0, least, np.frexp(w)[1] - 1)
    return np.ldexp(1.0, np.maximum(exponent, least) - digits)


def _coarse(m: Matrix, other: Matrix) -> np.ndarray | float:
    """Half a quantisation step [O, I], as far as a weight may be from its code.

    Two tensors quantised alike have no such excuse: codes that differ are other weights.
    """
    match m:
        case Heads():
            return _by_half(m, other, _coarse)
        case _ if _one_grid(m, other):
            return 0.0
        case Int4(_, scale):
            s = np.abs(widen_bf16(scale).astype(np.float64))
            return np.repeat(s * (0.5 + 8 / 256), 32, axis=1)
        case Q4() | Q8():
            return quant_verify.half_step(m, _wide(m))
        case Fp8Block(bits, scale, (r, c)):
            exponent = np.maximum((np.arange(256) & 0x7F) >> 3, 1)
            half = np.ldexp(1.0, exponent - 11)  # 3 bits of fraction, bias 7
            O, I = bits.shape
            s = np.repeat(np.repeat(np.abs(scale), r, axis=0)[:O], c, axis=1)[:, :I]
            return half[bits] * s * (1 + 1e-6)
        case _:
            return 0.0
