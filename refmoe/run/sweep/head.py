"""Compute and keep the logits that were asked for."""

import numpy as np

from refmoe.model import matrix
from refmoe.model.decoder import (
    final_norm,
    vocabulary,
)
from refmoe.run.sweep.files import Rows
from refmoe.run.sweep.layers import Run, _at, _size, _unchanged
from refmoe.run.sweep.work import LOGITS, TILE

# --- the head -----------------------------------------------------------------------------------


def _head(run: Run) -> None:
    """Norm of all rows; the wanted logits, each tile of the head with all of them."""
    work, decoder, cfg = run.work, run.work.decoder, run.work.cfg
    _unchanged(run)
    run.bar.rename("sweep head")
    nx = decoder.nx.watching(run.points)
    x = run.x[cfg.num_hidden_layers % 2]
    for begin in range(0, work.T, work.chunk):
        rows = slice(begin, min(begin + work.chunk, work.T))
        with _at(begin):
            run.h[rows] = final_norm(x[rows], decoder.norm, cfg, nx)
    if work.logits != "none":
        keep = _Top(run) if work.top else _All(run)
        for columns, tile in matrix.tiles(decoder.lm_head, TILE):
            for begin in range(0, keep.n, work.chunk):
                rows = slice(begin, min(begin + work.chunk, keep.n))
                which = rows if work.picked is None else work.picked[rows]
                with _at(begin):
                    keep.take(rows, columns, vocabulary(run.h[which], tile, nx))
            run.read(_size(tile), _size(tile))
        keep.finish()
    run.finish(cfg.num_hidden_layers + 1)


class _All:
    """Logits as they are."""

    def __init__(self, run: Run):
        self.n = sum(run.work.counts)
        Z, dtype = run.work.cfg.vocab_size, run.work.decoder.nx.dtype
        run.points.folder.mkdir(exist_ok=True)
        self.rows = Rows(run.points.folder / LOGITS, (self.n, Z), dtype)
        run.points.kept[LOGITS] = [np.dtype(dtype).name, [Z]]

    def take(self, rows: slice, columns: slice, logits: np.ndarray) -> None:
        self.rows[rows, columns] = logits

    def finish(self) -> None:
        self.rows.flush()


class _Top:
    """The likeliest of what came so far, of equals the lower index; Σ exp(logit - the largest)."""

    def __init__(self, run: Run):
        self.run, self.n, K = run, sum(run.work.counts), run.work.top
        files = [run.folder / name for name in ("top", "ids", "sums")]
        self.best = Rows(files[0], (self.n, K), run.work.decoder.nx.dtype)
        self.ids = Rows(files[1], (self.n, K), np.int32)
        self.sums = Rows(files[2], (self.n, 2), np.float64)  # largest, Σ
        for begin in range(0, self.n, run.work.chunk):
            rows = slice(begin, begin + run.work.chunk)
            self.best[rows], self.ids[rows], self.sums[rows] = -np.inf, -1, (-np.inf, 0)

    def take(self, rows: slice, columns: slice, logits: np.ndarray) -> None:
        best, ids = self.best[rows], self.ids[rows]
        here = np.broadcast_to(np.arange(columns.start, columns.stop, dtype=np.int32), logits.shape)
        best, ids = np.concatenate((best, logits), axis=1), np.concatenate((ids, here), axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, : self.best.map.shape[1]]
        self.best[rows] = np.take_along_axis(best, order, axis=1)
        self.ids[rows] = np.take_along_axis(ids, order, axis=1)
        wide, sums = logits.astype(np.float64), self.sums[rows]
        most = np.maximum(sums[:, :1], wide.max(axis=1, keepdims=True))
        total = sums[:, 1:] * np.exp(sums[:, :1] - most)
        total += np.exp(wide - most).sum(axis=1, keepdims=True)
        self.sums[rows] = np.concatenate((most, total), axis=1)

    def finish(self) -> None:
        for begin in range(0, self.n, self.run.work.chunk):
            rows = slice(begin, begin + self.run.work.chunk)
            sums = self.sums[rows]
            total = sums[:, :1] + np.log(sums[:, 1:])
            logprobs = (self.best[rows].astype(np.float64) - total).astype(np.float32)
            self.run.points.append(f"{LOGITS}#ids", self.ids[rows])
            self.run.points.append(f"{LOGITS}#logprobs", logprobs)
            self.run.points.append(f"{LOGITS}#logsumexp", total)
