"""Q4: GGUF's Q4_0, 4-bit codes with a scale for 32 columns. What INT4 experts are in a GGUF.

    W[o, i] = (nibble[o, i] - 8) · scale[o, i // 32]        blocks [O, I/32, 18] uint8

A float16 scale, then 16 bytes, byte j with nibble j low and nibble j + 16 high; exact in float32.
Source: ggml-org/llama.cpp ggml-common.h, `block_q4_0`. GGUF type 2.
"""

from typing import Any, NamedTuple

import numpy as np

from refmoe.model.formats.base import GgufType, StoredFormat
from refmoe.model.matrix import array_module


class Q4(NamedTuple):
    """A matrix of 4-bit codes."""

    blocks: np.ndarray  # [O, I/32, 18] uint8: float16 scale, 32 nibbles

    @property
    def format(self) -> str:
        return "q4"

    @property
    def unit(self) -> int:
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.blocks.shape[0], self.blocks.shape[1] * 32

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    def dequantize(self, dtype: Any, rounded: tuple[str, ...] = ()) -> np.ndarray:
        """Multiply codes by scales: exact in float32."""
        xp = array_module(self.blocks)
        scales = xp.ascontiguousarray(self.blocks[..., :2]).view(np.float16).astype(np.float32)
        two = self.blocks[..., 2:]
        q = xp.concatenate((two & 15, two >> 4), axis=-1).astype(np.float32) - 8
        return (q * scales).reshape(self.shape).astype(dtype, copy=False)

    def rows(self, index: Any) -> "Q4":
        return Q4(self.blocks[index])

    def arrays(self) -> dict[str, np.ndarray]:
        return {"blocks": self.blocks}

    def steps(self) -> np.ndarray:
        """Return the distance of neighbouring codes, [O, I] float64, with the scale's sign."""
        scale = np.ascontiguousarray(self.blocks[..., :2]).view(np.float16)[..., 0]
        return np.repeat(scale.astype(np.float64), 32, axis=1)

    def half_step(self) -> np.ndarray:
        """Return how far a weight may be from its code: half a step, and 8 times the scale's.

        ggml's quantiser has scale = max / -8, so that what lies above 7.5 steps is cut to 7.
        """
        d = self.steps()
        cut = self.dequantize(np.float64) == 7 * d
        return np.where(cut, 1, 0.5) * np.abs(d) + 8 * 2.0**-8 * np.abs(d)


FORMAT = StoredFormat("q4", Q4, gguf=GgufType(2, "Q4_0", 32, 18), eight_bits=False)
