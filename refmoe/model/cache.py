"""LatentCache: what one layer remembers of one prompt, 576 numbers a token for K2.

    c_kv [S, C]   the latent, after kv_a_layernorm
    k_pe [S, R]   the rotated key that all heads share

Keys and values of every head are functions of these (DeepSeek-V2, arXiv:2405.04434, eqs. 9-19);
expanded and absorbed attention read the same rows. It is the only thing the mathematics mutates,
and it is an argument.
"""

from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.model.numerics import Numerics, array_module


class LatentCache:
    """Grows by doubling; `c_kv` and `k_pe` are views of the rows in use."""

    def __init__(self, cfg: Config, dtype: Any):
        self.length = 0
        self._c_kv = np.empty((0, cfg.kv_lora_rank), dtype)
        self._k_pe = np.empty((0, cfg.qk_rope_head_dim), dtype)

    @property
    def c_kv(self) -> np.ndarray:
        return self._c_kv[: self.length]

    @property
    def k_pe(self) -> np.ndarray:
        return self._k_pe[: self.length]

    def append(self, c_kv: np.ndarray, k_pe: np.ndarray) -> None:
        """Add rows c_kv [T, C], k_pe [T, R] behind those there."""
        end = self.length + len(c_kv)
        if end > len(self._c_kv):
            self._c_kv = _grown(self._c_kv, self.length, end, c_kv)
            self._k_pe = _grown(self._k_pe, self.length, end, k_pe)
        self._c_kv[self.length : end] = c_kv
        self._k_pe[self.length : end] = k_pe
        self.length = end

    def truncate(self, length: int) -> None:
        """Forget all rows from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} rows to {length}")
        self.length = length


def caches(cfg: Config, nx: Numerics) -> list[LatentCache]:
    """An empty cache for each layer: the memory of one prompt."""
    return [LatentCache(cfg, nx.dtype) for _ in range(cfg.num_hidden_layers)]


def _grown(old: np.ndarray, used: int, needed: int, like: np.ndarray) -> np.ndarray:
    new = array_module(like).empty((max(needed, 2 * len(old)), old.shape[1]), old.dtype)
    new[:used] = old[:used]
    return new
