"""Heads: a kv_b_proj that is stored in two halves, as in GGUFs.

W[h·(N+V) + n, c] = k_b[h·C + c, n]             k_b [H·C, N], the keys' half transposed by head
W[h·(N+V) + N + v, c] = v_b[h·V + v, c]         v_b [H·V, C]
"""

from typing import Any, NamedTuple

import numpy as np

from refmoe.model.matrix import array_module, dequantize


class Heads(NamedTuple):
    """kv_b_proj [H(N+V), C] of two matrices, each in a format of its own."""

    k_b: Any  # Matrix [H·C, N]
    v_b: Any  # Matrix [H·V, C]
    heads: int

    @property
    def format(self) -> str:
        return "heads"

    @property
    def unit(self) -> int:
        return 0  # the keys' rows are columns where they are stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.heads * self.k_b.shape[1] + self.v_b.shape[0], self.v_b.shape[1]

    @property
    def nbytes(self) -> int:
        return self.k_b.nbytes + self.v_b.nbytes

    def dequantize(self, dtype: Any, rounded: tuple[str, ...] = ()) -> np.ndarray:
        """Decode both halves, and bring them together by head."""
        H = self.heads
        keys, values = (dequantize(half, dtype, rounded) for half in (self.k_b, self.v_b))
        keys = keys.reshape(H, -1, keys.shape[1]).transpose(0, 2, 1)  # [H, N, C]
        values = values.reshape(H, -1, values.shape[1])  # [H, V, C]
        both = array_module(keys).concatenate((keys, values), axis=1)
        return both.reshape(self.shape)  # [H(N+V), C]

    def rows(self, index: Any) -> np.ndarray:
        """Return some rows, decoded."""
        return self.dequantize(np.float32)[index]

    def arrays(self) -> dict[str, np.ndarray]:
        halves = (("k_b", self.k_b), ("v_b", self.v_b))
        return {
            f"{name}.{part}": a
            for name, m in halves
            for part, a in (m.arrays() if hasattr(m, "arrays") else {"values": m}).items()
        }
