"""Read the blocks of a GGUF's quantised tensors."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from refmoe.lint.base import TILE, Place
from refmoe.lint.facts.int4 import count_codes, histogram
from refmoe.model.matrix import dequantize, round_bf16, tiles
from refmoe.weights.gguf import Gguf, block_of

HALVES = {  # where a block's float16 are, the scale first (ggml-org/llama.cpp ggml-common.h)
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


@dataclass(frozen=True)
class Undecodable:
    """A tensor of a type that nothing here decodes."""

    places: ClassVar[tuple[Place, ...]] = ("gguf",)
    tensor: str
    problem: str


@dataclass(frozen=True)
class BlockNumbers:
    """The scales in the blocks of one tensor; the values of types whose scales lie elsewhere."""

    unit: str  # scales, or values
    count: int
    nonfinite: int
    zeros: int


@dataclass(frozen=True)
class CodedBlocks:
    """The codes of one tensor in Q4_0 or Q8_0 beside the scales of their blocks of 32."""

    places: ClassVar[tuple[Place, ...]] = ("gguf",)
    tensor: str
    dtype: str
    blocks: int
    unwritten: int  # Q4_0: blocks of nothing but zero bytes; such codes mean -8 · 0
    lost: int  # blocks with codes other than 0 and a scale of 0
    lowest: int  # Q4_0: blocks with every code -8 and a scale
    negative: int  # scales below 0
    inexact: int  # Q4_0: scales that are no bf16
    bytes: np.ndarray  # Q4_0: how often each byte occurs, two codes each


@dataclass
class Q4Kind:
    """The codes and scales of Q4_0 in one kind of matrix, over all layers and experts."""

    places: ClassVar[tuple[Place, ...]] = ("gguf",)
    kind: str
    tensors: int = 0
    scales: int = 0
    negative: int = 0
    inexact: int = 0
    bytes: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))

    def add(self, m: CodedBlocks) -> None:
        """Count one more tensor of this kind."""
        self.tensors += 1
        self.scales += m.blocks
        self.negative += m.negative
        self.inexact += m.inexact
        self.bytes += m.bytes

    @property
    def codes(self) -> np.ndarray:
        """How often each code is used, from -8 to 7."""
        return count_codes(self.bytes)


@dataclass(frozen=True)
class Types:
    """How many tensors are of each type, experts counted one by one."""

    places: ClassVar[tuple[Place, ...]] = ("gguf",)
    counts: list[tuple[str, int]]  # most frequent first


def read_blocks(name: str, checkpoint: Gguf) -> tuple[BlockNumbers, CodedBlocks | None]:
    """Read the scales of a quantised tensor, and its codes if they are Q4_0's or Q8_0's.

    Raises `InputError` for a type that nothing here decodes.
    """
    t = checkpoint.tensors[name]
    places = HALVES.get(t.dtype)
    if places is None:
        m = checkpoint.matrix(name.removesuffix(".weight"))
        bad = sum(int((~np.isfinite(dequantize(tile))).sum()) for _, tile in tiles(m, TILE))
        return BlockNumbers("values", m.shape[0] * m.shape[1], bad, 0), None
    blocks = checkpoint.array(name).reshape(-1, block_of(t)[1])
    halves = [np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0] for at in places]
    bad = sum(int((~np.isfinite(half)).sum()) for half in halves)
    count = sum(half.size for half in halves)
    zeros = count - sum(int(np.count_nonzero(half)) for half in halves)
    numbers = BlockNumbers("scales", count, bad, zeros)
    if zeros == count or t.dtype not in ("Q4_0", "Q8_0"):
        return numbers, None
    return numbers, _read_codes(name, t.dtype, blocks[:, 2:], halves[0])


def _read_codes(name: str, dtype: str, codes: np.ndarray, d: np.ndarray) -> CodedBlocks:
    """Count codes [n, 16] of Q4_0, two nibbles a byte, or [n, 32] of Q8_0; scales d [n]."""
    zero = d == 0
    lost = (codes[zero] != (0x88 if dtype == "Q4_0" else 0)).any(axis=1)  # the code of 0
    negative, counts = int((d < 0).sum()), np.zeros(256, np.int64)
    if dtype == "Q8_0":
        return CodedBlocks(name, dtype, len(d), 0, int(lost.sum()), 0, negative, 0, counts)
    empty = np.logical_not(codes.any(axis=1))
    for i in range(0, len(codes), TILE // 16):
        counts += histogram(codes[i : i + TILE // 16])
    wide = d[np.isfinite(d)].astype(np.float32)
    return CodedBlocks(
        name,
        dtype,
        len(d),
        unwritten=int(empty[zero].sum()),
        lost=int((lost & ~empty[zero]).sum()),
        lowest=int(empty[~zero].sum()),
        negative=int((wide < 0).sum()),
        inexact=int((round_bf16(wide) != wide).sum()),
        bytes=counts,
    )
