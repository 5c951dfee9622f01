"""What was done between a model's logits and the numbers that a server lists of them.

With z the logits of a row, S the tokens before it, n their counts, in this order:

    penalised  z − presence·[n > 0] − frequency·n; z/repetition where z > 0 and n, else z·repetition
    biased     z + bias of some tokens; -inf forbids one
    heated     y = z / temperature
    kept       the list alone, top-k, top-p or min-p of y (of z where the temperature comes last)
    listed     y − log Σ e^y over what was kept; or y itself (logits); over log(base)

and rows may be those of another position (`shift`). A healthy engine's log-probabilities are the
same with nothing done. Sources of the orders: vllm-project/vllm `v1/sample/sampler.py`,
ggml-org/llama.cpp `common/sampling.cpp`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

import numpy as np

Scope = Literal["all", "generated", "last 64"]
LAST = 64  # tokens that llama.cpp penalises
BLOCK = 1 << 22  # logits at once


def logsumexp(y: np.ndarray) -> np.ndarray:
    """Return log Σ e^y of each row, [n, Z] → [n, 1]."""
    most = y.max(axis=1, keepdims=True)
    return np.asarray(most + np.log(np.exp(y - most).sum(axis=1, keepdims=True)))


class Kept(NamedTuple):
    """Which tokens a row keeps: those of the list, or by a rule with its number."""

    rule: Literal["list", "top-k", "top-p", "min-p"]
    number: float = 0.0
    last: bool = False  # the rule is applied before the temperature

    def mask(self, y: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return which tokens of one row [Z] are kept; `ids` are those that it lists."""
        out = np.zeros(len(y), bool)
        if self.rule == "list":
            out[ids] = True
            return out
        order = np.argsort(-y, kind="stable")
        if self.rule == "top-k":
            out[order[: int(self.number)]] = True
            return out
        p = np.exp(y - y.max())
        if self.rule == "min-p":
            return np.asarray(p >= self.number)
        before = np.cumsum(p[order] / p.sum()) - p[order] / p.sum()
        out[order[before < self.number]] = True
        return out


