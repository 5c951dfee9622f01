"""LatentCache: what one layer remembers of one prompt, 576 numbers a token for K2.

    c_kv [S, C]   the latent, after kv_a_layernorm
    k_pe [S, R]   the rotated key that all heads share

Keys and values of every head are functions of these (DeepSeek-V2, arXiv:2405.04434, eqs. 9-19);
expanded and absorbed attention read the same rows. A cache is the only thing that the mathematics
changes, and it is an argument.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.model.matrix import array_module, bf16_bits, widen_bf16


@dataclass(frozen=True)
class CacheOptions:
    """How the caches of a decoder are kept, and how much of a prompt may pass at once."""

    bf16: bool = False  # rows are rounded to bf16: half the memory
    room: int | None = None  # positions that are allocated at once, and no more; None: grow
    rows: int | None = None  # of a prompt that may go through the layers together; None: any


class LatentCache:
    """The rows of one layer and one prompt, in the memory of the rows that came first.

    It grows by doubling, or has `room` for a fixed number of positions from the beginning. With
    `bf16` rows are rounded when they are appended and widened when they are read.
    """

    def __init__(self, cfg: Config, dtype: Any, bf16: bool = False, room: int | None = None):
        self.length, self.bf16, self.room = 0, bf16, room
        kept = np.uint16 if bf16 else dtype
        self._c_kv = np.empty((0, cfg.kv_lora_rank), kept)
        self._k_pe = np.empty((0, cfg.qk_rope_head_dim), kept)

    @property
    def c_kv(self) -> np.ndarray:
        """The latents [S, C]; a view, unless they are kept in bf16."""
        rows = self.stored[0]
        return widen_bf16(rows) if self.bf16 else rows

    @property
    def k_pe(self) -> np.ndarray:
        """The rotated keys [S, R]; a view, unless they are kept in bf16."""
        rows = self.stored[1]
        return widen_bf16(rows) if self.bf16 else rows

    @property
    def stored(self) -> tuple[np.ndarray, np.ndarray]:
        """Views of both as they are kept: with `bf16` their bits."""
        return self._c_kv[: self.length], self._k_pe[: self.length]

    def append(self, c_kv: np.ndarray, k_pe: np.ndarray) -> None:
        """Add rows c_kv [T, C], k_pe [T, R]; `InputError` where they exceed the room."""
        end = self.length + len(c_kv)
        if self.room is not None and end > self.room:
            raise InputError(
                f"{end} tokens, and the caches were given room for {self.room}; --ctx gives more"
            )
        if end > len(self._c_kv):
            size = self.room or max(end, 2 * len(self._c_kv))
            self._c_kv = _grow(self._c_kv, self.length, size, c_kv)
            self._k_pe = _grow(self._k_pe, self.length, size, k_pe)
        self._c_kv[self.length : end] = bf16_bits(c_kv) if self.bf16 else c_kv
        self._k_pe[self.length : end] = bf16_bits(k_pe) if self.bf16 else k_pe
        self.length = end

    def truncate(self, length: int) -> None:
        """Forget all rows from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} rows to {length}")
        self.length = length


def _grow(old: np.ndarray, used: int, size: int, like: np.ndarray) -> np.ndarray:
    """Return a copy with `size` rows, in the memory of `like`, that begins with the used ones."""
    new = array_module(like).empty((size, old.shape[1]), old.dtype)
    if used:
        new[:used] = old[:used]
    return new
