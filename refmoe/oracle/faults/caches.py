"""Faults of the cache of latent and rotated key: scales, limits, layout, rows, and chunks.

They are of what attention reads back, whatever was computed; a cache that is narrower than the
tensors, and right, is in oracle/caches.py. Where a fault begins at a position, as after a chunk of
a prompt, or has a factor or a limit, that is solved for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.model.decoder import Decoder
from refmoe.model.mla import softmax
from refmoe.oracle.caches import reading
from refmoe.oracle.faults.base import (
    CONTEXT,
    PROBS,
    ROTATED,
    SCORES,
    Alter,
    Changes,
    Family,
    Fault,
    Here,
    changed,
    with_free,
    written,
)
from refmoe.oracle.faults.positions import rotate_as

# --- what several of these faults use

Rows = Callable[[np.ndarray], np.ndarray]
READ = ("kv_b_proj", SCORES, CONTEXT)


@dataclass(frozen=True)
class Misread:
    """A cache whose latent and key are read back changed."""

    change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    expanded: bool = False

    def read(self, latent: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return latent [S, C] and key [S, R] as they are read back."""
        return self.change(latent, key)

    def heads(self, kv: np.ndarray, cfg: Config) -> np.ndarray:
        """Return keys and values as they are, as none are held."""
        return kv


