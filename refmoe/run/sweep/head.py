"""Compute the logits that were asked for, tile by tile of the head, and keep them."""

import numpy as np

from refmoe.model import matrix
from refmoe.model.decoder import final_norm, vocabulary
from refmoe.run.sweep.files import Rows
from refmoe.run.sweep.plan import LOGITS
from refmoe.run.sweep.run import Run, count_rows_from, size_of

TILE = 1 << 22  # elements of a tile of the head: 16 MB of it are wide at once


def sweep_head(run: Run) -> None:
    """Compute the last norm of all rows, and the wanted logits, each tile with all rows."""
    plan, decoder, cfg = run.plan, run.plan.decoder, run.plan.cfg
    run.check_checkpoint()
    run.bar.rename("sweep head")
    nx = decoder.nx.watching(run.points)
    x = run.x[cfg.num_hidden_layers % 2]
    for begin in range(0, plan.T, plan.chunk):
        rows = slice(begin, min(begin + plan.chunk, plan.T))
        with count_rows_from(begin):
            run.h[rows] = final_norm(x[rows], decoder.norm, cfg, nx)
    if plan.logits != "none":
        keep = _Top(run) if plan.top else _All(run)
        for columns, tile in matrix.tiles(decoder.lm_head, TILE):
            for begin in range(0, keep.n, plan.chunk):
                rows = slice(begin, min(begin + plan.chunk, keep.n))
                which = rows if plan.picked is None else plan.picked[rows]
                with count_rows_from(begin):
                    keep.take(rows, columns, vocabulary(run.h[which], tile, nx))
            run.count_read(size_of(tile), size_of(tile))
        keep.finish()
    run.finish(cfg.num_hidden_layers + 1)


class _All:
    """Keeps logits as they are."""

    def __init__(self, run: Run):
        self.n = sum(run.plan.counts)
        Z, dtype = run.plan.cfg.vocab_size, run.plan.decoder.nx.dtype
        run.points.folder.mkdir(exist_ok=True)
        self.rows = Rows(run.points.folder / LOGITS, (self.n, Z), dtype)
        run.points.kept[LOGITS] = [np.dtype(dtype).name, [Z]]

    def take(self, rows: slice, columns: slice, logits: np.ndarray) -> None:
        """Keep a tile's logits of some rows."""
        self.rows[rows, columns] = logits

    def finish(self) -> None:
        """Wait until all logits are on the disk."""
        self.rows.flush()


class _Top:
    """Keeps the likeliest tokens of the tiles so far, and Σ exp(logit - the largest).

    Of equal logits the lower id counts as likelier.
    """

    def __init__(self, run: Run):
        self.run, self.n, K = run, sum(run.plan.counts), run.plan.top
        files = [run.folder / name for name in ("top", "ids", "sums")]
        self.best = Rows(files[0], (self.n, K), run.plan.decoder.nx.dtype)
        self.ids = Rows(files[1], (self.n, K), np.int32)
        self.sums = Rows(files[2], (self.n, 2), np.float64)  # largest, Σ
        for begin in range(0, self.n, run.plan.chunk):
            rows = slice(begin, begin + run.plan.chunk)
            self.best[rows], self.ids[rows], self.sums[rows] = -np.inf, -1, (-np.inf, 0)

    def take(self, rows: slice, columns: slice, logits: np.ndarray) -> None:
        """Take a tile's logits of some rows into account."""
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
        """Write the likeliest tokens, their log-probabilities and the log of the sum."""
        for begin in range(0, self.n, self.run.plan.chunk):
            rows = slice(begin, begin + self.run.plan.chunk)
            sums = self.sums[rows]
            total = sums[:, :1] + np.log(sums[:, 1:])
            logprobs = (self.best[rows].astype(np.float64) - total).astype(np.float32)
            self.run.points.append(f"{LOGITS}#ids", self.ids[rows])
            self.run.points.append(f"{LOGITS}#logprobs", logprobs)
            self.run.points.append(f"{LOGITS}#logsumexp", total)
