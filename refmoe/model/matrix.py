"""Matrices as stored, and the one line that says what multiplying by them means.

    y = x Wᵀ              x [T, I], W [O, I] → y [T, O]

    BF16      the upper half of a float32                                bits   [O, I]    uint16
    Int4      W[o, i] = (nibble[o, i] - 8) · scale[o, i // 32]           packed [O, I/8]  int32
                                                                         scale  [O, I/32] bf16
    Fp8Block  W[o, i] = e4m3[o, i] · scale[o // 128, i // 128]           bits   [O, I]    uint8
                                                                         scale  float32
    Q8        W[o, i] = code[o, i] · scale[o, i // 32]                   blocks [O, I/32, 34] uint8
    Q4        W[o, i] = (nibble[o, i] - 8) · scale[o, i // 32]           blocks [O, I/32, 18] uint8
    Coded     what a function decodes                                    blocks [O, ·]      uint8
    Tiled     any of these, a few rows at a time
    Heads     kv_b_proj in two halves, the keys' transposed by head
    array     float16, float32, float64: itself                                 [O, I]

Int4 is compressed-tensors' `pack-quantized` (vllm-project/compressed-tensors,
compressors/pack_quantized): nibble i % 8 of word i // 8, lowest first, offset binary. A 4-bit
integer times a bf16 scale has at most 11 significant bits, so it is exact in float32. What other
engines do with the product is `Conventions.rounded_products`. Fp8Block is DeepSeek-V3's
(deepseek-ai/DeepSeek-V3, inference/kernel.py): e4m3 "fn", no infinity, NaN at ±0x7f; the scale,
called `weight_scale_inv`, multiplies; last blocks may be partial. Its product has up to 28
significant bits: exact in float64, rounded once in float32. Q8 is GGUF's Q8_0 (ggml-org/llama.cpp
ggml-common.h, `block_q8_0`): a float16 scale, then 32 int8; exact in float32. Q4 is its Q4_0: a
float16 scale, then 16 bytes, byte j with nibble j low and nibble j + 16 high; exact in float32.
"""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

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


class Fp8Block(NamedTuple):
    bits: np.ndarray  # [O, I] uint8: e4m3fn
    scale: np.ndarray  # [⌈O/rows⌉, ⌈I/columns⌉] float32, `weight_scale_inv`
    block: tuple[int, int]  # rows, columns; (128, 128) in every published checkpoint

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.scale.nbytes


class Q8(NamedTuple):
    blocks: np.ndarray  # [O, I/32, 34] uint8: float16 scale, 32 int8

    @property
    def shape(self) -> tuple[int, ...]:
        return self.blocks.shape[0], self.blocks.shape[1] * 32

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


class Q4(NamedTuple):
    blocks: np.ndarray  # [O, I/32, 18] uint8: float16 scale, 32 nibbles

    @property
    def shape(self) -> tuple[int, ...]:
        return self.blocks.shape[0], self.blocks.shape[1] * 32

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


class Coded(NamedTuple):
    """A format that somebody else decodes, a row at a time."""

    blocks: np.ndarray  # [O, bytes of a row] uint8
    columns: int
    decode: Callable[[np.ndarray], np.ndarray]  # blocks → float32 [O, columns]
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.blocks.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


class Heads(NamedTuple):
    """kv_b_proj as GGUF has it: W[h·(N+V) + n, c] = k_b[h·C + c, n], then the rows of v_b."""

    k_b: Any  # Matrix [H·C, N]
    v_b: Any  # Matrix [H·V, C]
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.heads * self.k_b.shape[1] + self.v_b.shape[0], self.v_b.shape[1]

    @property
    def nbytes(self) -> int:
        return self.k_b.nbytes + self.v_b.nbytes


class Tiled(NamedTuple):
    """A matrix that comes in tiles of whole rows, each valid until the next."""

    shape: tuple[int, ...]
    nbytes: int  # of all tiles
    tiles: Callable[[], Iterator[tuple[slice, Any]]]  # rows, Matrix


Matrix: TypeAlias = np.ndarray | BF16 | Int4 | Fp8Block | Q8 | Q4 | Coded | Heads | Tiled


def _e4m3() -> np.ndarray:
    """The 256 values of e4m3fn: sign, 4 bits of exponent (bias 7), 3 of fraction."""
    code = np.arange(128)
    exponent, fraction = code >> 3, code & 7
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    positive = np.where(exponent == 0, np.ldexp(fraction / 8, -6), normal)
    positive[127] = np.nan
    return np.concatenate((positive, -positive)).astype(np.float32)


E4M3 = _e4m3()


def array_module(x: Any) -> ModuleType:
    """NumPy for NumPy's arrays, CuPy for CuPy's, without importing either."""
    return sys.modules[type(x).__module__.partition(".")[0]]


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) → float32, exact."""
    out = array_module(bits).zeros((*bits.shape, 2), np.uint16)
    out[..., 1] = bits  # a bf16 is the upper half of a float32, second in memory
    return out.view(np.float32)[..., 0]


def round_bf16(x: np.ndarray) -> np.ndarray:
    """float32 → the nearest bf16, ties to even, as float32; NaN and infinity stay."""
    xp = array_module(x)
    bits = xp.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return xp.where(xp.isfinite(x), rounded.view(np.float32), x).astype(np.float32)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 → the bits of the nearest bf16 (uint16)."""
    return (round_bf16(x).view(np.uint32) >> 16).astype(np.uint16)


