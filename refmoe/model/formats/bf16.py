"""BF16: the upper half of a float32, as published checkpoints store what they do not quantise.

    W[o, i] = the float32 whose upper 16 bits these are         bits [O, I] or [I] uint16

8 bits of exponent and 7 of fraction. Safetensors `BF16`, GGUF type 30.
"""

from typing import Any, NamedTuple

import numpy as np

from refmoe.model.formats.base import StoredFormat
from refmoe.model.matrix import bf16_bits, widen_bf16


class BF16(NamedTuple):
    """A matrix or vector in bf16."""

    bits: np.ndarray  # [O, I] or [I] uint16

    @property
    def format(self) -> str:
        return "bf16"

    @property
    def unit(self) -> int:
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes

    @classmethod
    def quantize(cls, w: np.ndarray) -> "BF16":
        """Round to the nearest bf16, ties to even."""
        return cls(bf16_bits(w))

    def dequantize(self, dtype: Any, rounded: tuple[str, ...] = ()) -> np.ndarray:
        """Widen the bits: exact in float32."""
        return widen_bf16(self.bits).astype(dtype, copy=False)

    def rows(self, index: Any) -> "BF16":
        return BF16(self.bits[index])

    def arrays(self) -> dict[str, np.ndarray]:
        return {"bits": self.bits}


FORMAT = StoredFormat("bf16", BF16)
