"""GGUF's K-quants, a row at a time to float32: what dynamic GGUFs of K2 are made of.

256 weights a block, in groups of 16 or 32 with a scale, and a minimum, of few bits each:

    Q2_K  84 bytes   2 bits, d·scale·q - dmin·min, groups of 16
    Q3_K  110        3 bits, d·(scale - 32)·(q - 4)
    Q4_K  144        4 bits, d·scale·q - dmin·min, groups of 32
    Q5_K  176        5 bits, as Q4_K
    Q6_K  210        6 bits, d·scale·(q - 32), groups of 16

Twin: `gguf.quants.dequantize`. Source of the layouts: ggml-org/llama.cpp ggml/src/ggml-common.h and
ggml-quants.c (`dequantize_row_q*_K`). Plain Numba; the halves are looked up in a table of them all.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from refmoe.fast.kernels import kernel

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@kernel
def q2_k(blocks, halves, out, begin, end):  # type: ignore
    """Decode rows `begin` to `end` of Q2_K into out, float32."""
    for o in range(begin, end):
        for n in range(blocks.shape[1] // 84):
            b = blocks[o, 84 * n : 84 * n + 84]
            d = halves[np.int64(b[80]) | np.int64(b[81]) << 8]
            least = halves[np.int64(b[82]) | np.int64(b[83]) << 8]
            for half in range(2):
                for j in range(4):
                    for part in range(2):
                        code = b[8 * half + 2 * j + part]
                        scale, low = d * np.float32(code & 15), least * np.float32(code >> 4)
                        to = 256 * n + 128 * half + 32 * j + 16 * part
                        for i in range(16):
                            q = b[16 + 32 * half + 16 * part + i] >> (2 * j) & 3
                            out[o - begin, to + i] = scale * np.float32(q) - low


@kernel
def q3_k(blocks, halves, out, begin, end):  # type: ignore
    """Decode rows `begin` to `end` of Q3_K into out, float32."""
    for o in range(begin, end):
        for n in range(blocks.shape[1] // 110):
            b = blocks[o, 110 * n : 110 * n + 110]
            d = halves[np.int64(b[108]) | np.int64(b[109]) << 8]
            for g in range(16):
                low = b[96 + g % 8] >> (4 * (g // 8)) & 15
                high = b[104 + g % 4] >> (2 * (g // 4)) & 3
                scale = d * np.float32(np.int64(low | high << 4) - 32)
                half, j, part = g // 8, g % 8 // 2, g % 2
                for i in range(16):
                    q = np.int64(b[32 + 32 * half + 16 * part + i] >> (2 * j) & 3)
                    bit = b[16 * part + i] >> (4 * half + j) & 1
                    to = 256 * n + 128 * half + 32 * j + 16 * part + i
                    out[o - begin, to] = scale * np.float32(q - (0 if bit else 4))


@kernel
def q4_k(blocks, halves, out, begin, end):  # type: ignore
    """Decode rows `begin` to `end` of Q4_K into out, float32."""
    for o in range(begin, end):
        for n in range(blocks.shape[1] // 144):
            b = blocks[o, 144 * n : 144 * n + 144]
            d = halves[np.int64(b[0]) | np.int64(b[1]) << 8]
            least = halves[np.int64(b[2]) | np.int64(b[3]) << 8]
            for g in range(8):
                if g < 4:
                    s, m = b[4 + g] & 63, b[8 + g] & 63
                else:
                    s = b[8 + g] & 15 | b[g] >> 6 << 4
                    m = b[8 + g] >> 4 | b[4 + g] >> 6 << 4
                scale, low = d * np.float32(s), least * np.float32(m)
                to = 256 * n + 32 * g
                for i in range(32):
                    q = b[16 + 32 * (g // 2) + i] >> (4 * (g % 2)) & 15
                    out[o - begin, to + i] = scale * np.float32(q) - low


@kernel
def q5_k(blocks, halves, out, begin, end):  # type: ignore
    """Decode rows `begin` to `end` of Q5_K into out, float32."""
    for o in range(begin, end):
        for n in range(blocks.shape[1] // 176):
            b = blocks[o, 176 * n : 176 * n + 176]
            d = halves[np.int64(b[0]) | np.int64(b[1]) << 8]
            least = halves[np.int64(b[2]) | np.int64(b[3]) << 8]
            for g in range(8):
                if g < 4:
                    s, m = b[4 + g] & 63, b[8 + g] & 63
                else:
                    s = b[8 + g] & 15 | b[g] >> 6 << 4
                    m = b[8 + g] >> 4 | b[4 + g] >> 6 << 4
                scale, low = d * np.float32(s), least * np.float32(m)
                to = 256 * n + 32 * g
                for i in range(32):
                    q = b[48 + 32 * (g // 2) + i] >> (4 * (g % 2)) & 15
                    q |= (b[16 + i] >> g & 1) << 4
                    out[o - begin, to + i] = scale * np.float32(q) - low


@kernel
def q6_k(blocks, halves, out, begin, end):  # type: ignore
    """Decode rows `begin` to `end` of Q6_K into out, float32."""
    for o in range(begin, end):
        for n in range(blocks.shape[1] // 210):
            b = blocks[o, 210 * n : 210 * n + 210]
            d = halves[np.int64(b[208]) | np.int64(b[209]) << 8]
            for half in range(2):
                for j in range(4):
                    for part in range(2):
                        code = np.int64(b[192 + 8 * half + 2 * j + part])
                        scale = d * np.float32(code - 256 if code > 127 else code)
                        to = 256 * n + 128 * half + 32 * j + 16 * part
                        for i in range(16):
                            at = 64 * half + 32 * (j % 2) + 16 * part + i
                            low = b[at] >> (4 * (j // 2)) & 15
                            high = b[128 + 32 * half + 16 * part + i] >> (2 * j) & 3
                            q = np.int64(low | high << 4) - 32
                            out[o - begin, to + i] = scale * np.float32(q)


DECODERS: dict[str, Callable[..., Any]] = {
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}
