"""Attention, quicker: the seams `expanded` for a prompt and `absorbed` for the tokens of a step.

Expanded: each head is a piece, in blocks of `ROWS` queries that see no later position than their
last, so that the scratch of a thread is one head's block.

Absorbed: queries become latent, and contexts values, by kernels that read `kv_b_proj` as stored.
The cache is read once, in blocks of `BLOCK` positions that the threads share: a block's scores, its
largest, its sum and its part of the context; the parts are brought to one largest score and added
in the order of the positions. So the scratch does not grow with the context.

Neither's bits depend on the number of threads. Source of the division: Milakov and Gimelshein,
arXiv:1805.02867 (online softmax); Dao et al., arXiv:2205.14135. Twins: those of
`refmoe.model.mla`, which also serve where something inside is rounded or watched.
"""

from functools import partial

import numpy as np

from refmoe.config import Config
from refmoe.fast import kernels, threads
from refmoe.fast.linear import Stored, address, stored
from refmoe.model import mla
from refmoe.model.cache import LatentCache
from refmoe.model.matrix import Fp8Block, Matrix, widen_bf16
from refmoe.model.numerics import Numerics
from refmoe.model.rope import softmax_scale

ROWS = 256  # queries
BLOCK = 1024  # positions
TOKENS = 2  # of `absorbed`


def expanded(
    q_nope: np.ndarray,
    q_pe: np.ndarray,
    kv_b_proj: Matrix,
    cache: LatentCache,
    cfg: Config,
    nx: Numerics,
) -> np.ndarray:
    """q_nope [T, H, N], q_pe [T, H, R] against all rows of the cache → context [T, H, V]."""
    inside = ("kv_b_proj", "#scores", "#probs")
    if nx.round is not None or any(nx.watches(name) for name in inside):
        return mla.expanded(q_nope, q_pe, kv_b_proj, cache, cfg, nx)
    (T, H, N), S, V = q_nope.shape, cache.length, cfg.v_head_dim
    kv = nx.linear(cache.c_kv, kv_b_proj).reshape(S, H, N + V)
    k_pe, scale = cache.k_pe, nx.dtype(softmax_scale(cfg))
    context = np.empty((T, H, V), nx.dtype)

    def head(h: int) -> None:
        k_nope, v = np.ascontiguousarray(kv[:, h, :N]), np.ascontiguousarray(kv[:, h, N:])
        for start in range(0, T, ROWS):
            rows = slice(start, min(start + ROWS, T))
            seen = S - T + rows.stop  # by the last of them
            s = q_nope[rows, h] @ k_nope[:seen].T + q_pe[rows, h] @ k_pe[:seen].T
            last = np.arange(S - T + start, seen)[:, None]
            p = mla.softmax(np.where(np.arange(seen) <= last, s * scale, -np.inf))
            context[rows, h] = p @ v[:seen]

    with threads.one_blas_thread():
        threads.pool().run([partial(head, h) for h in range(H)])
    return context


def absorbed(
    q_nope: np.ndarray,
    q_pe: np.ndarray,
    kv_b_proj: Matrix,
    cache: LatentCache,
    cfg: Config,
    nx: Numerics,
) -> np.ndarray:
    """q_nope [T, H, N], q_pe [T, H, R] against all rows of the cache → context [T, H, V]."""
    known = _readable(q_nope, kv_b_proj, cfg, nx)
    if known is None:
        return mla.absorbed(q_nope, q_pe, kv_b_proj, cache, cfg, nx)
    q_latent = _to_latent(q_nope, known)  # [T, H, C]
    context = _attend(q_latent, q_pe, cache, nx.dtype(softmax_scale(cfg)))  # [T, H, C]
    return _from_latent(context, known, cfg)


