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

from collections.abc import Callable
from functools import partial

import numpy as np

from refmoe.config import Config
from refmoe.fast import kernels, reproducible, threads
from refmoe.fast.linear import (
    ALONE,
    FEW,
    Inputs,
    KernelMatrix,
    address,
    alone,
    kernel_view,
    make_kernel_view,
)
from refmoe.model import matrix, mla
from refmoe.model.cache import LatentCache
from refmoe.model.formats.bf16 import BF16
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.formats.heads import Heads
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.numerics import Numerics
from refmoe.model.rope import softmax_scale

ROWS = 256  # queries of a head at a time: their scores stay in the cache
BLOCK = 512  # positions a thread takes at a time
TOKENS = 2  # at most; with more, the definition over BLAS is quicker


def expanded(
    q_nope: np.ndarray,
    q_pe: np.ndarray,
    kv_b_proj: Matrix,
    cache: LatentCache,
    cfg: Config,
    nx: Numerics,
) -> np.ndarray:
    """Attend with keys and values made, a head at a time: q_nope, q_pe [T, H, ·] → [T, H, V]."""
    inside = ("kv_b_proj", "#scores", "#probs")
    if nx.round is not None or any(nx.watches(name) for name in inside):
        return reproducible.expanded(q_nope, q_pe, kv_b_proj, cache, cfg, nx)
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

    with threads.single_blas_thread():
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
    """Attend over the latent, for a few tokens: q_nope, q_pe [T, H, ·] → [T, H, V]."""
    if not _suits_kernels(q_nope, kv_b_proj, cfg, nx):
        return reproducible.absorbed(q_nope, q_pe, kv_b_proj, cache, cfg, nx)
    scale, H = nx.dtype(softmax_scale(cfg)), cfg.num_attention_heads
    if isinstance(kv_b_proj, Heads):
        k_b, v_b = kernel_view(kv_b_proj.k_b), kernel_view(kv_b_proj.v_b)
        if k_b is not None and v_b is not None:
            q_latent = _by_head(q_nope, k_b, 0, k_b.shape[0] // H, k_b.shape[0] // H)
            context = _attend(q_latent, q_pe, cache, scale)  # [T, H, C]
            return _by_head(context, v_b, 0, cfg.v_head_dim, cfg.v_head_dim)
    known = kernel_view(kv_b_proj)
    if known is None or known.how.sum is None:
        return reproducible.absorbed(q_nope, q_pe, kv_b_proj, cache, cfg, nx)
    q_latent = _to_latent(q_nope, known)  # [T, H, C]
    context = _attend(q_latent, q_pe, cache, scale)  # [T, H, C]
    N, V = cfg.qk_nope_head_dim, cfg.v_head_dim
    return _by_head(context, known, N, V, N + V)


def _suits_kernels(q_nope: np.ndarray, m: Matrix, cfg: Config, nx: Numerics) -> bool:
    """Tell whether tokens are few, nothing inside is watched, and blocks are a head's own."""
    inside = ("#q_latent", "#scores", "#probs", "#context_latent")
    if q_nope.dtype != np.float32 or len(q_nope) > TOKENS or nx.round is not None:
        return False
    if any(nx.watches(name) for name in inside):
        return False
    if isinstance(m, Fp8Block):
        N, V = cfg.qk_nope_head_dim, cfg.v_head_dim
        return not ("fp8" in nx.conventions.rounded_products or N % m.block[0] or V % m.block[0])
    return True


def _to_latent(q_nope: np.ndarray, m: KernelMatrix) -> np.ndarray:
    """Return q_nope W_uk: [T, H, N] → [T, H, C]."""
    T, H, N = q_nope.shape
    O, C = m.shape
    q = np.ascontiguousarray(q_nope)
    out = np.empty((T, H, C), np.float32)
    assert m.how.sum is not None
    pieces = []
    for t in range(T):
        x, y = address(q[t]), address(out[t])
        place = (*m.place, x, q.strides[1], y, out.strides[1], m.steps, N, O // H)
        step = _together(m, H)
        pieces += [partial(m.how.sum, *place, h, min(h + step, H)) for h in range(0, H, step)]
    threads.pool().run(pieces)
    return kernels.restored(m.form, out.reshape(T * H, C)).reshape(T, H, C)


def _by_head(x: np.ndarray, m: KernelMatrix, first: int, count: int, every: int) -> np.ndarray:
    """Return y[t, h] = W[h·every + first …] x[t, h], `count` rows: [T, H, I] → [T, H, count]."""
    T, H, I = x.shape
    x = kernels.ordered(m.form, x.reshape(T * H, I)).reshape(T, H, I)
    out = np.empty((T, H, count), np.float32)
    few, (w, w_row, s, s_row, share) = m.how.few, m.place
    x_at, (x_row, x_head, _) = address(x), x.strides
    y_at, (y_row, y_head, _) = address(out), out.strides

    def heads(begin: int, end: int) -> None:
        for h in range(begin, end):
            row = h * every + first
            at = w + row * w_row, w_row, s + row // share * s_row, s_row, share
            few(*at, x_at + h * x_head, x_row, y_at + h * y_head, y_row, m.steps, T, 0, count)

    step = _together(m, H)
    threads.pool().run([partial(heads, h, min(h + step, H)) for h in range(0, H, step)])
    return out


def _product(w: np.ndarray, e: np.ndarray) -> np.ndarray:
    return e @ w


def _sums(m: KernelMatrix, e: np.ndarray) -> np.ndarray:
    """Return e W for few rows of e, in this thread: [n, S], W [S, C] → [n, C]."""
    assert m.how.sum is not None
    out = np.empty((len(e), m.shape[1]), np.float32)
    places = address(e), e.strides[0], address(out), out.strides[0]
    m.how.sum(*m.place, *places, m.steps, e.shape[1], 0, 0, len(e))
    return kernels.restored(m.form, out)


def _together(m: KernelMatrix, H: int) -> int:
    """Return how many heads a thread takes at a time: all of a small matrix."""
    return H if m.nbytes < 2 * ALONE else max(1, H // 16)


def _attend(
    q_latent: np.ndarray, q_pe: np.ndarray, cache: LatentCache, scale: np.floating
) -> np.ndarray:
    """Return softmax(scale · (q_latent·c_kv + q_pe·k_pe)) c_kv, causal: [T, H, C] → [T, H, C]."""
    T, H, C = q_latent.shape
    S = cache.length
    q, p = q_latent.reshape(T * H, C), np.ascontiguousarray(q_pe).reshape(T * H, -1)
    last = np.repeat(np.arange(S - T, S), H)[:, None]  # a query sees its own position, and before
    count = -(-S // BLOCK)
    most = np.empty((count, T * H, 1), np.float32)
    total = np.empty((count, T * H, 1), np.float32)
    parts = np.empty((count, T * H, C), np.float32)

    matrices = [BF16(a) if cache.bf16 else a for a in cache.stored]
    latents, keys = Inputs(q), Inputs(p)

    def block(i: int) -> None:
        rows = slice(i * BLOCK, min(S, (i + 1) * BLOCK))
        c_kv, k_pe = (matrix.rows(m, rows) for m in matrices)
        latent, rotated = make_kernel_view(c_kv), make_kernel_view(k_pe)
        if T * H <= FEW and latent is not None and rotated is not None:
            # so few rows of queries are tokens to the kernels, and the cache a matrix
            s = (alone(latents, latent) + alone(keys, rotated)) * scale  # [T·H, block]
            add: Callable[[np.ndarray], np.ndarray] = partial(_sums, latent)
        else:
            wide = dequantize(c_kv)
            s = (q @ wide.T + p @ dequantize(k_pe).T) * scale
            add = partial(_product, wide)
        if rows.stop > S - T + 1:
            s = np.where(np.arange(rows.start, rows.stop) <= last, s, -np.inf)
        top = s.max(axis=1, keepdims=True)
        most[i] = np.where(top > -np.inf, top, np.float32(0))
        e = np.exp(s - most[i])
        total[i] = e.sum(axis=1, keepdims=True)
        parts[i] = add(e)

    pieces = [partial(block, i) for i in range(count)]
    with threads.single_blas_thread():
        threads.pool().run(pieces)
    seen = np.where(total > 0, most, -np.inf)
    weight = np.exp(seen - seen.max(axis=0))
    return ((weight * parts).sum(axis=0) / (weight * total).sum(axis=0)).reshape(T, H, C)
