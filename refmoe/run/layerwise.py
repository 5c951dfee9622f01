"""The layer-first schedule: take all rows through one layer after another.

    for each layer
        h  = x + attention(norm(x)), choice            rows of each prompt together     [T, D]
        y  = Σ_e g · E_e(norm(h))                      expert by expert                 [T, D]
        x' = h + mlp(norm(h))                          rows in any order                [T, D]

Each layer's weights are asked for once, however many rows there are; of its routed experts those
that some row chose, once each, in index order. An expert that no row chose is never touched.

A *group* is rows that are computed in one numerics, and knows where its rows are kept: in files, in
chunks (`run/sweep`), or in memory (`MemoryGroup`, with which `golden make` takes a prompt through
several numerics at once). `run_layer` is the schedule; the formulas are those of model/.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from refmoe.model.cache import LatentCache
from refmoe.model.decoder import Decoder, LayerWeights, add_mlp, attend, embed, mix, mlp_input
from refmoe.model.experts import Experts, ExpertsFrom, MlpWeights, MoeWeights, add_shared_expert
from refmoe.model.mla import Segment
from refmoe.model.numerics import Numerics
from refmoe.model.router import Routing, route

TOGETHER = 16  # experts of a mapped checkpoint that one call of `nx.experts` may compute at once


class Group(Protocol):
    """Rows that go through the layers; `run_layer` tells them what to do when."""

    def begin_layer(self, i: int, w: LayerWeights) -> None:
        """Compute the first half of layer i and, if it is a mixture, each row's choice."""
        ...

    def chosen_experts(self) -> Sequence[int]:
        """Return the routed experts of this layer that some row chose."""
        ...

    def add_experts(
        self, i: int, w: LayerWeights, batch: Mapping[int, MlpWeights], streamed: bool
    ) -> None:
        """Add the outputs of these experts to the routed sum of the rows that chose them."""
        ...

    def finish_layer(self, i: int, w: LayerWeights, experts: Experts) -> None:
        """Compute the second half of layer i: the rows are then the next layer's input."""
        ...


def run_layer(i: int, decoder: Decoder, groups: Sequence[Group]) -> None:
    """Take every group through layer i of the decoder, whose weights are each asked for once.

    Groups come in their order at each step, so that each does what it would do alone.
    """
    w, experts = decoder.layers[i], decoder.experts[i]
    for group in groups:
        group.begin_layer(i, w)
    if isinstance(w.mlp, MoeWeights):
        chosen = sorted(set().union(*(group.chosen_experts() for group in groups)))
        # no row to guess the next layer's choice from: it may read experts that nobody chooses
        nothing = np.zeros((0, decoder.cfg.hidden_size), decoder.nx.dtype)
        step = max(1, len(chosen) if experts.streamed else TOGETHER)
        for begin in range(0, len(chosen), step):
            for batch in experts.batches(chosen[begin : begin + step], nothing):
                for group in groups:
                    group.add_experts(i, w, batch, experts.streamed)
    for group in groups:
        group.finish_layer(i, w, experts)


def finish_rows(
    h: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    w: LayerWeights,
    nx: Numerics,
) -> np.ndarray:
    """Return the output of a mixture layer [T, D].

    h  the output of its first half, x what the experts were given of it, y the routed sum
    """
    assert isinstance(w.mlp, MoeWeights)
    inside = nx.within("mlp.")
    return add_mlp(h, add_shared_expert(x, inside.point("experts", y), w.mlp, inside), nx)


def weigh_experts(
    x: np.ndarray,
    which: np.ndarray,
    weights: np.ndarray,
    batch: Mapping[int, MlpWeights],
    streamed: bool,
    nx: Numerics,
) -> np.ndarray:
    """Return g · E_e(x) of one expert for each row: x [n, D], which [n], weights [n] → [n, D]."""
    far = np.full(len(x), np.inf)  # margins, which the sum does not look at
    routing = Routing(which[:, None], weights[:, None], far, far)
    experts = ExpertsFrom(batch.__getitem__, streamed)
    return nx.experts(x, routing, experts, nx.within("mlp."))


class MemoryGroup:
    """Rows of whole prompts in memory, all of them computed together."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]]):
        self.decoder, self.prompts = decoder, prompts
        ids = np.concatenate([np.asarray(tokens, np.intp) for tokens in prompts])
        self.x = embed(ids, decoder.embed_tokens, decoder.nx)  # [T, D]; the layer's input
        self.routing: Routing | None = None

    def begin_layer(self, i: int, w: LayerWeights) -> None:
        cfg, nx = self.decoder.cfg, self._numerics(i)
        self.x = attend(self.x, w, list(self._segments()), cfg, nx)
        if isinstance(w.mlp, MoeWeights):
            self.inside = mlp_input(self.x, w, cfg, nx)
            self.routing = route(self.inside, w.mlp.gate, cfg, nx.within("mlp."))
            self.sum = np.zeros_like(self.inside)

    def chosen_experts(self) -> Sequence[int]:
        assert self.routing is not None
        chosen: list[int] = np.unique(self.routing.experts).tolist()
        return chosen

    def add_experts(
        self, i: int, w: LayerWeights, batch: Mapping[int, MlpWeights], streamed: bool
    ) -> None:
        assert self.routing is not None
        nx = self._numerics(i)
        for e in batch:
            rows, slots = np.nonzero(self.routing.experts == e)
            if len(rows):
                which, weights = np.full(len(rows), e, np.intp), self.routing.weights[rows, slots]
                x = self.inside[rows]
                self.sum[rows] += weigh_experts(x, which, weights, batch, streamed, nx)

    def finish_layer(self, i: int, w: LayerWeights, experts: Experts) -> None:
        nx = self._numerics(i)
        if isinstance(w.mlp, MoeWeights):
            self.x = finish_rows(self.x, self.inside, self.sum, w, nx)
        else:
            self.x = mix(self.x, w, experts, self.decoder.cfg, nx)

    def _numerics(self, i: int) -> Numerics:
        return self.decoder.nx.within(f"model.layers.{i}.")

    def _segments(self) -> Iterator[Segment]:
        """Yield the prompts' rows, each with an empty cache that is this layer's alone."""
        start, decoder = 0, self.decoder
        for tokens in self.prompts:
            rows = slice(start, start + len(tokens))
            cache = LatentCache(decoder.cfg, decoder.nx.dtype, decoder.cache_options.bf16)
            yield Segment(rows, cache)
            start = rows.stop
