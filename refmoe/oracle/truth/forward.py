"""Run forward passes side by side, layer by layer, and keep what a truth file holds.

`Seen` is the watcher that keeps it, `forward` the loop over layers: every weight is read once for
the exact pass and all emulated ones.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from refmoe.model.decoder import Decoder, LayerWeights
from refmoe.model.experts import MoeWeights
from refmoe.model.matrix import dequantize
from refmoe.model.router import GateWeights, limit_groups, sigmoid
from refmoe.oracle.trace import sketch
from refmoe.oracle.truth.layout import BLOCK, LOGITS, REFUSED, SMALL, TOTAL, WIDTH, Values
from refmoe.run.layerwise import MemoryGroup, run_layer

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
    """Compute all passes at once, layer by layer, and the logits in blocks of rows.

    Every weight is asked for once for all passes, and of a layer's experts those that some pass
    chose (`run/layerwise.py`). Each pass does what it would alone, whatever the others do.
    """
    first = passes[0].decoder
    with np.errstate(over="ignore", invalid="ignore"):  # points name what is not finite
        groups = [_SeenGroup(p) for p in passes]
        for i in range(first.cfg.num_hidden_layers):
            run_layer(i, first, groups)
        step = max(1, BLOCK // first.cfg.vocab_size)
        for group in groups:
            for start in range(0, len(group.x), step):
                group.decoder.head(group.x[start : start + step])


class _SeenGroup(MemoryGroup):
    """The rows of a pass, whose watcher is told the router of the layer at work."""

    def __init__(self, p: Pass):
        super().__init__(p.decoder, p.prompts)
        self.seen = p.seen

    def begin_layer(self, i: int, w: LayerWeights) -> None:
        if isinstance(w.mlp, MoeWeights):
            self.seen.gate = w.mlp.gate
        super().begin_layer(i, w)
