"""Coded: a format that a function decodes, a row at a time, as the K-quants of dynamic GGUFs.

    W[o] = decode(blocks[o])                        blocks [O, bytes of a row] uint8

The gguf package decodes all of GGUF's types; fast/kquants.py has kernels for some of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Coded(NamedTuple):
    """A matrix whose rows `decode` turns into float32."""

    blocks: np.ndarray  # [O, bytes of a row] uint8
    columns: int
    decode: Callable[[np.ndarray], np.ndarray]  # blocks → float32 [O, columns]
    name: str  # GGUF's: Q4_K, …

    @property
    def format(self) -> str:
        return "coded"

    @property
    def unit(self) -> int:
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.blocks.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    def dequantize(self, dtype: Any, rounded: tuple[str, ...] = ()) -> np.ndarray:
        """Decode all rows."""
        return self.decode(np.ascontiguousarray(self.blocks)).astype(dtype, copy=False)

    def rows(self, index: Any) -> "Coded":
        return self._replace(blocks=self.blocks[index])

    def arrays(self) -> dict[str, np.ndarray]:
        return {"blocks": self.blocks}
