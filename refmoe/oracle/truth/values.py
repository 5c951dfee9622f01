"""Read from a dump what a truth file keeps of each point."""

from dataclasses import replace

import numpy as np

from refmoe.files import InputError
from refmoe.oracle.forms.shapes import split_axes
from refmoe.oracle.readers.adapt import adapt, fit
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.readers.logprobs import settle_dump
from refmoe.oracle.replay import TOP
from refmoe.oracle.trace import sketch
from refmoe.oracle.truth.file import Truth
from refmoe.oracle.truth.forward import logsumexp
from refmoe.oracle.truth.layout import LOGITS, TOTAL, WIDTH, Values, judged_points, ladder


class DumpValues:
    """A dump beside a truth of its tokens: ours, theirs, and what cannot be compared.

    Raises `InputError` where the dump is of other tokens than the truth, or than the first of them.
    """

    def __init__(self, truth: Truth, dump: Dump):
        self.truth, self.cfg = truth, truth.cfg
        if dump.listing is not None:
            dump = _settled(truth, dump)
        self.dump = replace(dump, arrays=adapt(dump.arrays, truth.cfg))
        self.T = len(truth.tokens) if dump.tokens is None else len(dump.tokens)
        if dump.tokens is not None and list(dump.tokens) != truth.tokens[: self.T]:
            raise InputError(
                f"{dump.path} is of other tokens than {truth.path}; "
                "expected the same, or the first of them"
            )
        self.ours = truth.values(self.T)
        self.misfits: dict[str, str] = {}  # point → why it cannot be compared
        self.suspects: dict[str, str] = {}  # point → what is wrong with it before any comparison
        self.rungs = [truth.top]  # numbers of likeliest tokens to judge together
        self.theirs = self._read()

    def unfitted(self) -> dict[str, str]:
        """Return the points of the dump that a truth keeps and that were not compared, and why."""
        kept = {p.partition("#top")[0] for p in judged_points(self.cfg, self.truth.top)}
        unread = {n: why for n, why in self.dump.unread.items() if n in kept}
        return {**unread, **self.misfits}

    def _read(self) -> Values:
        out: Values = {}
        for path in judged_points(self.cfg, self.truth.top):
            x = self._point(path) if not path.startswith(LOGITS) else None
            if x is not None:
                out[path] = x
        if self.dump.top is None:
            out |= self._logits()
        elif self.dump.logits or self.dump.sampled:
            what = "of after sampling" if self.dump.sampled else "logits"
            self.misfits[TOP] = f"they are {what}; a truth can judge log-probabilities alone"
        else:
            out |= self._top_logprobs()
        for path in [p for p, x in out.items() if not p.startswith(LOGITS)]:
            if not np.isfinite(out[path]).all():
                self.suspects[path] = "not finite"
                del out[path]
        return out

    def _point(self, path: str) -> np.ndarray | None:
        """Return the engine's values of a point as a truth keeps them, or None."""
        sketched, raw = self.dump.arrays.get(path + "#sketch"), self.dump.arrays.get(path)
        width = self.ours[path].shape[1]
        if "gate#" not in path and path != "model.norm" and sketched is not None:
            if sketched.shape == (self.T, WIDTH):
                return sketched[:, :width].astype(np.float64)
            self.misfits[path] = f"its sketch is {list(sketched.shape)} for {self.T} tokens"
        if raw is None or sketched is not None:
            return None
        if path in self.dump.partial:
            self.misfits[path] = "known in part; a truth has no more than a sketch of it"
            return None
        columns = self.cfg.num_experts_per_tok if "gate#" in path else self.cfg.hidden_size
        x = fit(path, raw, (self.T, columns), self.truth.conventions)
        if x is None:
            shape = [self.T, columns]
            self.misfits[path] = f"it is {list(raw.shape)}, this point is {shape}"
        elif path.endswith("#experts"):
            return self._choices(path, x)
        elif "gate#" in path or path == "model.norm":
            x = x.astype(np.float64)
        elif np.isfinite(x).all():
            x = sketch(path, x)[:, :width]
        return x

    def _choices(self, path: str, x: np.ndarray) -> np.ndarray | None:
        """Return the chosen experts; None, and a suspect, where one is no expert's index."""
        inside = (x >= 0) & (x < self.cfg.n_routed_experts) & (x % 1 == 0)
        if inside.all():
            return x.astype(np.int64)
        row = int(np.argwhere(~inside)[0][0])
        self.suspects[path] = f"token {row} chose {x[row].tolist()}, no expert's index"
        return None

    def _logits(self) -> Values:
        """Return log-probabilities at the truth's ids, and logsumexp, of whole logits."""
        raw = self.dump.arrays.get(LOGITS)
        if raw is None:
            return {}
        split = split_axes(LOGITS, raw, self.cfg)
        x = None if split is None or split.batch or split.parts > 1 else split.array
        known = None if x is None else ~np.isnan(x).all(axis=1)
        if x is None or known is None or len(x) > self.T or not known.any():
            expected = [self.T, self.cfg.vocab_size]
            self.misfits[LOGITS] = f"it is {list(raw.shape)}, expected {expected} or its last rows"
            return {}
        if LOGITS in self.dump.partial and np.isnan(x[known]).any():
            self.misfits[LOGITS] = "some columns of a row are unknown"
            return {}
        known = known if LOGITS in self.dump.partial else np.ones(len(x), bool)
        if not np.isfinite(x[known]).all():
            self.suspects[f"{LOGITS}#top{self.truth.top}"] = "not finite"
            return {}
        rows = np.arange(self.T - len(x), self.T)[known]  # servers compute the last ones alone
        logits = x[known].astype(np.float64)
        at = self.ours["lm_head#ids"].astype(np.intp)
        out, totals = np.full((self.T, at.shape[1]), np.nan), np.full((self.T, 1), np.nan)
        total = logsumexp(logits)
        out[rows] = np.take_along_axis(logits, at[rows], axis=-1) - total
        totals[rows] = total
        return {LOGITS: out, TOTAL: totals}

    def _top_logprobs(self) -> Values:
        """Return log-probabilities at the truth's ids, of those that a server listed.

        One that is not listed is no likelier than the last but one listed: servers list the k
        likeliest and sometimes the token that followed.
        """
        assert self.dump.top is not None
        ids, values = self.dump.top
        if len(ids) != self.T or ids.max(initial=-1) >= self.cfg.vocab_size:
            self.misfits[TOP] = f"of {len(ids)} positions for {self.T} tokens, or of other words"
            return {}
        ours, known = self.ours[LOGITS], self.ours["lm_head#ids"]
        out = np.full(ours.shape, np.nan)
        ids = np.where(np.isneginf(values), -1, ids)  # what cannot come has no number to compare
        listed = (ids >= 0).sum(axis=1)
        for t in np.flatnonzero(listed):
            row = dict(zip(ids[t].tolist(), values[t].tolist(), strict=True))
            row.pop(-1, None)
            bound = sorted(row.values())[1] if len(row) > 1 else np.nan  # of one, nothing
            unlisted = np.minimum(ours[t], bound)
            out[t] = [row.get(i, unlisted[k]) for k, i in enumerate(known[t].tolist())]
        if not listed.any():
            return {}
        usual = int(np.median(listed[listed > 0]))
        self.rungs = [max(n for n in ladder(self.truth.top) if n <= max(1, usual))]
        return {LOGITS: out}


def _settled(truth: Truth, dump: Dump) -> Dump:
    """Return a dump of log-probabilities with its tokens, as far as the truth's go.

    The truth's tokens stand for those of the prompt that the response lacks. Raises `InputError`
    where the response has several sequences, or names tokens by their texts.
    """
    if dump.others:
        raise InputError(
            f"{dump.path}: {len(dump.others) + 1} sequences; a truth is of one, so give one"
        )
    if dump.top is None:
        dump = settle_dump(dump, truth.tokens)
    assert dump.top is not None
    assert dump.tokens is not None
    T = min(len(truth.tokens), len(dump.tokens))
    if dump.tokens[:T] != truth.tokens[:T] or len(dump.tokens) == T:
        return dump
    ids, values = (x[:T] for x in dump.top)
    left = int((dump.top[0][T:] >= 0).any(axis=1).sum())
    note = f"{left} positions behind the truth's {T} tokens not judged"
    return replace(dump, tokens=dump.tokens[:T], top=(ids, values), notes=(*dump.notes, note))
