"""What a matrix is, and the one line that says what multiplying by it means.

    y = x Wᵀ              x [T, I], W [O, I] → y [T, O]

A matrix is an array of floats, or is stored in one of the formats of model/formats/: BF16, Int4,
Fp8Block, Q8, Q4, Coded. Two more put matrices together: Heads, the two halves of a kv_b_proj, and
Tiled, a matrix that is read a few rows at a time. Whoever handles all formats asks the matrix:
`format` is its name, `arrays()` what is stored, `dequantize` what it means.
"""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from refmoe.model.formats.base import StoredMatrix

Matrix: TypeAlias = np.ndarray | StoredMatrix


def linear(x: np.ndarray, m: Matrix, rounded: tuple[str, ...] = ()) -> np.ndarray:
    """y = x Wᵀ: x [T, I] → [T, O]. This line is the definition; fast/ may only be quicker."""
    return x @ dequantize(m, x.dtype, rounded).T


def dequantize(m: Matrix, dtype: Any = np.float32, rounded: tuple[str, ...] = ()) -> np.ndarray:
    """Return the values that the stored bytes stand for: [O, I] in `dtype`.

    `rounded` names formats ("int4", "fp8") whose product of code and scale is rounded to bf16, as
    some engines do (`Conventions.rounded_products`).
    """
    w = m.dequantize(dtype, rounded) if hasattr(m, "dequantize") else m
    return w.astype(dtype, copy=False)


def rows(m: Matrix, index: np.ndarray | slice) -> Matrix:
    """Return some rows of a matrix. Of an Fp8Block they have to be a slice of whole blocks."""
    return m.rows(index) if hasattr(m, "rows") else m[index]


def tiles(m: Matrix, elements: int) -> Iterator[tuple[slice, Matrix]]:
    """Yield (rows, matrix): the matrix in order, in tiles of about so many elements."""
    if (own := getattr(m, "tiles", None)) is not None:
        yield from own()
        return
    unit = m.unit if hasattr(m, "unit") else 1
    if not unit:
        m, unit = dequantize(m), 1
    step = max(1, elements // (m.shape[1] * unit)) * unit
    for start in range(0, m.shape[0], step):
        tile = slice(start, min(start + step, m.shape[0]))
        yield tile, rows(m, tile)


def format_of(m: Matrix) -> str:
    """Return the name of a matrix's format: "int4", "bf16", "f32", …"""
    return m.format if hasattr(m, "format") else f"{m.dtype.kind}{8 * m.dtype.itemsize}"


def array_module(x: Any) -> ModuleType:
    """Return NumPy for NumPy's arrays and CuPy for CuPy's, without importing either."""
    return sys.modules[type(x).__module__.partition(".")[0]]


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """Widen bf16 bits (uint16) to float32, exactly."""
    out = array_module(bits).zeros((*bits.shape, 2), np.uint16)
    out[..., 1] = bits  # a bf16 is the upper half of a float32, second in memory
    return out.view(np.float32)[..., 0]


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bf16, ties to even, as float32; NaN and infinity stay."""
    xp = array_module(x)
    bits = xp.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return xp.where(xp.isfinite(x), rounded.view(np.float32), x).astype(np.float32)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Return the bits (uint16) of the bf16 nearest to float32."""
    return (round_bf16(x).view(np.uint32) >> 16).astype(np.uint16)