def read_by(change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Alter:
    """Read the cached latent and key as one function of both."""

    def alter(decoder: Decoder, layer: int | None) -> Decoder:
        wrong = Misread(change)
        return reading(decoder, lambda i: wrong if layer in (None, i) else None)

    return alter


def read_as(latent: Rows | None, key: Rows | None) -> Alter:
    """Read the cached latent and key as these functions of them; None: as they are."""

    def change(c: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return c if latent is None else latent(c), k if key is None else key(k)

    return read_by(change)


def misread_rows(
    id: str, text: str, latent: Rows | None, key: Rows | None, references: str = ""
) -> Fault:
    """Return a fault of what attention reads from the cache."""
    shown = READ if latent is not None else (SCORES,)
    fault = changed(id, text, references, shown, read_as(latent, key))
    return replace(fault, by="reading")


def scaled_cache(id: str, text: str, latent: bool, key: bool, references: str = "") -> Fault:
    """Return a fault that reads the cache times a constant; four times where it is planted."""

    def make(factor: float) -> Fault:
        def times(x: np.ndarray) -> np.ndarray:
            return x * x.dtype.type(factor)

        return misread_rows(id, text, times if latent else None, times if key else None, references)

    what = "latents" if not key else "keys" if not latent else "rows"
    return with_free(make(4.0), f"factor on the cached {what}", "factor", make)


def begin(x: np.ndarray, at: float | None) -> int:
    """Return the position at which a fault begins: as solved for, or half a prompt on."""
    return max(1, len(x) // 2) if at is None else int(at)


def beginning(id: str, text: str, make: Callable[[float | None], Any], references: str = "") -> Any:
    """Return a fault that begins at a position; make(position) returns changes or two functions."""

    def fault(at: float | None) -> Fault:
        made = make(at)
        if isinstance(made, tuple):
            latent, key = made
            return misread_rows(id, text, latent, key, references)
        shown = tuple(made)
        return written(id, text, made, references, shown)

    return with_free(fault(None), "from position", "position", fault)


CACHE = Family("the cache")

CACHE += scaled_cache(
    "cache-latent-scaled",
    "the cached latent is read without its scale, or with another",
    True,
    False,
    "sgl-project/sglang#34765",
)

CACHE += scaled_cache(
    "cache-key-scaled",
    "the cached key is read without its scale, or with another",
    False,
    True,
    "sgl-project/sglang#34765",
)

CACHE += scaled_cache(
    "cache-scaled",
    "cached latent and key are read without their scale, or with another",
    True,
    True,
    "sgl-project/sglang#34765",
)


def scaled_values(factor: float) -> Fault:
    """Return the fault of values that are read times a constant, and keys that are not."""
    text = "the values of the cache are read without their scale, or with another"
    times: Changes = {CONTEXT: lambda x, here: x * factor}
    return written("cache-values-scaled", text, times, "sgl-project/sglang#34765")


CACHE += with_free(scaled_values(4.0), "factor on the values", "factor", scaled_values)


def clipped_cache(limit: float | None) -> Fault:
    """Return the fault of a cache that holds no more than a limit; planted, the latent's RMS."""

    def read(latent: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        most = float(np.sqrt((latent * latent).mean())) if limit is None else limit
        return np.clip(latent, -most, most), np.clip(key, -most, most)

    text = "values beyond a limit are clipped in the cache"
    return replace(
        changed("cache-clipped", text, "vllm-project/vllm#42956", READ, read_by(read)), by="reading"
    )


CACHE += with_free(clipped_cache(None), "limit of cached values", "factor", clipped_cache)


def read_transposed(x: np.ndarray) -> np.ndarray:
    """Read rows [S, n] that were stored as [n, S]."""
    return np.ascontiguousarray(x.T).reshape(x.shape)


CACHE += misread_rows(
    "cache-transposed",
    "the cache is stored channels first and read rows first",
    read_transposed,
    read_transposed,
)

CACHE += misread_rows(
    "cache-latent-transposed",
    "the cached latent is stored channels first and read rows first",
    read_transposed,
    None,
)

CACHE += misread_rows(
    "cache-key-transposed",
    "the cached key is stored channels first and read rows first",
    None,
    read_transposed,
)


def without_rows(at: float | None) -> tuple[Rows, Rows]:
    """Read zeros from a position on: rows that were never written."""

    def zeros(x: np.ndarray) -> np.ndarray:
        y = x.copy()
        y[begin(x, at) :] = 0
        return y

    return zeros, zeros


CACHE += beginning(
    "cache-rows-missing",
    "rows of the cache were never written",
    without_rows,
    "tenstorrent/tt-metal#54413",
)


def with_stale_rows(at: float | None) -> tuple[Rows, Rows]:
    """Read the rows of the prompt's beginning again from a position on."""

    def stale(x: np.ndarray) -> np.ndarray:
        return np.resize(x[: begin(x, at)], x.shape)

    return stale, stale


CACHE += beginning(
    "cache-rows-stale",
    "after a chunk of the prompt the cache still has the rows of the one before",
    with_stale_rows,
)


def keys_and_values(here: Here) -> np.ndarray:
    """Return every head's key and value, [S, H, N+V]."""
    kv = here["self_attn.kv_b_proj"]
    return kv.reshape(len(kv), here.cfg.num_attention_heads, -1)


def without_prefix(at: float | None) -> Changes:
    """Give the tokens of a later chunk zeros for the rows before it."""

    def scores(s: np.ndarray, here: Here) -> np.ndarray:
        t = begin(s, at)
        y = s.copy()
        y[t:, :, :t] = 0
        return y

    def context(x: np.ndarray, here: Here) -> np.ndarray:
        t = begin(x, at)
        v = keys_and_values(here)[..., here.cfg.qk_nope_head_dim :]
        p = here["self_attn#probs"][t:, :, :t]  # [T-t, H, t]
        y = x.copy()
        y[t:] -= np.einsum("ths,shv->thv", p, v[:t]).reshape(len(x) - t, -1)
        return y

    return {SCORES: scores, CONTEXT: context}


CACHE += beginning(
    "cache-prefix-missing",
    "after a chunk of the prompt the rows before it are zeros",
    without_prefix,
)


def unseen_prefix(at: float | None) -> Changes:
    """Hide the rows before a chunk from its tokens."""

    def probs(p: np.ndarray, here: Here) -> np.ndarray:
        s = here["self_attn#scores"]
        t = begin(p, at)
        seen = np.tri(len(s), dtype=bool)
        seen[t:, :t] = False
        return softmax(np.where(seen[:, None], s, -np.inf))

    return {PROBS: probs}


CACHE += beginning(
    "cache-prefix-unseen",
    "after a chunk of the prompt its tokens see that chunk alone",
    unseen_prefix,
)


def restarted(at: float | None) -> Changes:
    """Count positions from zero again after a chunk."""

    def positions(x: np.ndarray) -> np.ndarray:
        t = begin(x, at)
        i = np.arange(len(x))
        return np.where(i < t, i, i - t)

    return dict.fromkeys(ROTATED, rotate_as(positions=positions))


CACHE += beginning(
    "rope-restarted",
    "after a chunk of the prompt positions begin at zero again",
    restarted,
    "mlx-node/mlx-node#33",
)
