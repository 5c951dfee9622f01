"""The decoder on another engine's inputs: what we compute, beside what the engine had."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from refmoe.model.decoder import Decoder
from refmoe.model.points import parse
from refmoe.oracle.envelope import Lens
from refmoe.oracle.readers.adapt import fit
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.trace import sketch

TOP = "top log-probabilities"  # what a report calls them
SCORED = ("#scores", "#probs")  # before #context


class Replay:
    """A watcher that notes what we compute and goes on with what the engine had.

    Of a tensor that the dump has in some rows or columns only, these are compared and gone on
    with, and the others are ours. Where single numbers are known (a print of its corners, a sketch,
    top-k log-probabilities), they are compared and the computation goes on with ours.
    """

    def __init__(self, dump: Dump, decoder: Decoder):
        self.dump, self.cfg = dump, decoder.cfg
        self.conventions = decoder.nx.conventions
        self.ours: dict[str, np.ndarray] = {}
        self.theirs: dict[str, np.ndarray] = {}
        self.lenses: dict[str, Lens] = {}
        self.gates: dict[str, np.ndarray] = {}  # our router logits, whether dumped or not
        self.misfits: dict[str, str] = {}  # name → why it cannot be compared
        self.broken: list[str] = []  # choices that name no expert; ours are used instead
        self.order: list[str] = []  # of computation
        self.entering: dict[str, np.ndarray] = {}  # what each layer got, whoever computed it
        self.logits: np.ndarray | None = None  # ours [T, Z]
        self.at: dict[str, np.ndarray] = {}  # positions of the rows compared, where not all are
        self.routed: dict[str, np.ndarray] = {}  # "...experts.E" → positions of its rows

    def wants(self, path: str) -> bool:
        """Tell whether this point is looked at: of scores, [T, H, T], only what the dump has."""
        if not path.endswith(SCORED):
            return True
        return path in self.dump.arrays or path + "#sketch" in self.dump.arrays

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        if path.endswith("#context"):  # of scores that nobody looked at
            at = path.removesuffix("#context")
            self.order += [at + end for end in SCORED if not self.wants(at + end)]
        x = self._go_on(path, x)
        if path == "model.embed_tokens" or path.rpartition(".")[0] == "model.layers":
            self.entering[path] = x
        return x

    def _go_on(self, path: str, x: np.ndarray) -> np.ndarray:
        """Note a point and return what the computation goes on with."""
        self.order.append(path)
        if path.endswith(".mlp.gate"):
            self.gates[path] = x
        if path == "lm_head":
            self.logits = x
        if path == "lm_head" and self.dump.top is not None:
            return self._top(path, x)
        if path + "#sketch" in self.dump.arrays:
            return self._sketched(path, x)
        raw = self.dump.arrays.get(path)
        if path.endswith("#rows"):
            self.routed[path.removesuffix("#rows")] = x
            return x
        if raw is None:
            return x
        rows, columns = self._rows(path, x), self.dump.columns.get(path, slice(None))
        part = x if rows is None else x[rows]
        part = part[:, columns] if x.ndim > 1 else part
        theirs = fit(path, raw, part.shape, self.conventions)
        if theirs is None:
            self.misfits[path] = f"it is {list(raw.shape)}, this point is {list(part.shape)}"
            return x
        if rows is not None:
            self.at[path] = rows
        if path in self.dump.partial:
            return self._partial(path, x, theirs, rows)
        if path.endswith("#scores"):
            return self._scores(path, x, theirs, rows)
        if path.endswith("#experts") and not self._names_experts(path, theirs):
            return x
        if path.endswith("#weights") and path.replace("#weights", "#experts") not in self.theirs:
            return self._weights(path, x, theirs, rows)
        theirs = theirs.astype(x.dtype)
        if part.shape == x.shape:
            self._note(path, x, theirs, Lens(lambda full: full, True))
            return theirs
        kept = np.arange(len(x)) if rows is None else rows

        def look(full: np.ndarray) -> np.ndarray:
            return full[kept][:, columns]

        known = np.zeros(x.shape[:2], bool)
        known[np.ix_(kept, np.arange(x.shape[1])[columns])] = True
        known = known.reshape(*known.shape, *(1,) * (x.ndim - 2))
        key = f"{kept.tolist()} {columns}"
        lens = Lens(look, True, key=key, known=known, narrow=part.shape[1:] != x.shape[1:])
        self._note(path, x, theirs, lens)
        out = x.copy()
        out[np.ix_(kept, np.arange(x.shape[1])[columns])] = theirs
        return out

    def _rows(self, path: str, x: np.ndarray) -> np.ndarray | None:
        """Return which rows of this point the dump has; None for all.

        The rows of an expert are those of the dump's positions that chose it.
        """
        rows = self.dump.rows.get(path)
        if rows is None or parse(path).expert is None:
            return rows
        return np.flatnonzero(np.isin(self.routed[path.rpartition(".")[0]], rows))

    def positions(self, path: str) -> np.ndarray:
        """Return the positions of the rows of a point that are compared."""
        at = self.at.get(path)
        return np.arange(len(self.theirs[path])) if at is None else at

    def _note(self, path: str, ours: np.ndarray, theirs: np.ndarray, lens: Lens) -> None:
        """Keep what the lens sees of ours, and the engine's counterpart."""
        self.ours[path], self.theirs[path], self.lenses[path] = lens.look(ours), theirs, lens

    def _names_experts(self, path: str, theirs: np.ndarray) -> bool:
        """Tell whether every choice is an expert's index; note it as broken if not."""
        inside = (theirs >= 0) & (theirs < self.cfg.n_routed_experts) & (theirs % 1 == 0)
        if inside.all():
            return True
        row = int(np.argwhere(~inside)[0][0])
        self.misfits[path] = f"token {row} chose {theirs[row].tolist()}, no expert's index"
        self.broken.append(path)
        return False

    def _scores(
        self, path: str, x: np.ndarray, theirs: np.ndarray, rows: np.ndarray | None
    ) -> np.ndarray:
        """Compare scores where a token sees; what an engine writes where it masks is its own."""
        kept = np.arange(len(x)) if rows is None else rows
        seen = np.tri(len(x), dtype=bool)[kept, None]
        shown = np.where(seen, theirs, 0).astype(x.dtype)
        known = None
        if rows is not None:
            known = np.isin(np.arange(len(x)), rows)[:, None, None]
        key = "" if rows is None else f"{rows.tolist()}"
        lens = Lens(lambda full: np.where(seen, full[kept], 0), True, key=key, known=known)
        self._note(path, x, shown, lens)
        out = x.copy()
        out[kept] = np.where(seen | np.isfinite(theirs), theirs, x[kept])
        return out

    def _weights(
        self, path: str, x: np.ndarray, theirs: np.ndarray, rows: np.ndarray | None
    ) -> np.ndarray:
        """Compare the sizes of weights whose experts the dump lacks; go on with ours.

        Engines order a token's experts as they like, so that nothing tells whose weight is whose.
        """
        kept = np.arange(len(x)) if rows is None else rows
        key = f"sorted {kept.tolist()}"
        lens = Lens(lambda full: np.sort(full[kept], axis=1), False, key=key)
        self._note(path, x, np.sort(theirs.astype(x.dtype), axis=1), lens)
        return x

    def _partial(
        self, path: str, x: np.ndarray, theirs: np.ndarray, at: np.ndarray | None
    ) -> np.ndarray:
        """Compare the numbers that are known, in the rows that have any; go on with ours."""
        known = ~np.isnan(theirs)
        rows = known.reshape(len(known), -1).any(axis=1)
        if not rows.any() or x.dtype.kind != "f":
            self.misfits[path] = "none of its numbers is known"
            return x
        at = np.arange(len(x)) if at is None else at

        def look(full: np.ndarray) -> np.ndarray:
            return np.where(known, full[at], 0)[rows]

        key = hashlib.sha256(np.packbits(known).tobytes() + at.tobytes()).hexdigest()
        lens = Lens(look, False, self.dump.step, key)
        self.at[path] = at[rows]
        self._note(path, x, np.where(known, theirs, 0)[rows], lens)
        return x

    def _sketched(self, path: str, x: np.ndarray) -> np.ndarray:
        """Compare sketches; go on with ours."""
        theirs = self.dump.arrays[path + "#sketch"]
        lens = Lens(lambda full: sketch(path, full), False, key="sketch")
        if theirs.shape == lens.look(x).shape:
            self._note(path, x, theirs.astype(x.dtype), lens)
        else:
            self.misfits[path] = f"its sketch is {list(theirs.shape)} for {len(x)} tokens"
        return x

    def _top(self, path: str, x: np.ndarray) -> np.ndarray:
        """Compare log-probabilities of the tokens that the engine lists; go on with ours."""
        assert self.dump.top is not None
        ids, theirs = self.dump.top
        if len(ids) != len(x) or ids.max(initial=-1) >= self.cfg.vocab_size:
            self.misfits[TOP] = f"of {len(ids)} positions for {len(x)} tokens, or of other words"
            return x
        known = (ids >= 0) & np.isfinite(theirs)
        rows = known.any(axis=1)

        def look(logits: np.ndarray) -> np.ndarray:
            most = logits.max(axis=-1, keepdims=True)
            total = np.log(np.exp(logits - most).sum(axis=-1, keepdims=True)) + most
            return np.where(known, np.take_along_axis(logits, ids, axis=-1) - total, 0)[rows]

        if not rows.any():
            self.misfits[TOP] = "no position has any"
        else:
            self.at[path] = np.flatnonzero(rows)
            key = hashlib.sha256(ids.tobytes()).hexdigest()
            lens = Lens(look, False, self.dump.step, key)
            self._note(path, x, np.where(known, theirs, 0)[rows], lens)
        return x

    def with_logits_seen(self, lens: Lens, theirs: np.ndarray, at: np.ndarray) -> "Replay":
        """Return this replay with another view of lm_head; `at` are the positions of its rows."""
        assert self.logits is not None
        path = "lm_head"
        seen = copy.copy(self)
        seen.ours = self.ours | {path: lens.look(self.logits)}
        seen.theirs = self.theirs | {path: theirs}
        seen.lenses = self.lenses | {path: lens}
        seen.at = self.at | {path: at}
        return seen


def replay(dump: Dump, decoder: Decoder, tokens: Sequence[int]) -> Replay:
    """Run this decoder, or one with a fault, on the engine's own inputs."""
    seen = Replay(dump, decoder)
    watched = decoder.nx.watching(seen)
    decoder.using(replace(watched, stop_at_nonfinite=False)).logits(tokens)
    return seen
