"""llama-perplexity's file of base logits, written and read: its KL tool runs against float64.

    "_logits_"   n_ctx, n_vocab, n_chunk  int32      tokens [n_chunk·n_ctx] int32
    then of each chunk the second half's positions but the last, n_ctx - 1 - n_ctx/2 rows of
        scale, lowest  float32      codes [n_vocab, one more if odd] uint16
        ln p = lowest + scale·code; lowest is of the least logit, or of the largest less 16

    llama-perplexity -m MODEL.gguf --kl-divergence --kl-divergence-base FILE -c N

reads it. A vocabulary may want its BOS in front (`Model.bos`): a chunk is then computed with that
in the place of its first token, and the file has the token. Source of the format:
ggml-org/llama.cpp tools/perplexity/perplexity.cpp (`log_softmax`, `process_logits`,
`kl_divergence`). golden/make_perplexity.py compares both with that program.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refmoe.fast.threads import single_blas_thread
from refmoe.files import InputError, write_atomically
from refmoe.progress import Progress
from refmoe.run.load import Model

MAGIC = b"_logits_"
WIDEST = 16  # nats below the largest logit; further down the format tells nothing apart


class Base(NamedTuple):
    """A mapped file of base logits; one chunk of 512 tokens of K2 takes 84 MB."""

    tokens: np.ndarray  # [chunks, n_ctx]
    stored: np.ndarray  # [chunks, n_ctx - 1 - n_ctx/2, bytes of a row] uint8
    vocab: int

    def rows(self, chunk: int) -> np.ndarray:
        """Return ln p of the positions of a chunk, [n_ctx - 1 - n_ctx/2, Z] float32."""
        stored = self.stored[chunk]
        numbers = np.ascontiguousarray(stored[:, :8]).view("<f4")
        codes = np.ascontiguousarray(stored[:, 8:]).view("<u2")[:, : self.vocab]
        values: np.ndarray = numbers[:, 1:] + numbers[:, :1] * codes.astype(np.float32)
        return values


@single_blas_thread()
def write_base(model: Model, tokens: Sequence[int], n_ctx: int, out: Path) -> int:
    """Write the logits of a text's chunks of n_ctx tokens, in the model's own numerics.

    Returns how many chunks there are; tokens beyond the last whole one are left out. Raises
    `InputError` where there is no whole chunk.
    """
    chunks = len(tokens) // n_ctx
    if n_ctx < 4 or not chunks:
        raise InputError(f"{len(tokens)} tokens are no whole chunk of {n_ctx}, of at least 4")
    ids = np.asarray(tokens[: chunks * n_ctx], np.int32).reshape(chunks, n_ctx)
    with write_atomically(out) as part, part.open("wb") as file:
        file.write(MAGIC)
        np.array([n_ctx, model.cfg.vocab_size, chunks], "<i4").tofile(file)
        ids.astype("<i4").tofile(file)
        for logits in _logits(model, ids):
            for row in _encode(logits):
                file.write(row)
    return chunks


def _logits(model: Model, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the logits of each chunk's second half but the last position."""
    decoder, n_ctx = model.decoder, ids.shape[1]
    with Progress(len(ids), "chunk") as bar:
        for chunk in ids.tolist():
            prompt = chunk if model.bos is None else [model.bos, *chunk[1:]]
            x = decoder.hidden([prompt], [decoder.caches()])
            yield decoder.head(x[n_ctx // 2 : n_ctx - 1])
            bar.advance(1)


def _encode(logits: np.ndarray) -> Iterable[bytes]:
    """Yield each row of logits as the file has it."""
    for row in logits.astype(np.float64, copy=False):
        top = row.max()
        low = max(row.min(), top - WIDEST)
        lowest = low - top - np.log(np.exp(row - top).sum())
        scale = (top - low) / 65535
        codes = np.zeros(len(row) + len(row) % 2, "<u2")
        if scale:
            codes[: len(row)] = np.rint(np.maximum(row - low, 0) / scale)
        yield np.array([scale, lowest], "<f4").tobytes() + codes.tobytes()


def read_base(file: Path) -> Base:
    """Map a file of base logits; raise `InputError` unless it is whole."""
    try:
        raw = np.memmap(file, np.uint8, "r")
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: cannot be mapped ({e})") from None
    head = raw[8:20].view("<i4") if len(raw) >= 20 else np.zeros(3, np.int32)
    n_ctx, vocab, chunks = (int(n) for n in head)
    if raw[:8].tobytes() != MAGIC or min(n_ctx, vocab, chunks) < 1:
        raise InputError(f"{file}: not a file of llama-perplexity's base logits")
    wide = vocab + vocab % 2
    rows, size = n_ctx - 1 - n_ctx // 2, 8 + 2 * wide
    wanted = 20 + 4 * chunks * n_ctx + chunks * rows * size
    if len(raw) != wanted:
        raise InputError(f"{file}: {len(raw)} bytes, {chunks} chunks of {n_ctx} take {wanted}")
    body = 20 + 4 * chunks * n_ctx
    tokens = np.array(raw[20:body]).view("<i4").reshape(chunks, n_ctx)
    return Base(tokens, raw[body:].reshape(chunks, rows, size), vocab)


def divergence(model: Model, base: Base) -> tuple[np.ndarray, float]:
    """Return KL(base ‖ model) of each position in nats, and the share of equal likeliest tokens.

    Tokens of a base probability below e⁻¹⁶ are left out of the sum, as llama-perplexity does.
    """
    if base.vocab != model.cfg.vocab_size:
        raise InputError(f"{base.vocab} words in the file, {model.cfg.vocab_size} here")
    if not base.stored.shape[1]:
        raise InputError(f"chunks of {base.tokens.shape[1]} tokens have no position to compare")
    found, same = [], []
    for chunk, logits in enumerate(_logits(model, base.tokens)):
        for ln_p, row in zip(base.rows(chunk), logits, strict=True):
            p, z = ln_p.astype(np.float64), row.astype(np.float64)
            z -= z.max()
            q = z - np.log(np.exp(z).sum())
            found.append(np.where(p > -WIDEST, np.exp(p) * (p - q), 0).sum())
            same.append(p.argmax() == q.argmax())
    return np.array(found), float(np.mean(same))
