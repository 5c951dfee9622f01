"""llama-perplexity's file of base logits: written, so that its KL tool runs against float64; read.

    "_logits_"   n_ctx, n_vocab, n_chunk  int32      tokens [n_chunk·n_ctx] int32
    then of each chunk the second half's positions but the last, n_ctx - 1 - n_ctx/2 rows of
        scale, lowest  float32      codes [n_vocab, one more if odd] uint16
        ln p = lowest + scale·code; lowest is of the least logit, or of the largest less 16

    llama-perplexity -m MODEL.gguf --kl-divergence --kl-divergence-base FILE -c N

reads it. Source of the format: ggml-org/llama.cpp tools/perplexity/perplexity.cpp (`log_softmax`,
`process_logits`, `kl_divergence`).
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refmoe.config import InputError
from refmoe.run.model import Model

MAGIC = b"_logits_"
WIDEST = 16  # below the largest logit nothing is told apart


class Base(NamedTuple):
    tokens: np.ndarray  # [chunks, n_ctx]
    rows: np.ndarray  # [chunks, n_ctx - 1 - n_ctx/2, Z] ln p, float32


def write_base(model: Model, tokens: Sequence[int], n_ctx: int, out: Path) -> int:
    """The chunks of a text in the model's own numerics → how many. Never half a file."""
    chunks = len(tokens) // n_ctx
    if n_ctx < 4 or not chunks:
        raise InputError(f"{len(tokens)} tokens are no whole chunk of {n_ctx}, of at least 4")
    ids = np.asarray(tokens[: chunks * n_ctx], np.int32).reshape(chunks, n_ctx)
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(MAGIC)
            np.array([n_ctx, model.cfg.vocab_size, chunks], "<i4").tofile(file)
            ids.astype("<i4").tofile(file)
            for chunk in ids.tolist():
                for row in _encoded(model.logits(chunk)[n_ctx // 2 : n_ctx - 1]):
                    file.write(row)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return chunks


def _encoded(logits: np.ndarray) -> Iterator[bytes]:
    for row in logits.astype(np.float64):
        top = row.max()
        low = max(row.min(), top - WIDEST)
        lowest = low - top - np.log(np.exp(row - top).sum())
        scale = (top - low) / 65535
        codes = np.zeros(len(row) + len(row) % 2, "<u2")
        if scale:
            codes[: len(row)] = np.rint(np.maximum(row - low, 0) / scale)
        yield np.array([scale, lowest], "<f4").tobytes() + codes.tobytes()


def read_base(file: Path) -> Base:
    """`InputError` unless the file is whole."""
    raw = file.read_bytes()
    head = np.frombuffer(raw, "<i4", 3, 8) if len(raw) >= 20 else np.zeros(3, np.int32)
    n_ctx, vocab, chunks = (int(n) for n in head)
    if raw[:8] != MAGIC or min(n_ctx, vocab, chunks) < 1:
        raise InputError(f"{file}: not a file of llama-perplexity's base logits")
    wide = vocab + vocab % 2
    rows, size = n_ctx - 1 - n_ctx // 2, 8 + 2 * wide
    wanted = 20 + 4 * chunks * n_ctx + chunks * rows * size
    if len(raw) != wanted:
        raise InputError(f"{file}: {len(raw)} bytes, {chunks} chunks of {n_ctx} take {wanted}")
    tokens = np.frombuffer(raw, "<i4", chunks * n_ctx, 20).reshape(chunks, n_ctx)
    body = np.frombuffer(raw, np.uint8, offset=20 + tokens.nbytes).reshape(-1, size)
    numbers = np.ascontiguousarray(body[:, :8]).view("<f4")
    codes = np.ascontiguousarray(body[:, 8:]).view("<u2")[:, :vocab]
    values = numbers[:, 1:] + numbers[:, :1] * codes.astype(np.float32)
    return Base(tokens, values.reshape(chunks, rows, vocab))


def divergence(model: Model, base: Base) -> tuple[np.ndarray, float]:
    """KL(base ‖ model) of each position in nats, and the share whose likeliest token is the same.

    As llama-perplexity sums it: without tokens of a base probability below e⁻¹⁶.
    """
    if base.rows.shape[2] != model.cfg.vocab_size:
        raise InputError(f"{base.rows.shape[2]} words in the file, {model.cfg.vocab_size} here")
    found, same = [], []
    for chunk, p in zip(base.tokens.tolist(), base.rows.astype(np.float64), strict=True):
        n_ctx = len(chunk)
        logits = model.logits(chunk)[n_ctx // 2 : n_ctx - 1].astype(np.float64)
        top = logits.max(axis=-1, keepdims=True)
        q = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        found.append(np.where(p > -WIDEST, np.exp(p) * (p - q), 0).sum(axis=-1))
        same.append(p.argmax(axis=-1) == q.argmax(axis=-1))
    return np.concatenate(found), float(np.concatenate(same).mean())
