"""Matrices as stored, and the one line that says what multiplying by them means.

    y = x Wᵀ              x [T, I], W [O, I] → y [T, O]

    BF16   the upper half of a float32                                   bits   [O, I]    uint16
    Int4   W[o, i] = (nibble[o, i] - 8) · scale[o, i // 32]              packed [O, I/8]  int32
                                                                         scale  [O, I/32] bf16
    array  float16, float32, float64: itself                                    [O, I]

Int4 is compressed-tensors' `pack-quantized` (vllm-project/compressed-tensors,
compressors/pack_quantized): nibble i % 8 of word i // 8, lowest first, offset binary. A 4-bit
integer times a bf16 scale has at most 11 significant bits, so `dequantize` is exact in float32.
What other engines do with the product is `Conventions.int4_product`.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np


class BF16(NamedTuple):
    bits: np.ndarray  # [O, I] or [I] uint16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes


class Int4(NamedTuple):
    packed: np.ndarray  # [O, I/8] int32, `weight_packed`
    scale: np.ndarray  # [O, I/32] uint16: the bits of bf16, `weight_scale`

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape[0], self.packed.shape[1] * 8

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes


Matrix: TypeAlias = np.ndarray | BF16 | Int4


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) → float32, exact."""
    out = np.zeros((*bits.shape, 2), np.uint16)
    out[..., 1] = bits  # a bf16 is the upper half of a float32, second in memory
    return out.view(np.float32)[..., 0]


def round_bf16(x: np.ndarray) -> np.ndarray:
    """float32 → the nearest bf16, ties to even, as float32; NaN and infinity stay."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(x), rounded.view(np.float32), x).astype(np.float32)


def dequantize(m: Matrix, product: str = "exact") -> np.ndarray:
    """[O, I] in float32 (arrays: in their own dtype): the values the stored bytes stand for."""
    match m:
        case BF16(bits):
            return widen_bf16(bits)
        case Int4(packed, scale):
            O, G = scale.shape
            two = np.ascontiguousarray(packed).view(np.uint8)  # [O, I/2] two nibbles a byte
            q = np.stack((two & 15, two >> 4), axis=-1).reshape(O, G, -1).astype(np.float32) - 8
            w = (q * widen_bf16(scale)[..., None]).reshape(O, -1)  # [O, I]
            return round_bf16(w) if product == "bfloat16" else w
        case _:
            return m


def linear(x: np.ndarray, m: Matrix, product: str = "exact") -> np.ndarray:
    """y = x Wᵀ: x [T, I] → [T, O]. This line is the definition; fast/ may only be quicker."""
    return x @ dequantize(m, product).astype(x.dtype, copy=False).T


def rows(m: Matrix, index: np.ndarray | slice) -> Matrix:
    """Some rows of a matrix, still as stored."""
    match m:
        case BF16(bits):
            return BF16(bits[index])
        case Int4(packed, scale):
            return Int4(packed[index], scale[index])
        case _:
            return m[index]


def tiles(m: Matrix, elements: int) -> Iterator[tuple[slice, Matrix]]:
    """The matrix in blocks of whole rows of about so many elements, in order."""
    step = max(1, elements // m.shape[1])
    for start in range(0, m.shape[0], step):
        block = slice(start, min(start + step, m.shape[0]))
        yield block, rows(m, block)