@dataclass(frozen=True)
class Listed:
    """The rows that are listed of a sequence, and its tokens."""

    tokens: Sequence[int]
    rows: np.ndarray  # [n] positions
    ids: np.ndarray  # [n, K]; -1: none
    values: np.ndarray  # [n, K]; -inf: cannot come
    prompt: int  # tokens that were not generated
    seen: dict[Scope, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def finite(self) -> np.ndarray:
        """Return which entries have a number [n, K]."""
        return (self.ids >= 0) & np.isfinite(self.values)

    def counts(self, scope: Scope) -> tuple[np.ndarray, np.ndarray]:
        """Return for each row the tokens up to it [n, S] and how often they occurred [n, S].

        A row with fewer has its first token again; one without any has token 0, no times.
        """
        if scope not in self.seen:
            starts = {"all": 0, "generated": self.prompt}
            found = [
                Counter(self.tokens[starts.get(scope, max(0, t + 1 - LAST)) : t + 1]) or {0: 0}
                for t in self.rows.tolist()
            ]
            width = max(map(len, found))
            ids, times = np.zeros((2, len(found), width), int)
            for n, counts in enumerate(found):
                ids[n], times[n] = next(iter(counts.items()))
                ids[n, : len(counts)] = list(counts)
                times[n, : len(counts)] = list(counts.values())
            self.seen[scope] = ids, times
        return self.seen[scope]


@dataclass(frozen=True)
class Processing:
    """One hypothesis of what was done; the default is nothing."""

    shift: int = 0  # a row lists what follows the token so many further on
    temperature: float = 1.0
    kept: Kept | None = None
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    scope: Scope = "all"
    bias: tuple[tuple[int, float], ...] = ()
    logits: bool = False
    base: float = float(np.e)
    errors: tuple[tuple[str, float], ...] = ()  # standard errors of what was fitted

    @property
    def key(self) -> str:
        """Return a text that tells this hypothesis from another one."""
        return repr([(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "errors"])

    def judged(self, listed: Listed, T: int) -> np.ndarray:
        """Return which rows [n] say anything: those of positions there are, and not of one token.

        A list that sums to 1 says nothing with a single entry.
        """
        source = listed.rows + self.shift
        inside = (source >= 0) & (source < T)
        least = 2 if self.kept is not None and self.kept.rule == "list" else 1
        return np.asarray(inside & (listed.finite.sum(axis=1) >= least))

    def look(
        self,
        full: np.ndarray,
        listed: Listed,
        rows: np.ndarray,
        totals: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return what is listed under this hypothesis for some rows: [T, Z] logits → [rows, K].

        Entries without a number are 0. `totals` [T], log Σ e^z of each row, saves summing again
        where few logits change.
        """
        out = np.zeros((len(rows), listed.ids.shape[1]))
        some = max(1, BLOCK // full.shape[1])
        for start in range(0, len(rows), some):
            block = rows[start : start + some]
            if totals is not None and self.kept is None and self.temperature == 1:
                values = self._few_changed(full, listed, block, totals)
            else:
                values = self._all_changed(full, listed, block)
            known = listed.finite[block]
            out[start : start + some] = np.where(known, values, 0) / np.log(self.base)
        return out

    def _all_changed(self, full: np.ndarray, listed: Listed, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of a block of rows, each row summed anew."""
        z = full[listed.rows[rows] + self.shift].astype(np.float64)
        at, changed = self._changed(z, listed, rows)
        np.put_along_axis(z, at, changed, axis=1)
        y = z / self.temperature
        values = np.take_along_axis(y, np.maximum(listed.ids[rows], 0), axis=1)
        if self.logits:
            return values
        kept = y
        if self.kept is not None:
            kept = y.copy()
            known = listed.finite[rows]
            for n, row in enumerate(z if self.kept.last else y):
                kept[n, ~self.kept.mask(row, listed.ids[rows[n]][known[n]])] = -np.inf
        return values - logsumexp(kept)

    def _few_changed(
        self, full: np.ndarray, listed: Listed, rows: np.ndarray, totals: np.ndarray
    ) -> np.ndarray:
        """Return the numbers of a block of rows of which some logits change."""
        source = listed.rows[rows] + self.shift
        every, total = np.arange(len(rows))[:, None], totals[source][:, None]
        ids = np.maximum(listed.ids[rows], 0)
        values = full[source[:, None], ids].astype(np.float64)
        at, changed = self._changed(full, listed, rows, source)
        if at.shape[1]:
            old = full[source[:, None], at].astype(np.float64)
            own = np.zeros(at.shape, bool)  # a token stands once; what pads a row is its first
            own[:, 0] = True
            own[:, 1:] = at[:, 1:] != at[:, :1]
            more = np.where(own, np.exp(changed - total) - np.exp(old - total), 0).sum(axis=1)
            total = total + np.log(np.maximum(1 + more, 1e-300))[:, None]
            place = (ids[:, :, None] == at[:, None, :]).argmax(axis=2)
            hit = np.take_along_axis(at, place, axis=1) == ids
            values = np.where(hit, changed[every, place], values)
        return values if self.logits else values - total

    def _changed(
        self, z: np.ndarray, listed: Listed, rows: np.ndarray, source: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids whose logits change in each row [rows, S], and what they become.

        Rows with fewer ids have their first again.
        """
        every = np.arange(len(rows)) if source is None else source
        at = np.zeros((len(rows), 0), int)
        new = np.zeros((len(rows), 0))
        if self.presence or self.frequency or self.repetition != 1:
            at, n = (x[rows] for x in listed.counts(self.scope))
            new = z[every[:, None], at].astype(np.float64)
            scaled = np.where(new > 0, new / self.repetition, new * self.repetition)
            new = np.where(n > 0, scaled - self.presence - self.frequency * n, new)
        for i, x in self.bias:
            more = z[every, i].astype(np.float64)[:, None]
            at = np.concatenate((at, np.full((len(rows), 1), i)), axis=1)
            new = np.concatenate((new, more + x), axis=1)
        return at, new

    # --- in words

    @property
    def ids(self) -> tuple[str, ...]:
        """Return the names of all that was done, the simplest first."""
        done = {
            "shifted": self.shift != 0,
            "log-base": self.base != float(np.e),
            "logits": self.logits,
            "temperature": self.temperature != 1,
            "presence-penalty": self.presence != 0,
            "frequency-penalty": self.frequency != 0,
            "repetition-penalty": self.repetition != 1,
            "logit-bias": bool(self.bias),
            f"renormalised-{self.kept.rule if self.kept else ''}": self.kept is not None,
        }
        return tuple(name for name, holds in done.items() if holds)

    @property
    def parameters(self) -> float:
        """Return how many numbers were fitted; what is there or not counts for less."""
        fitted = (self.temperature != 1, self.presence != 0, self.frequency != 0)
        holds = (self.shift != 0, self.repetition != 1, *fitted)
        numbers = len(self.bias) + sum(map(bool, holds))
        small = 0.25 * sum(map(bool, (self.base != float(np.e), self.logits)))
        kept = 0.0 if self.kept is None else 0.5 if self.kept.rule == "list" else 1.0
        return numbers + small + kept

    @property
    def is_form(self) -> bool:
        """Tell whether the model's own distribution is written in another way, and no more."""
        plain = not (self.shift or self.bias or self.kept or self.presence or self.frequency)
        return plain and self.temperature == self.repetition == 1

    def sentences(self, name: str) -> list[str]:
        """Return what was done, in words; `name` says what a token stands for."""
        out = []
        if self.shift:
            out.append(
                f"each row is that of the {'next' if self.shift > 0 else 'previous'} position"
            )
        if self.base != float(np.e):
            out.append(f"logarithms are to base {self.base:g}")
        if self.logits:
            out.append("logits are listed, not log-probabilities")
        told = {
            "repetition": (self.repetition != 1, self.repetition, "repetition penalty"),
            "presence": (self.presence != 0, self.presence, "presence penalty"),
            "frequency": (self.frequency != 0, self.frequency, "frequency penalty"),
        }
        for holds, value, what in told.values():
            if holds:
                where = {"all": "", "generated": " of generated tokens"}.get(
                    self.scope, f" of the {self.scope} tokens"
                )
                out.append(f"a {what} of {value:.3g}{where} was applied before the logarithm")
        for i, x in self.bias:
            token = name if len(self.bias) == 1 else str(i)
            done = "was forbidden" if np.isinf(x) else f"was raised by {x:.3g}"
            out.append(f"token {token} {done.replace('raised by -', 'lowered by ')}")
        if self.temperature != 1:
            out.append(f"temperature {self.temperature:.3g} was applied before the logarithm")
        if self.kept is not None:
            rule, number = self.kept.rule, f"{self.kept.number:.3g}"
            over = {
                "list": "the listed tokens",
                "top-k": f"the {number} likeliest tokens (top-k)",
                "top-p": f"the likeliest tokens of probability {number} together (top-p)",
                "min-p": f"the tokens at least {number} times as likely as the likeliest (min-p)",
            }
            out.append(f"probabilities were made to sum to 1 over {over[rule]}")
        return out