def _readable(q_nope: np.ndarray, m: Matrix, cfg: Config, nx: Numerics) -> Stored | None:
    """Where the kernels read it, nothing inside is rounded or watched, and tokens are few."""
    inside = ("#q_latent", "#scores", "#probs", "#context_latent")
    if q_nope.dtype != np.float32 or len(q_nope) > TOKENS or nx.round is not None:
        return None
    if any(nx.watches(name) for name in inside):
        return None
    if isinstance(m, Fp8Block):
        N, V = cfg.qk_nope_head_dim, cfg.v_head_dim
        if "fp8" in nx.conventions.rounded_products or N % m.block[0] or V % m.block[0]:
            return None
    known = stored(m)
    return known if known is not None and known.how.sum is not None else None


def _to_latent(q_nope: np.ndarray, m: Stored) -> np.ndarray:
    """q_nope W_uk: [T, H, N] → [T, H, C]."""
    T, H, N = q_nope.shape
    O, C = m.shape
    q = np.ascontiguousarray(q_nope)
    out = np.empty((T, H, C), np.float32)
    assert m.how.sum is not None
    pieces = []
    for t in range(T):
        x, y = address(q[t]), address(out[t])
        place = (*m.place, x, q.strides[1], y, out.strides[1], m.steps, N, O // H)
        step = max(1, H // 16)
        pieces += [partial(m.how.sum, *place, h, min(h + step, H)) for h in range(0, H, step)]
    threads.pool().run(pieces)
    return kernels.restored(m.form, out.reshape(T * H, C)).reshape(T, H, C)


def _from_latent(context: np.ndarray, m: Stored, cfg: Config) -> np.ndarray:
    """context W_uvᵀ: [T, H, C] → [T, H, V]."""
    T, H, C = context.shape
    N, V = cfg.qk_nope_head_dim, cfg.v_head_dim
    x = kernels.ordered(m.form, context.reshape(T * H, C)).reshape(T, H, C)
    out = np.empty((T, H, V), np.float32)

    def heads(begin: int, end: int) -> None:
        for h in range(begin, end):
            first = h * (N + V) + N
            at = m.w + first * m.w_row, m.w_row, m.s + first // m.share * m.s_row, m.s_row, m.share
            rows = address(x) + h * x.strides[1], x.strides[0]
            to = address(out) + h * out.strides[1], out.strides[0]
            m.how.few(*at, *rows, *to, m.steps, T, 0, V)

    step = max(1, H // 16)
    threads.pool().run([partial(heads, h, min(h + step, H)) for h in range(0, H, step)])
    return out


def _attend(
    q_latent: np.ndarray, q_pe: np.ndarray, cache: LatentCache, scale: np.floating
) -> np.ndarray:
    """softmax(scale · (q_latent·c_kv + q_pe·k_pe)) c_kv, causal: [T, H, C] → [T, H, C]."""
    T, H, C = q_latent.shape
    S = cache.length
    q, p = q_latent.reshape(T * H, C), np.ascontiguousarray(q_pe).reshape(T * H, -1)
    last = np.repeat(np.arange(S - T, S), H)[:, None]  # a query sees its own position, and before
    count = -(-S // BLOCK)
    most = np.empty((count, T * H, 1), np.float32)
    total = np.empty((count, T * H, 1), np.float32)
    parts = np.empty((count, T * H, C), np.float32)

    def block(i: int) -> None:
        rows = slice(i * BLOCK, min(S, (i + 1) * BLOCK))
        c_kv, k_pe = (widen_bf16(a[rows]) if cache.bf16 else a[rows] for a in cache.stored)
        s = (q @ c_kv.T + p @ k_pe.T) * scale  # [T·H, block]
        if rows.stop > S - T + 1:
            s = np.where(np.arange(rows.start, rows.stop) <= last, s, -np.inf)
        top = s.max(axis=1, keepdims=True)
        most[i] = np.where(top > -np.inf, top, np.float32(0))
        e = np.exp(s - most[i])
        total[i] = e.sum(axis=1, keepdims=True)
        parts[i] = e @ c_kv

    pieces = [partial(block, i) for i in range(count)]
    if count == 1:
        block(0)
    else:
        with threads.one_blas_thread():
            threads.pool().run(pieces)
    seen = np.where(total > 0, most, -np.inf)
    weight = np.exp(seen - seen.max(axis=0))
    return ((weight * parts).sum(axis=0) / (weight * total).sum(axis=0)).reshape(T, H, C)
