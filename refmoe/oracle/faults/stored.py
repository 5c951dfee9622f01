"""Faults of stored formats."""

from collections.abc import Callable
from typing import Any

import numpy as np

from refmoe.model.formats.fp8_block import E4M3, Fp8Block
from refmoe.model.formats.int4 import Int4
from refmoe.model.matrix import dequantize, widen_bf16
from refmoe.oracle.faults.base import (
    EXPERT,
    LINEAR,
    ROUTED,
    Alter,
    changed,
    has_fp8,
    has_int4,
    stored,
)

# ------------------------------------------------------------------ stored formats


def nibbles(change: Callable[[np.ndarray], np.ndarray]) -> Alter:
    """The bytes of INT4 weights, two nibbles each, read otherwise."""

    def decode(m: Int4) -> Int4:
        two = np.ascontiguousarray(m.packed).view(np.uint8)
        return Int4(np.ascontiguousarray(change(two)).view(np.int32), m.scale)

    return stored(Int4, decode)


def scales(form: type[Int4] | type[Fp8Block], change: Callable[[Any], np.ndarray]) -> Alter:
    return stored(form, lambda m: m._replace(scale=change(m)))


def swap_nibbles(two: np.ndarray) -> np.ndarray:
    return (two << 4) | (two >> 4)


def zero_point_7(m: Int4) -> np.ndarray:
    """(nibble - 7)·scale is the healthy weight and one more scale."""
    w = dequantize(m, np.float64)
    s = widen_bf16(m.scale).astype(np.float64)
    return w + np.repeat(s, w.shape[1] // s.shape[1], axis=1)


def scale_as_fp8(m: Int4) -> np.ndarray:
    """The nearest e4m3, as bits of bf16, which holds it exactly."""
    s = widen_bf16(m.scale)
    positive = E4M3[:127]
    near = positive[np.searchsorted((positive[1:] + positive[:-1]) / 2, np.abs(s))]
    return (np.copysign(near, s).view(np.uint32) >> 16).astype(np.uint16)


def read_across(scale: np.ndarray) -> np.ndarray:
    """Columns first instead of rows first."""
    return scale.reshape(scale.shape[::-1]).T


def partial_block_of_the_one_before(m: Fp8Block) -> np.ndarray:
    scale = m.scale.copy()
    for axis in (0, 1):
        if m.bits.shape[axis] % m.block[axis] and scale.shape[axis] > 1:
            ends = np.moveaxis(scale, axis, 0)
            ends[-1] = ends[-2]
    return scale


STORED = (
    changed(
        "int4-swapped",
        "INT4: the two nibbles of each byte are swapped",
        "ggml-org/llama.cpp#17083 ggml-org/llama.cpp#17064",
        (*EXPERT, ROUTED),
        nibbles(swap_nibbles),
        where=has_int4,
    ),
    changed(
        "int4-reversed",
        "INT4: the eight nibbles of each word are read from the highest",
        "ggml-org/llama.cpp#17083",
        (*EXPERT, ROUTED),
        nibbles(
            lambda two: swap_nibbles(two.reshape(len(two), -1, 4)[..., ::-1]).reshape(two.shape)
        ),
        where=has_int4,
    ),
    changed(
        "int4-signed",
        "INT4: nibbles are read as two's complement, not with an offset of 8",
        "",
        (*EXPERT, ROUTED),
        nibbles(lambda two: two ^ 0x88),
        where=has_int4,
    ),
    changed(
        "int4-zero-7",
        "INT4: 7 instead of 8 is taken from each nibble",
        "ggml-org/llama.cpp#17083",
        (*EXPERT, ROUTED),
        stored(Int4, zero_point_7),
        where=has_int4,
    ),
    changed(
        "int4-scale-neighbour",
        "INT4: each group has the scale of the group before it",
        "vllm-project/vllm#41161 vllm-project/vllm#13769",
        (*EXPERT, ROUTED),
        scales(Int4, lambda m: np.roll(m.scale, 1, axis=1)),
        where=has_int4,
    ),
    changed(
        "int4-scale-across",
        "INT4: the scales are read columns first",
        "vllm-project/vllm#13769",
        (*EXPERT, ROUTED),
        scales(Int4, lambda m: read_across(m.scale)),
        where=has_int4,
    ),
    changed(
        "int4-scale-fp8",
        "INT4: scales are rounded to e4m3",
        "",
        (*EXPERT, ROUTED),
        scales(Int4, scale_as_fp8),
        where=has_int4,
    ),
    changed(
        "int4-scale-ignored",
        "INT4: the scales are not applied",
        "",
        (*EXPERT, ROUTED),
        scales(Int4, lambda m: np.full_like(m.scale, 0x3F80)),
        where=has_int4,
    ),
    changed(
        "fp8-scale-divides",
        "FP8: weights are divided by weight_scale_inv, which multiplies",
        "",
        LINEAR,
        scales(Fp8Block, lambda m: 1 / m.scale),
        where=has_fp8,
    ),
    changed(
        "fp8-scale-across",
        "FP8: the scales of the blocks are read columns first",
        "",
        LINEAR,
        scales(Fp8Block, lambda m: read_across(m.scale)),
        where=has_fp8,
    ),
    changed(
        "fp8-partial-block",
        "FP8: a partial last block has the scale of the block before it",
        "modelscope/ms-swift#6851 huggingface/transformers#36026",
        LINEAR,
        scales(Fp8Block, partial_block_of_the_one_before),
        where=has_fp8,
    ),
    changed(
        "fp8-scale-ignored",
        "FP8: the scales are not applied",
        "deepseek-ai/DeepSeek-V3@8f1c948",
        LINEAR,
        scales(Fp8Block, lambda m: np.ones_like(m.scale)),
        where=has_fp8,
    ),
    changed(
        "fp8-fnuz",
        "FP8: e4m3fn is read as e4m3fnuz, half of it",
        "sgl-project/sglang#2667",
        LINEAR,
        scales(Fp8Block, lambda m: m.scale / 2),
        where=has_fp8,
    ),
)
