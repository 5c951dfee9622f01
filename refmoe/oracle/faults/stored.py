"""Faults of stored formats: how INT4 and FP8 weights are decoded."""

from collections.abc import Callable
from typing import Any

import numpy as np

from refmoe.model.formats.fp8_block import E4M3, Fp8Block
from refmoe.model.formats.int4 import Int4
from refmoe.model.matrix import dequantize, widen_bf16
from refmoe.oracle.faults.base import EXPERT, LINEAR, ROUTED, Alter, Family, changed
from refmoe.oracle.faults.common import WITH_FP8, WITH_INT4, stored

# --- what several of these faults use


def with_nibbles(change: Callable[[np.ndarray], np.ndarray]) -> Alter:
    """Read the bytes of INT4 weights, two nibbles each, as change(bytes)."""

    def decode(m: Int4) -> Int4:
        two = np.ascontiguousarray(m.packed).view(np.uint8)
        return Int4(np.ascontiguousarray(change(two)).view(np.int32), m.scale)

    return stored(Int4, decode)


def with_scales(form: type[Int4] | type[Fp8Block], change: Callable[[Any], np.ndarray]) -> Alter:
    """Give every matrix m of one format the scales change(m)."""
    return stored(form, lambda m: m._replace(scale=change(m)))


def swap_nibbles(two: np.ndarray) -> np.ndarray:
    """Swap the two nibbles of each byte."""
    return (two << 4) | (two >> 4)


def read_columns_first(scale: np.ndarray) -> np.ndarray:
    """Return the numbers of a matrix, read columns first instead of rows first."""
    return scale.reshape(scale.shape[::-1]).T


STORED = Family("stored formats")

STORED += changed(
    "int4-swapped",
    "INT4: the two nibbles of each byte are swapped",
    "ggml-org/llama.cpp#17083 ggml-org/llama.cpp#17064",
    (*EXPERT, ROUTED),
    with_nibbles(swap_nibbles),
    where=WITH_INT4,
)

STORED += changed(
    "int4-reversed",
    "INT4: the eight nibbles of each word are read from the highest",
    "ggml-org/llama.cpp#17083",
    (*EXPERT, ROUTED),
    with_nibbles(
        lambda two: swap_nibbles(two.reshape(len(two), -1, 4)[..., ::-1]).reshape(two.shape)
    ),
    where=WITH_INT4,
)

STORED += changed(
    "int4-signed",
    "INT4: nibbles are read as two's complement, not with an offset of 8",
    "",
    (*EXPERT, ROUTED),
    with_nibbles(lambda two: two ^ 0x88),
    where=WITH_INT4,
)


def decode_with_zero_point_7(m: Int4) -> np.ndarray:
    """Decode INT4 as (nibble - 7)·scale: the healthy weight and one more scale."""
    w = dequantize(m, np.float64)
    s = widen_bf16(m.scale).astype(np.float64)
    return w + np.repeat(s, w.shape[1] // s.shape[1], axis=1)


STORED += changed(
    "int4-zero-7",
    "INT4: 7 instead of 8 is taken from each nibble",
    "ggml-org/llama.cpp#17083",
    (*EXPERT, ROUTED),
    stored(Int4, decode_with_zero_point_7),
    where=WITH_INT4,
)

STORED += changed(
    "int4-scale-neighbour",
    "INT4: each group has the scale of the group before it",
    "vllm-project/vllm#41161 vllm-project/vllm#13769",
    (*EXPERT, ROUTED),
    with_scales(Int4, lambda m: np.roll(m.scale, 1, axis=1)),
    where=WITH_INT4,
)

STORED += changed(
    "int4-scale-across",
    "INT4: the scales are read columns first",
    "vllm-project/vllm#13769",
    (*EXPERT, ROUTED),
    with_scales(Int4, lambda m: read_columns_first(m.scale)),
    where=WITH_INT4,
)


def round_scale_to_e4m3(m: Int4) -> np.ndarray:
    """Return the scales rounded to e4m3, as bits of bf16, which holds them exactly."""
    s = widen_bf16(m.scale)
    positive = E4M3[:127]
    near = positive[np.searchsorted((positive[1:] + positive[:-1]) / 2, np.abs(s))]
    return (np.copysign(near, s).view(np.uint32) >> 16).astype(np.uint16)


STORED += changed(
    "int4-scale-fp8",
    "INT4: scales are rounded to e4m3",
    "",
    (*EXPERT, ROUTED),
    with_scales(Int4, round_scale_to_e4m3),
    where=WITH_INT4,
)

STORED += changed(
    "int4-scale-ignored",
    "INT4: the scales are not applied",
    "",
    (*EXPERT, ROUTED),
    with_scales(Int4, lambda m: np.full_like(m.scale, 0x3F80)),
    where=WITH_INT4,
)

STORED += changed(
    "fp8-scale-divides",
    "FP8: weights are divided by weight_scale_inv, which multiplies",
    "",
    LINEAR,
    with_scales(Fp8Block, lambda m: 1 / m.scale),
    where=WITH_FP8,
)

STORED += changed(
    "fp8-scale-across",
    "FP8: the scales of the blocks are read columns first",
    "",
    LINEAR,
    with_scales(Fp8Block, lambda m: read_columns_first(m.scale)),
    where=WITH_FP8,
)


def scale_partial_block_as_previous(m: Fp8Block) -> np.ndarray:
    """Return the scales, a partial last block with that of the block before it."""
    scale = m.scale.copy()
    for axis in (0, 1):
        if m.bits.shape[axis] % m.block[axis] and scale.shape[axis] > 1:
            ends = np.moveaxis(scale, axis, 0)
            ends[-1] = ends[-2]
    return scale


STORED += changed(
    "fp8-partial-block",
    "FP8: a partial last block has the scale of the block before it",
    "modelscope/ms-swift#6851 huggingface/transformers#36026",
    LINEAR,
    with_scales(Fp8Block, scale_partial_block_as_previous),
    where=WITH_FP8,
)

STORED += changed(
    "fp8-scale-ignored",
    "FP8: the scales are not applied",
    "deepseek-ai/DeepSeek-V3@8f1c948",
    LINEAR,
    with_scales(Fp8Block, lambda m: np.ones_like(m.scale)),
    where=WITH_FP8,
)

STORED += changed(
    "fp8-fnuz",
    "FP8: e4m3fn is read as e4m3fnuz, half of it",
    "sgl-project/sglang#2667",
    LINEAR,
    with_scales(Fp8Block, lambda m: m.scale / 2),
    where=WITH_FP8,
)
