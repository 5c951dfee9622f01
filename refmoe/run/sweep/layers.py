"""Take the rows of a sweep, which lie in files, through one layer, chunk by chunk."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from refmoe.model.cache import LatentCache
from refmoe.model.decoder import LayerWeights, attend, embed, mix, mlp_input
from refmoe.model.experts import Experts, MlpWeights, MoeWeights
from refmoe.model.mla import Segment
from refmoe.model.numerics import Numerics
from refmoe.model.router import route
from refmoe.run.layerwise import finish_rows, run_layer, weigh_experts
from refmoe.run.sweep.files import Rows
from refmoe.run.sweep.plan import Piece
from refmoe.run.sweep.run import Run, count_rows_from, size_of

BLOCK = 1 << 16  # rows of the choice that are looked through at once: some MB of indices

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # experts, rows and slots, [n] each


def embed_rows(run: Run) -> None:
    """Compute the embedding of all rows, unless that is done."""
    if run.state["done"] >= 0:
        return
    plan, nx = run.plan, run.plan.decoder.nx.watching(run.points)
    for begin in range(0, plan.T, plan.chunk):
        with count_rows_from(begin):
            ids = plan.ids[begin : begin + plan.chunk]
            run.x[0][begin : begin + plan.chunk] = embed(ids, plan.decoder.embed_tokens, nx)
    run.x[0].flush()
    run.finish(0)


def sweep_layer(run: Run, i: int) -> None:
    """Take all rows through layer i. Raises `InputError` if the checkpoint has changed."""
    run.check_checkpoint()
    layers = run.plan.cfg.num_hidden_layers
    run.bar.rename(f"sweep layer {i} of {layers}")
    new = run.x[(i + 1) % 2]
    run_layer(i, run.plan.decoder, [FileGroup(run, run.x[i % 2], new)])
    new.flush()
    run.finish(i + 1)


class FileGroup:
    """A sweep's rows during one layer: its input and its output lie in files."""

    def __init__(self, run: Run, old: Rows, new: Rows):
        self.run, self.old, self.new = run, old, new
        self.caches: dict[int, LatentCache] = {}  # of prompts that are not yet through
        self.expected = run.expected  # bytes of experts that the bar still counts on

    def begin_layer(self, i: int, w: LayerWeights) -> None:
        run, nx = self.run, self._numerics(i)
        run.count_read(size_of(w), size_of(w))
        for pieces in run.plan.chunks:
            with count_rows_from(pieces[0].begin):
                self._first_half(i, pieces, w, nx)
        if isinstance(w.mlp, MoeWeights):
            for begin in range(0, len(self.new), run.plan.chunk):
                self.new[begin : begin + run.plan.chunk] = 0

    def _first_half(self, i: int, pieces: list[Piece], w: LayerWeights, nx: Numerics) -> None:
        """Compute the first half of a chunk, and its choice."""
        run, cfg, start = self.run, self.run.plan.cfg, pieces[0].begin
        rows = slice(start, pieces[-1].end)
        for p in pieces:
            if p.first:
                bf16 = run.plan.decoder.cache_options.bf16
                self.caches[p.prompt] = LatentCache(cfg, nx.dtype, bf16)
        segments = [
            Segment(slice(p.begin - start, p.end - start), self.caches[p.prompt]) for p in pieces
        ]
        h = attend(self.old[rows], w, segments, cfg, nx)
        run.h[rows] = self._fetch(h)
        for p in pieces:
            if p.last:
                del self.caches[p.prompt]
        if isinstance(w.mlp, MoeWeights):
            routing = route(mlp_input(h, w, cfg, nx), w.mlp.gate, cfg, nx.within("mlp."))
            run.chosen[rows], run.weight[rows] = routing.experts, routing.weights
            at = f"model.layers.{i}.mlp.gate"
            run.points.append(f"{at}#margin", routing.margin)
            if cfg.n_group != cfg.topk_group:
                run.points.append(f"{at}#group_margin", routing.group_margin)

    def chosen_experts(self) -> Sequence[int]:
        seen = np.zeros(self.run.plan.cfg.n_routed_experts, bool)
        for begin in range(0, len(self.run.chosen), BLOCK):
            seen[self.run.chosen[begin : begin + BLOCK]] = True
        chosen: list[int] = np.flatnonzero(seen).tolist()
        return chosen

    def add_experts(
        self, i: int, w: LayerWeights, batch: Mapping[int, MlpWeights], streamed: bool
    ) -> None:
        run, nx, y = self.run, self._numerics(i), self.new
        size = size_of(tuple(batch.values()))
        run.count_read(size, min(size, self.expected))
        self.expected -= min(size, self.expected)
        with count_rows_from(0):
            for which, rows, slots in pair_rows(run.chosen, list(batch), run.plan.chunk):
                run.points.rows = rows
                x = mlp_input(run.h[rows], w, run.plan.cfg, nx.watching(None))  # shown already
                weights = run.weight[rows, slots]
                part = weigh_experts(x, which, weights, batch, streamed, nx)
                for e in np.unique(which):
                    own = which == e
                    y[rows[own]] = y[rows[own]] + part[own]

    def finish_layer(self, i: int, w: LayerWeights, experts: Experts) -> None:
        run, nx, cfg = self.run, self._numerics(i), self.run.plan.cfg
        mixture = isinstance(w.mlp, MoeWeights)
        run.bar.total -= self.expected if mixture else 0
        for pieces in run.plan.chunks:
            rows = slice(pieces[0].begin, pieces[-1].end)
            with count_rows_from(rows.start):
                h = run.h[rows]
                if mixture:
                    x = mlp_input(h, w, cfg, nx.watching(None))  # shown already
                    out = finish_rows(h, x, self.new[rows], w, nx)
                else:
                    out = mix(h, w, experts, cfg, nx)
                self.new[rows] = self._fetch(out)

    def _numerics(self, i: int) -> Numerics:
        nx = self.run.plan.decoder.nx.within(f"model.layers.{i}.")
        return nx.watching(self.run.points)

    def _fetch(self, x: np.ndarray) -> np.ndarray:
        """Return x in the processor's memory."""
        card = self.run.plan.model.card
        return x if card is None else card.bring(x, None)


def pair_rows(chosen: Rows, experts: Sequence[int], most: int) -> Iterator[Pairs]:
    """Yield the rows that chose these experts, in order of the experts and then of the rows.

    At most `most` come at once. Where the rows of an expert are cut depends on `most` alone, not
    on which experts are together, so that neither does any bit.
    """
    parts: list[Pairs] = []
    count = 0
    for e in experts:
        for rows, slots in _rows_of_expert(chosen, e, most):
            if parts and count + len(rows) > most:
                yield _join(parts)
                parts, count = [], 0
            parts.append((np.full(len(rows), e), rows, slots))
            count += len(rows)
    if parts:
        yield _join(parts)


def _rows_of_expert(chosen: Rows, e: int, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows that chose an expert and in which slot, `most` at a time until the last."""
    rows, slots = np.zeros(0, np.intp), np.zeros(0, np.intp)
    for begin in range(0, len(chosen), BLOCK):
        more, where = np.nonzero(chosen[begin : begin + BLOCK] == e)
        rows, slots = np.concatenate((rows, more + begin)), np.concatenate((slots, where))
        while len(rows) >= most:
            yield rows[:most], slots[:most]
            rows, slots = rows[most:], slots[most:]
    if len(rows):
        yield rows, slots


def _join(parts: Sequence[Pairs]) -> Pairs:
    which, rows, slots = (np.concatenate(part) for part in zip(*parts, strict=True))
    return which, rows, slots
