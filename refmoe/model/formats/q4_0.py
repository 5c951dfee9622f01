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
        """Return the scale that each code is multiplied by, with its sign, [O, I] float64."""
        scale = np.ascontiguousarray(self.blocks[..., :2]).view(np.float16)[..., 0]
        return np.repeat(scale.astype(np.float64), 32, axis=1)

    def half_step(self, w: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return how far a number may be from the value w that is stored for it.

        Half a code, and 8 codes times the rounding of the scale to float16. ggml takes the scale
        max / -8, so that numbers up to 8 codes are cut to 7: there it is a whole code, on the side
        on which `other`, the number or what another file stores for it, is.
        """
        d = self.steps()
        cut = (w == 7 * d) & ((other - w) * d > 0)
        return np.abs(d) * (np.where(cut, 1.0, 0.5) + 8 * 2.0**-11) + 8 * 2.0**-25


FORMAT = StoredFormat("q4", Q4, gguf=GgufType(2, "Q4_0", 32, 18), eight_bits=False)
