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
from refmoe.files import InputError
from refmoe.model.matrix import array_module, bf16_bits, widen_bf16
from refmoe.model.numerics import Numerics


class LatentCache:
    """Grows by doubling; `c_kv` and `k_pe` are the rows in use.

    With `bf16` the rows are kept in it, in half the memory: rounded when they are appended, made
    wide when they are read. With `room` for so many rows it never grows. It lies in the memory of
    the rows that come first.
    """

    def __init__(self, cfg: Config, dtype: Any, bf16: bool = False, room: int | None = None):
        self.length, self.bf16, self.room = 0, bf16, room
        kept = np.uint16 if bf16 else dtype
        self._c_kv = np.empty((0, cfg.kv_lora_rank), kept)
        self._k_pe = np.empty((0, cfg.qk_rope_head_dim), kept)

    @property
    def c_kv(self) -> np.ndarray:
        rows = self.stored[0]
        return widen_bf16(rows) if self.bf16 else rows

    @property
    def k_pe(self) -> np.ndarray:
        rows = self.stored[1]
        return widen_bf16(rows) if self.bf16 else rows

    @property
    def stored(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows as they are kept: views."""
        return self._c_kv[: self.length], self._k_pe[: self.length]

    def append(self, c_kv: np.ndarray, k_pe: np.ndarray) -> None:
        """Add rows c_kv [T, C], k_pe [T, R] behind those there."""
        end = self.length + len(c_kv)
        if self.room is not None and end > self.room:
            raise InputError(
                f"{end} tokens, and the caches were given room for {self.room}; --ctx gives more"
            )
        if end > len(self._c_kv):
            size = self.room or max(end, 2 * len(self._c_kv))
            self._c_kv = _grown(self._c_kv, self.length, size, c_kv)
            self._k_pe = _grown(self._k_pe, self.length, size, k_pe)
        self._c_kv[self.length : end] = bf16_bits(c_kv) if self.bf16 else c_kv
        self._k_pe[self.length : end] = bf16_bits(k_pe) if self.bf16 else k_pe
        self.length = end

    def truncate(self, length: int) -> None:
        """Forget all rows from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} rows to {length}")
        self.length = length


def caches(cfg: Config, nx: Numerics) -> list[LatentCache]:
    """An empty cache for each layer: the memory of one prompt."""
    bf16 = nx.cache == "bf16"
    return [LatentCache(cfg, nx.dtype, bf16, nx.room) for _ in range(cfg.num_hidden_layers)]


def _grown(old: np.ndarray, used: int, size: int, like: np.ndarray) -> np.ndarray:
    new = array_module(like).empty((size, old.shape[1]), old.dtype)
    if used:
        new[:used] = old[:used]
    return new
