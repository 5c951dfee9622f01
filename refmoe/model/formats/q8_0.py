"""Q8: GGUF's Q8_0, 8-bit codes with a scale for 32 columns.

    W[o, i] = code[o, i] · scale[o, i // 32]        blocks [O, I/32, 34] uint8: float16, 32 int8

Exact in float32. Source: ggml-org/llama.cpp ggml-common.h, `block_q8_0`. GGUF type 8.
"""

from typing import Any, NamedTuple

import numpy as np

from refmoe.model.formats.base import GgufType, StoredFormat
from refmoe.model.matrix import array_module


class Q8(NamedTuple):
    """A matrix of 8-bit codes."""

    blocks: np.ndarray  # [O, I/32, 34] uint8: float16 scale, 32 int8

    @property
    def format(self) -> str:
        return "q8"

    @property
    def unit(self) -> int:
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.blocks.shape[0], self.blocks.shape[1] * 32

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    @classmethod
    def quantize(cls, w: np.ndarray) -> "Q8":
        """Round float32 [O, I] to the nearest codes: scale = max|w| / 127 of each 32.

        The codes are of the scale before it is rounded to float16, as in ggml's own quantiser
        (ggml-org/llama.cpp ggml-quants.c, `quantize_row_q8_0_ref`).
        """
        groups = w.reshape(len(w), -1, 32)
        scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
        per = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        blocks = np.empty((*groups.shape[:2], 34), np.uint8)
        blocks[..., :2] = scale.astype(np.float16).view(np.uint8)
        blocks[..., 2:] = np.rint(groups * per).astype(np.int8).view(np.uint8)
        return cls(blocks)

    def dequantize(self, dtype: Any, rounded: tuple[str, ...] = ()) -> np.ndarray:
        """Multiply codes by scales: exact in float32."""
        xp = array_module(self.blocks)
        scales = xp.ascontiguousarray(self.blocks[..., :2]).view(np.float16).astype(np.float32)
        codes = xp.ascontiguousarray(self.blocks[..., 2:]).view(np.int8)
        return (codes * scales).reshape(self.shape).astype(dtype, copy=False)

    def rows(self, index: Any) -> "Q8":
        return Q8(self.blocks[index])

    def arrays(self) -> dict[str, np.ndarray]:
        return {"blocks": self.blocks}

    def steps(self) -> np.ndarray:
        """Return the scale that each code is multiplied by, with its sign, [O, I] float64."""
        scale = np.ascontiguousarray(self.blocks[..., :2]).view(np.float16)[..., 0]
        return np.repeat(scale.astype(np.float64), 32, axis=1)

    def half_step(self, w: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return how far a number may be from the value w that is stored for it.

        Half a code, and 127 codes times the rounding of the scale to float16: 2⁻¹¹ of it, or half
        the least float16 where it is subnormal.
        """
        return np.abs(self.steps()) * (0.5 + 127 * 2.0**-11) + 127 * 2.0**-25


FORMAT = StoredFormat("q8", Q8, gguf=GgufType(8, "Q8_0", 32, 34), eight_bits=False)
