"""Judge a dump against a truth file."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from math import log
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from refmoe.engines import CONVENTIONS, PROFILES, Profile, profile_of
from refmoe.files import InputError
from refmoe.oracle.judge import Report
from refmoe.oracle.noise import UNIT, rms
from refmoe.oracle.readers.adapt import adapt, fit
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.replay import TOP
from refmoe.oracle.statistics import ALPHA, SLACK, WIDE, PointResult
from refmoe.oracle.trace import sketch
from refmoe.oracle.truth.envelope import _tie, statistics
from refmoe.oracle.truth.errors import differences, errors, lost, reached
from refmoe.oracle.truth.file import Truth
from refmoe.oracle.truth.forward import logsumexp
from refmoe.oracle.truth.layout import (
    FEWEST,
    LOGITS,
    TIE,
    TOTAL,
    WIDTH,
    Masks,
    Values,
    decode,
    ladder,
    mixtures,
    points,
    sides,
)

# --- check --------------------------------------------------------------------------------------


def check_truth(
    truth: Truth,
    dump: Dump,
    *,
    engine: str | None = None,
    profile: str | None = None,
    alpha: float = ALPHA,
) -> Report:
    """Judge a dump of the same tokens, or of the first of them, end to end and without the model.

    engine   whose conventions it is to be held to; those of the truth, unless given
    profile  its precision; without one, that of the values in the dump
    """
    engine = truth.conventions.name if engine is None else engine
    kept = _profile(truth, dump, _same_sides(truth, engine), profile)
    return _Check(truth, dump, engine, kept, alpha).report()


def _same_sides(truth: Truth, engine: str) -> str:
    """The engine, if its conventions make the same network of this config."""
    if engine == truth.conventions.name:
        return engine if engine in CONVENTIONS else "refmoe"
    if engine not in CONVENTIONS:
        raise InputError(f"engine {engine!r}; known: {', '.join(CONVENTIONS)}")
    theirs, ours = sides(CONVENTIONS[engine], truth.cfg), sides(truth.conventions, truth.cfg)
    if theirs != ours:
        names = ", ".join(n for n in theirs if theirs[n] != ours[n])
        raise InputError(
            f"{truth.path} was made under conventions {truth.conventions.name}; {engine}'s have "
            f"another {names}; make a truth under --conventions {engine}"
        )
    return engine


def _profile(truth: Truth, dump: Dump, engine: str, name: str | None) -> Profile:
    """The first profile of the truth that is nowhere finer than the one asked for."""
    if name is not None and name not in PROFILES:
        raise InputError(f"profile {name!r}; known: {', '.join(PROFILES)}")
    wanted = PROFILES[name] if name else profile_of(dump.rounded, engine)
    for p in truth.profiles.values():
        types = [(getattr(p, f), getattr(wanted, f)) for f in TYPES]
        types.append((p.cache or p.storage, wanted.cache or wanted.storage))
        if wanted.activations in (None, p.activations) and all(
            UNIT[a] >= UNIT[b] for a, b in types
        ):
            if UNIT[p.storage] < UNIT[truth.numerics]:
                break
            return p
    raise InputError(
        f"{truth.path} keeps the noise of {', '.join(truth.profiles) or 'no profile'} in numerics "
        f"{truth.numerics}; none serves for {wanted.name}"
    )


TYPES = [f.name for f in fields(Profile) if f.name not in ("name", "cache", "activations")]


class _Row(NamedTuple):
    """One point before Holm: errors and levels of the rows judged, and which envelope."""

    error: np.ndarray
    level: np.ndarray
    mean: np.ndarray  # of log R, log M
    deviation: np.ndarray
    same: bool

    @property
    def reach(self) -> float:
        """What is explained of R, five deviations up."""
        return float(log(rms(self.level[None])[0]) + self.mean[0] + 5 * self.deviation[0])


class _Check:
    def __init__(self, truth: Truth, dump: Dump, engine: str, profile: Profile, alpha: float):
        self.truth, self.engine, self.profile, self.alpha = truth, engine, profile, alpha
        self.cfg, self.top = truth.cfg, truth.top
        self.dump = replace(dump, arrays=adapt(dump.arrays, truth.cfg))
        self.T = len(truth.tokens) if dump.tokens is None else len(dump.tokens)
        if dump.tokens is not None and list(dump.tokens) != truth.tokens[: self.T]:
            raise InputError(
                f"{dump.path} is of other tokens than {truth.path}; "
                "expected the same, or the first of them"
            )
        self.ours = truth.values(self.T)
        self.names = points(self.cfg, self.top)
        self.misfits: dict[str, str] = {}
        self.suspects: dict[str, str] = {}
        self.rungs = [self.top]
        self.theirs = self.read()

    # --- what the dump has

    def read(self) -> Values:
        out: Values = {}
        for path in self.names:
            x = self.point(path) if not path.startswith(LOGITS) else None
            if x is not None:
                out[path] = x
        out |= self.logits() if self.dump.top is None else self.top_logprobs()
        for path in [p for p, x in out.items() if not p.startswith(LOGITS)]:
            if not np.isfinite(out[path]).all():
                self.suspects[path] = "not finite"
                del out[path]
        return out

    def point(self, path: str) -> np.ndarray | None:
        """Their values as a truth keeps them, or None."""
        sketched, raw = self.dump.arrays.get(path + "#sketch"), self.dump.arrays.get(path)
        mine = self.ours[path]
        K = self.cfg.num_experts_per_tok
        if "gate#" not in path and path != "model.norm" and sketched is not None:
            if sketched.shape == (self.T, WIDTH):
                return sketched[:, : mine.shape[1]].astype(np.float64)
            self.misfits[path] = f"its sketch is {list(sketched.shape)} for {self.T} tokens"
        if raw is None or sketched is not None:
            return None
        if path in self.dump.partial:
            self.misfits[path] = "known in part; a truth has no more than a sketch of it"
            return None
        shape = (self.T, K if "gate#" in path else self.cfg.hidden_size)
        x = fit(path, raw, shape, self.truth.conventions)
        if x is None:
            self.misfits[path] = f"it is {list(raw.shape)}, this point is {list(shape)}"
        elif path.endswith("#experts"):
            inside = (x >= 0) & (x < self.cfg.n_routed_experts) & (x % 1 == 0)
            if not inside.all():
                row = int(np.argwhere(~inside)[0][0])
                self.suspects[path] = f"token {row} chose {x[row].tolist()}, no expert's index"
                return None
            x = x.astype(np.int64)
        elif "gate#" in path or path == "model.norm":
            x = x.astype(np.float64)
        elif np.isfinite(x).all():
            x = sketch(path, x)[:, : mine.shape[1]]
        return x

    def logits(self) -> Values:
        raw = self.dump.arrays.get(LOGITS)
        if raw is None:
            return {}
        shape = (self.T, self.cfg.vocab_size)
        x = fit(LOGITS, raw, shape, self.truth.conventions)
        if x is None or LOGITS in self.dump.partial:
            self.misfits[LOGITS] = f"it is {list(raw.shape)}, or in part; needed: {list(shape)}"
            return {}
        if not np.isfinite(x).all():
            self.suspects[f"{LOGITS}#top{self.top}"] = "not finite"
            return {}
        x = x.astype(np.float64)
        total = logsumexp(x)
        at = self.ours["lm_head#ids"].astype(np.intp)
        return {LOGITS: np.take_along_axis(x, at, axis=-1) - total, TOTAL: total}

    def top_logprobs(self) -> Values:
        """At the truth's ids. One that is not listed is no likelier than the last but one listed:
        servers list the k likeliest and sometimes the token that followed."""
        assert self.dump.top is not None
        ids, values = self.dump.top
        if len(ids) != self.T or ids.max(initial=-1) >= self.cfg.vocab_size:
            self.misfits[TOP] = f"of {len(ids)} positions for {self.T} tokens, or of other words"
            return {}
        ours, known = self.ours[LOGITS], self.ours["lm_head#ids"]
        out = np.full(ours.shape, np.nan)
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
        self.rungs = [max(n for n in ladder(self.top) if n <= max(1, usual))]
        return {LOGITS: out}

    # --- verdict

    def report(self) -> Report:
        touched = reached(differences(self.ours, self.theirs), self.cfg, self.top, self.T)
        router = self.router(touched)
        rows = self.rows(touched)
        outside, judged = self.holm(rows)
        for path in outside:
            self.suspects.setdefault(
                path, f"{judged[path].multiple:.3g} times what rounding explains"
            )
        first = next((p for p in self.names if p in self.suspects), None)
        wide = [p for p, x in judged.items() if x.envelope > WIDE * self.signal(p)]
        if first is not None:
            verdict, reason = "fault", self.suspects[first] + self.within(first, judged)
        elif not self.theirs:
            verdict, reason = "undecidable", "nothing in the dump is kept in a truth"
        elif not judged:
            verdict, reason = "undecidable", "no row is left that a near tie may not have changed"
        elif len(wide) == len(judged):
            verdict, reason = "undecidable", "rounding alone could explain anything here"
        else:
            verdict, reason = "pass", f"{len(judged)} points within their rounding"
        ours, defaults = asdict(self.truth.conventions), asdict(CONVENTIONS["refmoe"])
        missing = [str(_said(p)) for p in self.names if self.path(p) not in self.theirs]
        return Report(
            verdict=verdict,
            point=_said(first),
            reason=f"{reason}; {self.limits(rows, touched, router)}",
            engine=self.engine,
            profile=self.profile.name,
            conventions={n: str(v) for n, v in ours.items() if v != defaults[n] and n != "name"},
            compared=len(self.theirs),
            missing=tuple(dict.fromkeys(missing)),
            unmatched=dict(self.misfits),
            points=tuple(judged.values()),
            router=router,
            alpha=self.alpha,
        )

    def signal(self, point: str) -> float:
        """What an error of this point is a part of: 1, or nats."""
        if not point.startswith(LOGITS):
            return 1.0
        return float(np.sqrt((self.ours[self.path(point)] ** 2).mean()))

    def path(self, point: str) -> str:
        return LOGITS if point.startswith(f"{LOGITS}#top") else point

    def rows(self, touched: Masks) -> dict[str, _Row]:
        """Every point that can be judged; by the other envelope if it says twice as much."""
        found = errors(self.ours, self.theirs, self.rungs)
        out = {}
        for p, path in enumerate(self.names):
            mask, error = touched[path], found.get(path)
            if error is None:
                continue
            rows = [self.row(p, error, None)]
            if mask is not None and not path.endswith("#experts"):  # judged one by one there
                rows.append(self.row(p, error, ~mask))
            usable = [r for r in rows if r is not None]
            if usable:
                out[path] = min(usable, key=lambda r: r.reach - log(2) * r.same)
        return out

    def row(self, p: int, error: np.ndarray, untouched: np.ndarray | None) -> _Row | None:
        kind = "all" if untouched is None else "same"
        level = decode(self.truth.arrays[f"{self.profile.name}#{kind}"][: self.T, p])
        rows = np.isfinite(error) & np.isfinite(level)
        if untouched is not None:
            rows &= untouched
        spreads = self.truth.arrays[f"{self.profile.name}#spread"][p, 0 if kind == "same" else 1]
        mean, deviation = spreads.astype(np.float64).T
        if not np.isfinite(spreads).all() or rows.sum() < max(1, FEWEST * self.T):
            return None
        deviation = deviation * max(1.0, np.sqrt(len(self.truth.tokens) / rows.sum()))
        return _Row(error[rows], level[rows], mean, deviation, kind == "same")

    def holm(self, rows: Mapping[str, _Row]) -> tuple[list[str], dict[str, PointResult]]:
        """The points outside, and every point with its share of what is explained."""
        normal, chance, judged = NormalDist(), {}, {}
        reach = -normal.inv_cdf(self.alpha / (2 * max(1, len(rows))))
        for path, r in rows.items():
            found = np.array(statistics(r.error / r.level))
            z = (found - log(SLACK) - r.mean) / r.deviation
            chance[path] = min(1.0, 2 * normal.cdf(-float(z.max())))  # two statistics a point
            explained = np.exp(r.mean + log(SLACK) + reach * r.deviation)
            error, level = (float(np.sqrt((x**2).mean())) for x in (r.error, r.level))
            multiple = float((np.exp(found) / explained).max())
            judged[path] = PointResult(
                str(_said(path)), error, level * float(explained[0]), multiple, ()
            )
        outside = []
        for i, path in enumerate(sorted(chance, key=lambda p: chance[p])):
            if chance[path] > self.alpha / (len(chance) - i):
                break
            outside.append(path)
        return outside, judged

    def router(self, touched: Masks) -> dict[str, int]:
        """Choices as sets. In rows that a flip has reached they may be anything."""
        count = {"flips": 0, "explained": 0, "unexplained": 0, "after": 0}
        K = self.cfg.num_experts_per_tok
        noise = decode(self.truth.arrays[f"{self.profile.name}#scores"][: self.T])
        for m, i in enumerate(mixtures(self.cfg)):
            path = f"model.layers.{i}.mlp.gate#experts"
            if path not in self.theirs:
                continue
            gate, ids, theirs = path.removesuffix("#experts"), self.ours[path], self.theirs[path]
            mask = touched[path]
            for t in np.flatnonzero(lost(ids[:, :K], theirs).any(axis=1)).tolist():
                count["flips"] += 1
                if mask is None or mask[t] or np.isnan(noise[t, m]):
                    count["after"] += 1
                    continue
                scores = self.ours[gate + "#scores"][t]
                tie = float(_tie(noise[t, m], TIE))
                gap, gone, taken = _gap(ids[t].tolist(), scores, theirs[t].tolist(), K)
                if taken and min(gap, self.ours[gate + "#groups"][t] / 2) <= tie:
                    count["explained"] += 1
                    continue
                count["unexplained"] += 1
                self.suspects.setdefault(
                    path,
                    f"token {t} chose {taken} over {gone}, whose scores are at least {gap:.3g} "
                    f"better; noise explains {tie:.1g}",
                )
        return count

    # --- words

    def within(self, first: str, judged: Mapping[str, PointResult]) -> str:
        """Between which points the fault is."""
        before = self.names[: self.names.index(first)]
        good = [p for p in before if p in judged and judged[p].multiple <= 1]
        return f"; the last point within its rounding is {_said(good[-1])}" if good else ""

    def limits(self, rows: Mapping[str, _Row], touched: Masks, router: Mapping[str, int]) -> str:
        """What this verdict can see and what it cannot."""
        out = [
            "judged end to end against a truth, without the model: an error below the rounding "
            "of all that comes before a point is not seen, nor where in a layer a fault is"
        ]
        free = [p for p, r in rows.items() if not r.same and not p.endswith("#experts")]
        if free:
            out.append(
                f"{len(free)} of {len(rows)} points, from {_said(free[0])} on, against noise that "
                "includes flipped choices, as the dump shows too few rows of the same choices"
            )
        last = [m for p, r in rows.items() if r.same and (m := touched[p]) is not None]
        if last and last[-1].any():
            out.append(
                f"{int(last[-1].sum())} of {self.T} rows left out of the later points, "
                f"as one of {router['flips']} flipped choices has reached them"
            )
        if router["after"]:
            out.append(f"{router['after']} flips in such rows not judged one by one")
        kept = {self.path(p) for p in self.names}
        others = [n for n in self.dump.arrays if n.removesuffix("#sketch") not in kept]
        if others:
            out.append(f"{len(others)} tensors of the dump are of points that a truth lacks")
        return "; ".join(out)


def _said(point: str | None) -> str | None:
    """The name that a reader knows: log-probabilities are of the logits."""
    return LOGITS if point is not None and point.startswith(f"{LOGITS}#top") else point


def _gap(
    ids: list[int], scores: np.ndarray, theirs: list[int], K: int
) -> tuple[float, list[int], list[int]]:
    """By how much, at least, the best expert lost is better than the worst taken; and both."""
    gone = sorted(set(ids[:K]) - set(theirs))
    taken = sorted(set(theirs) - set(ids[:K]))
    known = dict(zip(ids, scores.tolist(), strict=True))
    if not taken or len(set(theirs)) < len(theirs):
        return float("inf"), gone, taken
    worst = min(known.get(e, float(scores[-1])) for e in taken)
    return max(known[e] for e in gone) - worst, gone, taken
