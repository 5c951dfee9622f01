"""Faults of attention: masks, and how projections are split into heads, keys and values."""

from collections.abc import Callable

import numpy as np

from refmoe.config import Config
from refmoe.model.mla import softmax
from refmoe.oracle.faults.base import (
    CONTEXT,
    PROBS,
    SCORES,
    Change,
    Changes,
    Family,
    Here,
    K,
    Q,
    misread,
    written,
)
from refmoe.oracle.faults.common import plain, unrotated

# --- what several of these faults use


def attend_to(visible: Callable[[int], np.ndarray]) -> Changes:
    """Compute probabilities under another mask, visible(T) [T, T], true where seen."""

    def change(p: np.ndarray, here: Here) -> np.ndarray:
        s = here["self_attn#scores"]  # [T, H, T]
        return softmax(np.where(visible(len(s))[:, None], s, -np.inf))

    return {PROBS: change}


def per_head(change: Callable[[np.ndarray, Config], np.ndarray]) -> Change:
    """Change a point [T, H·n] seen as [T, H, n]."""

    def changed(x: np.ndarray, here: Here) -> np.ndarray:
        heads = x.reshape(len(x), here.cfg.num_attention_heads, -1)
        return change(heads, here.cfg).reshape(x.shape)

    return changed


ATTENTION = Family("attention")

ATTENTION += written(
    "mask-missing",
    "a token sees those after it",
    attend_to(lambda T: np.ones((T, T), bool)),
    "lablup/mlxcel#618",
)


def see_all_but_oneself(T: int) -> np.ndarray:
    """Return the causal mask without its diagonal; the first token sees itself."""
    return np.tri(T, k=-1, dtype=bool) | (np.eye(T, dtype=bool) & (np.arange(T) == 0))


ATTENTION += written("mask-strict", "a token does not see itself", attend_to(see_all_but_oneself))


def see_all_but_the_first(T: int) -> np.ndarray:
    """Return the causal mask without the first column; the first token sees itself."""
    seen = np.tri(T, dtype=bool)
    seen[1:, 0] = False
    return seen


ATTENTION += written(
    "mask-first", "the first token is invisible to the others", attend_to(see_all_but_the_first)
)


def see_half_a_prompt(T: int) -> np.ndarray:
    """Return the causal mask of the last T/2 positions."""
    return np.tri(T, dtype=bool) & ~np.tri(T, k=-max(1, T // 2), dtype=bool)


ATTENTION += written("mask-window", "a token sees half a prompt back", attend_to(see_half_a_prompt))

ATTENTION += misread(
    "q-split",
    "a head of the queries is split into rotated and plain channels in the wrong order",
    {
        end: per_head(lambda q, cfg: np.roll(q, -cfg.qk_rope_head_dim, axis=-1))
        for end in ("q_b_proj", "q_proj")
    },
    (Q, SCORES),
)

ATTENTION += misread(
    "kv-a-split",
    "kv_a_proj_with_mqa is split into key and latent, not into latent and key",
    {"with_mqa": lambda kv, here: np.roll(kv, -here.cfg.qk_rope_head_dim, axis=-1)},
    ("kv_a_layernorm", K),
)

ATTENTION += misread(
    "kv-b-split",
    "a head of kv_b_proj is split into value and key, not into key and value",
    {"kv_b_proj": per_head(lambda kv, cfg: np.roll(kv, -cfg.v_head_dim, axis=-1))},
    (SCORES, CONTEXT),
)


def split_into_keys_and_values(x: np.ndarray, cfg: Config) -> np.ndarray:
    """Read all keys, then all values, instead of key and value of each head."""
    T, H, N = len(x), cfg.num_attention_heads, cfg.qk_nope_head_dim
    flat = x.reshape(T, -1)
    k, v = flat[:, : H * N], flat[:, H * N :]
    return np.concatenate((k.reshape(T, H, N), v.reshape(T, H, -1)), axis=-1)


ATTENTION += misread(
    "kv-b-whole",
    "kv_b_proj is split into all keys and all values, not head by head",
    {"kv_b_proj": per_head(split_into_keys_and_values)},
    (SCORES, CONTEXT),
)


def interleave_heads(x: np.ndarray, cfg: Config) -> np.ndarray:
    """Read [T, H, n] as [T, n, H]."""
    return x.reshape(len(x), -1, cfg.num_attention_heads).swapaxes(1, 2)


ATTENTION += misread(
    "kv-b-interleaved",
    "the heads of kv_b_proj are read in turn",
    {"kv_b_proj": per_head(interleave_heads)},
    (SCORES, CONTEXT),
)

ATTENTION += misread(
    "kv-b-heads-shifted",
    "each head has key and value of the head before it",
    {"kv_b_proj": per_head(lambda kv, cfg: np.roll(kv, 1, axis=1))},
    (SCORES, CONTEXT),
)


def multiply_by_untransposed_keys(_: np.ndarray, here: Here) -> np.ndarray:
    """Multiply the latent by kv_b_proj with the key half of each head not transposed."""
    cfg, w = here.cfg, plain(here.decoder, here.w.self_attn.kv_b_proj).copy()
    H, N, C = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.kv_lora_rank
    heads = w.reshape(H, -1, C)  # [H, N+V, C]
    heads[:, :N] = heads[:, :N].reshape(H, C, N).swapaxes(1, 2)
    return here["self_attn.kv_a_layernorm"] @ w.T


ATTENTION += written(
    "kv-b-untransposed",
    "the key half of kv_b_proj is used without transposing it",
    {"kv_b_proj": multiply_by_untransposed_keys},
    "ikawrakow/ik_llama.cpp#394 ikawrakow/ik_llama.cpp#411",
)


def latent_before_norm(_: np.ndarray, here: Here) -> np.ndarray:
    """Return the latent before kv_a_layernorm."""
    return here["self_attn.kv_a_proj_with_mqa"][:, : here.cfg.kv_lora_rank]


ATTENTION += misread(
    "cache-latent-unnormed",
    "the latent is cached before its norm",
    {"kv_a_layernorm": latent_before_norm},
    ("kv_b_proj",),
)

ATTENTION += misread(
    "cache-key-unrotated", "the key is cached before its rotation", {K: unrotated}, (SCORES,)
)

ATTENTION += written(
    "heads-reversed",
    "the heads stand in reverse order before o_proj",
    {CONTEXT: per_head(lambda x, cfg: x[:, ::-1])},
)

ATTENTION += written(
    "heads-interleaved",
    "the channels of the heads stand in turn before o_proj",
    {CONTEXT: per_head(lambda x, cfg: x.swapaxes(1, 2))},
)
