"""Multi-head latent attention, twice: expanded as in the paper, absorbed as in decoding.

    c_q            = norm(x W_qa)                       q_a_proj, q_a_layernorm       [T, A]
    q_nope, q_pe   = c_q W_qb, q_pe rotated             q_b_proj                      [T, H, N|R]
    c_kv, k_pe     = x W_kva, c_kv normed, k_pe rotated kv_a_proj_with_mqa            [T, C], [T, R]

  expanded: every head's key and value are made from the latent
    k_nope, v      = c_kv W_kvb                         kv_b_proj                     [S, H, N|V]
    scores         = (q_nope·k_nope + q_pe·k_pe) · softmax_scale                      [T, H, S]
    context        = softmax(scores) v                                                [T, H, V]

  absorbed: W_kvb = (W_uk, W_uv) moves to the other side of both products
    q_latent       = q_nope W_uk                                                      [T, H, C]
    scores         = (q_latent·c_kv + q_pe·k_pe) · softmax_scale                      [T, H, S]
    context        = (softmax(scores) c_kv) W_uvᵀ                                     [T, H, V]

    y              = context W_o                        o_proj                        [T, D]

The rotated key is shared by all heads and is not normalised. A query sees the positions up to its
own. Source: DeepSeek-V2 (arXiv:2405.04434), §2.1.2-2.1.3, eqs. 9-19 and appendix C; DeepSeek-V3
(arXiv:2412.19437), eqs. 1-11. The eps of the two inner norms is 1e-6 here, as in Moonshot's and
DeepSeek's modelling files, which never pass the config's; vLLM, SGLang and llama.cpp use
`rms_norm_eps` (`Conventions.latent_norm_eps`). K2: H = 64, A = 1536, C = 512, N = 128, R = 64,
V = 128.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.model.cache import LatentCache
from refmoe.model.matrix import Matrix, array_module, dequantize
from refmoe.model.numerics import Numerics
from refmoe.model.rope import cos_sin, softmax_scale

SCORES = 1 << 24  # scores at once, 128 MB of float64; longer prompts go in blocks of rows
WATCHED = 8  # times fewer at once where a watcher makes more of each


class AttentionWeights(NamedTuple):
    """The matrices of attention, under the checkpoint's names."""

    q_proj: Matrix | None  # [H(N+R), D], only without q_lora_rank
    q_a_proj: Matrix | None  # [A, D]
    q_a_layernorm: Matrix | None  # [A]
    q_b_proj: Matrix | None  # [H(N+R), A]
    kv_a_proj_with_mqa: Matrix  # [C+R, D]
    kv_a_layernorm: Matrix  # [C]
    kv_b_proj: Matrix  # [H(N+V), C]
    o_proj: Matrix  # [D, HV]


class Segment(NamedTuple):
    """The rows of one prompt, and the cache of its earlier tokens in this layer."""

    rows: slice
    cache: LatentCache


def attention(
    x: np.ndarray,
    w: AttentionWeights,
    segments: Sequence[Segment],
    cfg: Config,
    nx: Numerics,
) -> np.ndarray:
    """Attend within each segment: x [T, D] → [T, D]. Appends its rows to its cache."""
    H, N, C = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.kv_lora_rank
    eps = nx.conventions.latent_norm_eps or cfg.rms_norm_eps
    T = len(x)

    if w.q_proj is not None:
        q = nx.point("q_proj", nx.linear(x, w.q_proj))  # [T, H(N+R)]
    else:
        assert w.q_a_proj is not None
        assert w.q_a_layernorm is not None
        assert w.q_b_proj is not None
        c_q = nx.point("q_a_proj", nx.linear(x, w.q_a_proj))  # [T, A]
        c_q = nx.point("q_a_layernorm", nx.norm(c_q, w.q_a_layernorm, eps))
        q = nx.point("q_b_proj", nx.linear(c_q, w.q_b_proj))  # [T, H(N+R)]
    q = q.reshape(T, H, -1)
    q_nope, q_pe = q[..., :N], q[..., N:]  # [T, H, N], [T, H, R]

    kv = nx.point("kv_a_proj_with_mqa", nx.linear(x, w.kv_a_proj_with_mqa))  # [T, C+R]
    c_kv, k_pe = kv[:, :C], kv[:, C:]  # [T, C], [T, R]
    c_kv = nx.point("kv_a_layernorm", nx.norm(c_kv, w.kv_a_layernorm, eps))

    positions = np.empty(T, np.int64)
    for rows, cache in segments:
        positions[rows] = np.arange(cache.length, cache.length + rows.stop - rows.start)
    cos, sin = cos_sin(positions, cfg, nx)  # [T, R/2]
    q_pe = nx.point("#q_pe", nx.rotate(q_pe, cos[:, None], sin[:, None]))
    k_pe = nx.point("#k_pe", nx.rotate(k_pe, cos, sin))

    context = array_module(x).empty((T, H, cfg.v_head_dim), nx.dtype)
    for i, (rows, cache) in enumerate(segments):
        cache.append(c_kv[rows], k_pe[rows])
        here = nx if len(segments) == 1 else nx.within_segment(i)
        absorb = _absorb(rows.stop - rows.start, cache.length, cfg, nx)
        attend = nx.absorbed if absorb else nx.expanded
        context[rows] = attend(q_nope[rows], q_pe[rows], w.kv_b_proj, cache, cfg, here)
    context = nx.point("#context", context.reshape(T, -1))  # [T, HV]
    return nx.point("o_proj", nx.linear(context, w.o_proj))


