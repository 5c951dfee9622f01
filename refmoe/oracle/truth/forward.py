"""Run forward passes side by side, layer by layer, and keep what a truth file holds.

`Seen` is the watcher that keeps it, `forward` the loop over layers: every weight is read once for
the exact pass and all emulated ones.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from refmoe.model.cache import LatentCache
from refmoe.model.decoder import (
    Decoder,
    add_mlp,
    attend,
    embed,
    mix,
    mlp_input,
)
from refmoe.model.experts import ExpertsFrom, MoeWeights, add_shared_expert
from refmoe.model.matrix import dequantize
from refmoe.model.mla import Segment
from refmoe.model.router import GateWeights, Routing, limit_groups, route, sigmoid
from refmoe.oracle.trace import sketch
from refmoe.oracle.truth.layout import BLOCK, LOGITS, REFUSED, SMALL, TOTAL, WIDTH, Values

ENDS = (".self_attn", ".mlp", ".mlp.gate", ".gate#experts", ".gate#weights")


class Seen:
    """A watcher that keeps of each point what a truth keeps of it.

    truth  for an emulated pass, what the exact one has seen, which is a layer ahead: scores and
           log-probabilities are then kept for the experts and tokens of that one, and the rows may
           be those of several runs
    tick   is called after each layer
    """

    def __init__(
        self, decoder: Decoder, top: int, tick: Callable[[], None], truth: "Seen | None" = None
    ):
        self.decoder, self.cfg, self.top = decoder, decoder.cfg, top
        self.tick, self.truth = tick, truth
        self.gate: GateWeights | None = None  # of the layer at work
        self.rows = 0  # of the head so far
        self.parts: dict[str, list[np.ndarray]] = {}

    def value(self, name: str) -> np.ndarray:
        """Return all rows of one name."""
        return np.concatenate(self.parts[name])

    def values(self) -> Values:
        """Return all rows of everything that was kept."""
        return {name: self.value(name) for name in self.parts}

    def wants(self, path: str) -> bool:
        """Tell whether a truth keeps anything of this point."""
        if not path.startswith("model.layers."):
            return path in (LOGITS, "model.norm")
        return path.endswith(ENDS) or (path.count(".") == 2 and "#" not in path)

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        if self.wants(path):
            for name, kept in self.kept(path, x):
                self.parts.setdefault(name, []).append(kept)
            if path.count(".") == 2:
                self.tick()
        return x

    def kept(self, path: str, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield name and rows of what is kept of a point."""
        if path == LOGITS:
            yield from self.logits(x)
        elif path.endswith(".gate"):
            yield from self.scores(path, x)
        elif path.startswith("model.layers.") and "gate#" not in path:
            yield path, sketch(path, x)[:, : width(path)]
        elif self.truth is not None or not path.endswith("#experts"):
            yield path, x.copy()

    def scores(self, path: str, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the experts with the best scores, these scores, and the groups' margin."""
        assert self.gate is not None
        score = sigmoid(x) + dequantize(self.gate.e_score_correction_bias, x.dtype)
        score, groups = limit_groups(score, self.cfg, self.decoder.nx)
        if self.truth is not None:
            ids = self.truth.value(path + "#experts")
            ids = np.tile(ids, (len(x) // len(ids), 1))
        else:
            seen = min(self.cfg.num_experts_per_tok + REFUSED, score.shape[1])
            ids = np.argsort(-score, axis=-1, kind="stable")[:, :seen]
            yield path + "#experts", ids
            yield path + "#groups", groups
        yield path + "#scores", np.take_along_axis(score, ids, axis=-1)

    def logits(self, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the likeliest tokens, their log-probabilities, and logsumexp."""
        if self.truth is not None:
            known = self.truth.value("lm_head#ids")
            ids = known[np.arange(self.rows, self.rows + len(x)) % len(known)]
            self.rows += len(x)
        else:
            ids = np.stack([np.argsort(-row, kind="stable")[: self.top] for row in x])
            yield "lm_head#ids", ids
        x = x.astype(np.float64)
        total = logsumexp(x)
        yield LOGITS, np.take_along_axis(x, ids, axis=-1) - total
        yield TOTAL, total


def width(path: str) -> int:
    """Return how many numbers of a point's sketch are kept."""
    return SMALL if path.endswith((".self_attn", ".mlp")) else WIDTH


def logsumexp(x: np.ndarray) -> np.ndarray:
    """Return ln Σ exp x of each row, [T, Z] → [T, 1]."""
    most = x.max(axis=-1, keepdims=True)
    out: np.ndarray = np.log(np.exp(x - most).sum(axis=-1, keepdims=True)) + most
    return out


class Pass(NamedTuple):
    """A forward pass: how it computes, of what, and what is kept of it."""

    decoder: Decoder
    prompts: Sequence[Sequence[int]]
    seen: Seen


def forward(passes: Sequence[Pass]) -> None:
    """All of them at once, layer by layer; the logits in blocks of rows.

    Every weight is asked for once for all passes, and of a layer's experts those that some pass
    chose. Each pass does what it would alone, in that order, whatever the others do.
    """
    first = passes[0].decoder
    with np.errstate(over="ignore", invalid="ignore"):  # points name what is not finite
        rows = [_embedded(p) for p in passes]
        for i in range(first.cfg.num_hidden_layers):
            rows = _layer(i, passes, rows)
        step = max(1, BLOCK // first.cfg.vocab_size)
        for p, x in zip(passes, rows, strict=True):
            for start in range(0, len(x), step):
                p.decoder.head(x[start : start + step])


def _embedded(p: Pass) -> np.ndarray:
    ids = np.concatenate([np.asarray(tokens, np.intp) for tokens in p.prompts])
    return embed(ids, p.decoder.embed_tokens, p.decoder.nx)


def _layer(i: int, passes: Sequence[Pass], rows: list[np.ndarray]) -> list[np.ndarray]:
    """Layer i of all passes: x [T, D] of each → x' [T, D]."""
    first = passes[0].decoder
    cfg, w, experts = first.cfg, first.layers[i], first.experts[i]
    scopes = [p.decoder.nx.within(f"model.layers.{i}.") for p in passes]
    h, inputs, choices = [], [], []
    for p, x, nx in zip(passes, rows, scopes, strict=True):
        h.append(attend(x, w, list(_segments(p)), cfg, nx))
        if isinstance(w.mlp, MoeWeights):
            p.seen.gate = w.mlp.gate
            inputs.append(mlp_input(h[-1], w, cfg, nx))
            choices.append(route(inputs[-1], w.mlp.gate, cfg, nx.within("mlp.")))
    if not isinstance(w.mlp, MoeWeights):
        return [mix(x, w, experts, cfg, nx) for x, nx in zip(h, scopes, strict=True)]
    sums = [np.zeros_like(x) for x in inputs]
    chosen = np.unique(np.concatenate([c.experts.reshape(-1) for c in choices])).tolist()
    nothing = np.zeros((0, cfg.hidden_size), inputs[0].dtype)  # to guess other layers' by
    for batch in experts.batches(chosen, nothing):
        here = ExpertsFrom(batch.__getitem__, experts.streamed)
        for e in batch:
            for x, choice, y, nx in zip(inputs, choices, sums, scopes, strict=True):
                own, slots = np.nonzero(choice.experts == e)
                if len(own):
                    weights = choice.weights[own, slots][:, None]
                    one = Routing(np.full_like(weights, e, np.intp), weights, *choice[2:])
                    y[own] += nx.experts(x[own], one, here, nx.within("mlp."))
    out = []
    for x, inside, y, nx in zip(h, inputs, sums, scopes, strict=True):
        mlp = nx.within("mlp.")
        y = add_shared_expert(inside, mlp.point("experts", y), w.mlp, mlp)
        out.append(add_mlp(x, y, nx))
    return out


def _segments(p: Pass) -> Iterator[Segment]:
    """The prompts' rows, and a memory that is this layer's alone."""
    start, nx = 0, p.decoder.nx
    for tokens in p.prompts:
        rows = slice(start, start + len(tokens))
        yield Segment(rows, LatentCache(p.decoder.cfg, nx.dtype, p.decoder.cache_options.bf16))
        start = rows.stop