def dequantize(m: Matrix, dtype: Any = np.float32, rounded: tuple[str, ...] = ()) -> np.ndarray:
    """[O, I] in `dtype`: the values the stored bytes stand for.

    `rounded`: formats ("int4", "fp8") whose product is rounded to bf16, as some engines do.
    """
    match m:
        case BF16(bits):
            w = widen_bf16(bits)
        case Int4(packed, scale):
            O, G = scale.shape
            xp = array_module(packed)
            two = xp.ascontiguousarray(packed).view(np.uint8)  # [O, I/2] two nibbles a byte
            q = xp.stack((two & 15, two >> 4), axis=-1).reshape(O, G, -1).astype(np.float32) - 8
            w = (q * widen_bf16(scale)[..., None]).reshape(O, -1)  # [O, I]
            w = round_bf16(w) if "int4" in rounded else w
        case Fp8Block(bits, scale, (rows, columns)):
            O, I = bits.shape
            xp = array_module(bits)
            s = xp.repeat(xp.repeat(scale, rows, axis=0)[:O], columns, axis=1)[:, :I]  # [O, I]
            if "fp8" in rounded:
                w = round_bf16(xp.asarray(E4M3)[bits] * s)
            else:
                w = xp.asarray(E4M3.astype(dtype))[bits] * s.astype(dtype)
        case Q8(blocks):
            xp = array_module(blocks)
            scales = xp.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
            codes = xp.ascontiguousarray(blocks[..., 2:]).view(np.int8)
            w = (codes * scales).reshape(m.shape)  # [O, I]
        case Q4(blocks):
            xp = array_module(blocks)
            scales = xp.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
            two = blocks[..., 2:]
            q = xp.concatenate((two & 15, two >> 4), axis=-1).astype(np.float32) - 8
            w = (q * scales).reshape(m.shape)  # [O, I]
        case Coded(blocks, _, decode):
            w = decode(np.ascontiguousarray(blocks))
        case Tiled(shape, _, each):
            w = np.empty(shape, dtype)
            for block, tile in each():
                w[block] = dequantize(tile, dtype, rounded)
        case Heads(k_b, v_b, H):
            keys, values = (dequantize(half, dtype, rounded) for half in (k_b, v_b))
            keys = keys.reshape(H, -1, keys.shape[1]).transpose(0, 2, 1)  # [H, N, C]
            w = array_module(keys).concatenate(
                (keys, values.reshape(H, -1, values.shape[1])), axis=1
            )
            w = w.reshape(m.shape)  # [H(N+V), C]
        case _:
            w = m
    return w.astype(dtype, copy=False)


def quantize_q8(w: np.ndarray) -> Q8:
    """float32 [O, I] → Q8: scale = max|w| / 127 of each 32, codes to the nearest.

    The codes are of the scale before it is rounded to float16, as in ggml's own quantiser
    (ggml-org/llama.cpp ggml-quants.c, `quantize_row_q8_0_ref`).
    """
    groups = w.reshape(len(w), -1, 32)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    per = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    blocks = np.empty((*groups.shape[:2], 34), np.uint8)
    blocks[..., :2] = scale.astype(np.float16).view(np.uint8)
    blocks[..., 2:] = np.rint(groups * per).astype(np.int8).view(np.uint8)
    return Q8(blocks)


def linear(x: np.ndarray, m: Matrix, rounded: tuple[str, ...] = ()) -> np.ndarray:
    """y = x Wᵀ: x [T, I] → [T, O]. This line is the definition; fast/ may only be quicker."""
    return x @ dequantize(m, x.dtype, rounded).T


def rows(m: Matrix, index: np.ndarray | slice) -> Matrix:
    """Some rows of a matrix, still as stored; of an Fp8Block only a slice of whole blocks."""
    match m:
        case BF16(bits):
            return BF16(bits[index])
        case Int4(packed, scale):
            return Int4(packed[index], scale[index])
        case Q8():
            return Q8(m.blocks[index])
        case Q4():
            return Q4(m.blocks[index])
        case Coded():
            return m._replace(blocks=m.blocks[index])
        case Heads() | Tiled():
            return dequantize(m)[index]
        case Fp8Block(bits, scale, block):
            if not isinstance(index, slice) or index.start % block[0]:
                raise ValueError(f"rows {index} of an Fp8Block do not begin at a block")
            blocks = slice(index.start // block[0], -(-index.stop // block[0]))
            return Fp8Block(bits[index], scale[blocks], block)
        case _:
            return m[index]


def tiles(m: Matrix, elements: int) -> Iterator[tuple[slice, Matrix]]:
    """The matrix in tiles of whole rows, or blocks of rows, of about so many elements, in order."""
    if isinstance(m, Tiled):
        yield from m.tiles()
        return
    m = dequantize(m) if isinstance(m, Heads) else m  # its rows are columns
    unit = m.block[0] if isinstance(m, Fp8Block) else 1
    step = max(1, elements // (m.shape[1] * unit)) * unit
    for start in range(0, m.shape[0], step):
        tile = slice(start, min(start + step, m.shape[0]))
        yield tile, rows(m, tile)