def expanded(
    q_nope: np.ndarray,
    q_pe: np.ndarray,
    kv_b_proj: Matrix,
    cache: LatentCache,
    cfg: Config,
    nx: Numerics,
) -> np.ndarray:
    """Attend with every head's keys and values: q_nope [T, H, N], q_pe [T, H, R] → [T, H, V]."""
    N, S = cfg.qk_nope_head_dim, cache.length
    kv = nx.point("kv_b_proj", nx.linear(cache.c_kv, kv_b_proj))  # [S, H(N+V)]
    kv = kv.reshape(S, cfg.num_attention_heads, -1).transpose(1, 0, 2)  # [H, S, N+V]
    k_nope, v = kv[..., :N], kv[..., N:]  # [H, S, N], [H, S, V]

    def scores(rows: slice) -> np.ndarray:
        nope = q_nope[rows].transpose(1, 0, 2) @ k_nope.transpose(0, 2, 1)  # [H, T, S]
        return nope + q_pe[rows].transpose(1, 0, 2) @ cache.k_pe.T

    context = _softmax_blocks(scores, v, len(q_nope), S, cfg, nx)  # [H, T, V]
    return context.transpose(1, 0, 2)


def absorbed(
    q_nope: np.ndarray,
    q_pe: np.ndarray,
    kv_b_proj: Matrix,
    cache: LatentCache,
    cfg: Config,
    nx: Numerics,
) -> np.ndarray:
    """Attend over the latent, making no key or value: q_nope, q_pe as above → [T, H, V]."""
    H, N, C = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.kv_lora_rank
    w = dequantize(kv_b_proj, nx.dtype, nx.conventions.rounded_products)
    w = w.reshape(H, -1, C)  # [H, N+V, C]
    w_uk, w_uv = w[:, :N], w[:, N:]  # [H, N, C], [H, V, C]

    q_latent = (q_nope.transpose(1, 0, 2) @ w_uk).transpose(1, 0, 2)  # [T, H, C]
    q_latent = nx.point("#q_latent", q_latent)

    def scores(rows: slice) -> np.ndarray:
        latent = q_latent[rows].transpose(1, 0, 2) @ cache.c_kv.T  # [H, T, S]
        return latent + q_pe[rows].transpose(1, 0, 2) @ cache.k_pe.T

    context = _softmax_blocks(scores, cache.c_kv, len(q_nope), cache.length, cfg, nx)  # [H, T, C]
    context = nx.point("#context_latent", context.transpose(1, 0, 2))  # [T, H, C]
    return (context.transpose(1, 0, 2) @ w_uv.transpose(0, 2, 1)).transpose(1, 0, 2)


def _softmax_blocks(
    scores: Callable[[slice], np.ndarray],
    values: np.ndarray,
    T: int,
    S: int,
    cfg: Config,
    nx: Numerics,
) -> np.ndarray:
    """Return softmax(scaled, causally masked scores) @ values, [H, T, ·].

    It works in blocks of rows to bound memory, unless a watcher wants scores or probabilities
    whole.
    """
    xp, scale = array_module(values), nx.dtype(softmax_scale(cfg))
    watched = [name for name in ("#scores", "#probs") if nx.watches(name)]
    whole = not all(map(nx.takes_rows, watched))
    most = SCORES // WATCHED if watched else SCORES
    step = T if whole else max(1, most // (cfg.num_attention_heads * S))
    blocks = []
    for start in range(0, T, step):
        stop = min(start + step, T)
        s = scores(slice(start, stop)) * scale  # [H, T, S]
        s = nx.tap("#scores", s.transpose(1, 0, 2)).transpose(1, 0, 2) if watched else s
        seen = xp.arange(S - T + start, S - T + stop)[:, None]  # a query's own position, the last
        p = softmax(xp.where(xp.arange(S) <= seen, s, -np.inf))
        p = nx.tap("#probs", p.transpose(1, 0, 2)).transpose(1, 0, 2) if watched else p
        blocks.append(p @ values)
    return blocks[0] if len(blocks) == 1 else xp.concatenate(blocks, axis=1)


def softmax(s: np.ndarray) -> np.ndarray:
    """Return e^s / Σ e^s over the last axis, with the largest score taken off first."""
    e = array_module(s).exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _absorb(T: int, S: int, cfg: Config, nx: Numerics) -> bool:
    """Tell whether the absorbed form is asked for, or costs fewer multiplications."""
    if nx.attention != "auto":
        return nx.attention == "absorbed"
    C, N, R, V = cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    expand = S * C * (N + V) + T * S * (N + R + V)
    absorb = T * C * (N + V) + T * S * (2 * C + R)
    return absorb < expand
