"""Judge a dump against a truth file, end to end and without the model.

Which of the two envelopes judges a point, and which rows, is said at the head of layout.py. The
tests are those of statistics.py; a choice of experts in a row that no flip has reached is judged by
the truth's scores against their noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from math import log
from typing import NamedTuple

import numpy as np

from refmoe.engines import CONVENTIONS, Profile, find_conventions, find_profile, profile_of
from refmoe.fast.threads import single_blas_thread
from refmoe.files import InputError
from refmoe.oracle.judge import Report
from refmoe.oracle.noise import UNIT, rms
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.statistics import (
    ALPHA,
    WIDE,
    PointResult,
    chance_of,
    explained_by,
    holm,
    log_statistics,
    reach_of,
)
from refmoe.oracle.truth.envelope import tie
from refmoe.oracle.truth.errors import differences, errors, lost, reached
from refmoe.oracle.truth.file import Truth
from refmoe.oracle.truth.layout import (
    FEWEST,
    LOGITS,
    TIE,
    TOTAL,
    Masks,
    decode,
    judged_points,
    mixtures,
    network_conventions,
)
from refmoe.oracle.truth.values import DumpValues

TYPES = [
    f.name for f in fields(Profile) if f.name not in ("name", "cache", "activations", "points")
]


@single_blas_thread()
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
    Raises `InputError` where the truth was made under conventions that make another network, keeps
    no noise for this precision, or is of other tokens.
    """
    engine = truth.conventions.name if engine is None else engine
    kept = _kept_profile(truth, dump, _same_network(truth, engine), profile)
    seen = DumpValues(truth, dump)
    touched = reached(differences(seen.ours, seen.theirs), truth.cfg, truth.top, seen.T)
    suspects = dict(seen.suspects)
    router = _judge_choices(truth, kept, seen, touched, suspects)
    samples = _samples(truth, kept, seen, touched)
    outside, judged = _judge_samples(samples, alpha)
    for path in outside:
        suspects.setdefault(path, f"{judged[path].multiple:.3g} times what rounding explains")
    names = judged_points(truth.cfg, truth.top)
    first = next((p for p in names if p in suspects), None)
    verdict, reason = _verdict(seen, judged, None if first is None else suspects[first])
    if first is not None:
        reason += _last_good(first, names, judged)
    ours, defaults = asdict(truth.conventions), asdict(CONVENTIONS["refmoe"])
    missing = [str(reported(p)) for p in names if stored(p) not in seen.theirs]
    return Report(
        verdict=verdict,
        point=reported(first),
        reason=f"{reason}; {_limits(seen, samples, touched, router)}",
        engine=engine,
        profile=kept.name,
        conventions={n: str(v) for n, v in ours.items() if v != defaults[n] and n != "name"},
        compared=len(seen.theirs),
        missing=tuple(dict.fromkeys(missing)),
        unmatched={**dump.unread, **seen.misfits},
        points=tuple(judged.values()),
        router=router,
        alpha=alpha,
        form=seen.dump.form,
        notes=seen.dump.notes if seen.dump.form else (),
    )


def _same_network(truth: Truth, engine: str) -> str:
    """Return the engine, if its conventions make the network of this truth."""
    if engine == truth.conventions.name:
        return engine if engine in CONVENTIONS else "refmoe"
    theirs = network_conventions(find_conventions(engine), truth.cfg)
    ours = network_conventions(truth.conventions, truth.cfg)
    if theirs != ours:
        names = ", ".join(n for n in theirs if theirs[n] != ours[n])
        raise InputError(
            f"{truth.path} was made under conventions {truth.conventions.name}; {engine}'s have "
            f"another {names}; make a truth under --conventions {engine}"
        )
    return engine


def _kept_profile(truth: Truth, dump: Dump, engine: str, name: str | None) -> Profile:
    """Return the first profile of the truth that is nowhere finer than the one asked for."""
    wanted = find_profile(name) if name is not None else profile_of(dump.rounded, engine)
    for p in truth.profiles.values():
        types = [(getattr(p, f), getattr(wanted, f)) for f in TYPES]
        types.append((p.cache or p.storage, wanted.cache or wanted.storage))
        types += [(p.storage, type) for _, type in wanted.points]
        if wanted.activations in (None, p.activations) and all(
            a == b or UNIT.get(a, 0) >= UNIT.get(b, 1) for a, b in types
        ):
            if UNIT[p.storage] < UNIT[truth.numerics]:
                break
            return p
    raise InputError(
        f"{truth.path} keeps the noise of {', '.join(truth.profiles) or 'no profile'} in numerics "
        f"{truth.numerics}; none serves for {wanted.name}"
    )


def _verdict(
    seen: DumpValues, judged: Mapping[str, PointResult], suspect: str | None
) -> tuple[str, str]:
    """Return verdict and reason; `suspect` says what is wrong with the first wrong point."""
    if suspect is not None:
        return "fault", suspect
    unfitted = seen.unfitted()
    if unfitted:
        name, why = next(iter(unfitted.items()))
        return "undecidable", (
            f"{len(unfitted)} points of the dump that a truth keeps could not be fitted, first "
            f"{name}: {why}"
        )
    if not seen.theirs:
        return "undecidable", "nothing in the dump is kept in a truth"
    if not judged:
        return "undecidable", "no row is left that a near tie may not have changed"
    compared = {stored(p) for p in judged}
    few = [p for p in seen.theirs if p not in compared and p != TOTAL and "#experts" not in p]
    if few:
        return "undecidable", (
            f"{len(few)} points of the dump have too few rows to be judged, first {few[0]}; dump "
            "more rows of the prompt"
        )
    wide = [p for p, x in judged.items() if x.envelope > WIDE * _size(seen, p)]
    if len(wide) == len(judged):
        return "undecidable", "rounding alone could explain anything here"
    return "pass", f"{len(judged)} points within their rounding"


def _size(seen: DumpValues, point: str) -> float:
    """Return what an error of this point is a part of: 1, or for logits their RMS in nats."""
    if not point.startswith(LOGITS):
        return 1.0
    return float(np.sqrt((seen.ours[stored(point)] ** 2).mean()))


def stored(point: str) -> str:
    """Return the tensor of the truth that a point is judged from."""
    return LOGITS if point.startswith(f"{LOGITS}#top") else point


def reported(point: str | None) -> str | None:
    """Return the name that a reader knows: log-probabilities are of the logits."""
    return None if point is None else stored(point)


# --- which rows are judged by which envelope


class _Sample(NamedTuple):
    """The errors of one point in the rows judged, their noise, and by which envelope."""

    error: np.ndarray
    level: np.ndarray
    mean: np.ndarray  # of log R, log M
    deviation: np.ndarray
    same: bool  # the envelope of rows that no flip has reached

    @property
    def reach(self) -> float:
        """Return the logarithm of the largest RMS error that is explained, five deviations up."""
        return float(log(rms(self.level[None])[0]) + self.mean[0] + 5 * self.deviation[0])


def _samples(
    truth: Truth, profile: Profile, seen: DumpValues, touched: Masks
) -> dict[str, _Sample]:
    """Return every point that can be judged, by the narrower of its two envelopes.

    That of all rows judges more of them, and is taken unless it is twice as wide.
    """
    found = errors(seen.ours, seen.theirs, seen.rungs)
    out = {}
    for p, path in enumerate(judged_points(truth.cfg, truth.top)):
        mask, error = touched[path], found.get(path)
        if error is None:
            continue
        samples = [_sample(truth, profile, p, error, None)]
        if mask is not None and not path.endswith("#experts"):  # judged one by one there
            samples.append(_sample(truth, profile, p, error, ~mask))
        usable = [s for s in samples if s is not None]
        if usable:
            out[path] = min(usable, key=lambda s: s.reach - log(2) * s.same)
    return out


def _sample(
    truth: Truth, profile: Profile, p: int, error: np.ndarray, untouched: np.ndarray | None
) -> _Sample | None:
    """Return the rows of point number p under one envelope; None where too few are left.

    untouched  the rows that no flip has reached, for the envelope of such; None: all rows
    """
    kind = "all" if untouched is None else "same"
    level = decode(truth.arrays[f"{profile.name}#{kind}"][: len(error), p])
    rows = np.isfinite(error) & np.isfinite(level)
    if untouched is not None:
        rows &= untouched
    spreads = truth.arrays[f"{profile.name}#spread"][p, 0 if kind == "same" else 1]
    mean, deviation = spreads.astype(np.float64).T
    if not np.isfinite(spreads).all() or rows.sum() < max(1, FEWEST * len(error)):
        return None
    deviation = deviation * max(1.0, np.sqrt(len(truth.tokens) / rows.sum()))
    return _Sample(error[rows], level[rows], mean, deviation, kind == "same")


def _judge_samples(
    samples: Mapping[str, _Sample], alpha: float
) -> tuple[list[str], dict[str, PointResult]]:
    """Return the points outside, and for every point its error and what of it is explained."""
    chance, judged = {}, {}
    reach = reach_of(alpha, len(samples))
    for path, s in samples.items():
        found = log_statistics(s.error / s.level)
        chance[path] = chance_of(found, s.mean, s.deviation)
        explained = explained_by(s.mean, s.deviation, reach)
        error, level = (float(np.sqrt((x**2).mean())) for x in (s.error, s.level))
        multiple = float((np.exp(found) / explained).max())
        name = str(reported(path))
        judged[path] = PointResult(name, error, level * float(explained[0]), multiple, ())
    return holm(chance, alpha), judged


# --- choices of experts


def _judge_choices(
    truth: Truth, profile: Profile, seen: DumpValues, touched: Masks, suspects: dict[str, str]
) -> dict[str, int]:
    """Count the flips, and add to `suspects` where noise explains none.

    Choices are compared as sets. In rows that an earlier flip has reached they may be anything.
    """
    count = {"flips": 0, "explained": 0, "unexplained": 0, "after": 0}
    K = truth.cfg.num_experts_per_tok
    noise = decode(truth.arrays[f"{profile.name}#scores"][: seen.T])
    for m, i in enumerate(mixtures(truth.cfg)):
        path = f"model.layers.{i}.mlp.gate#experts"
        if path not in seen.theirs:
            continue
        gate, ids, theirs = path.removesuffix("#experts"), seen.ours[path], seen.theirs[path]
        mask = touched[path]
        for t in np.flatnonzero(lost(ids[:, :K], theirs).any(axis=1)).tolist():
            count["flips"] += 1
            if mask is None or mask[t] or np.isnan(noise[t, m]):
                count["after"] += 1
                continue
            scores = seen.ours[gate + "#scores"][t]
            explained = float(tie(noise[t, m], TIE))
            gap, gone, taken = _gap(ids[t].tolist(), scores, theirs[t].tolist(), K)
            if taken and min(gap, seen.ours[gate + "#groups"][t] / 2) <= explained:
                count["explained"] += 1
                continue
            count["unexplained"] += 1
            suspects.setdefault(
                path,
                f"token {t} chose {taken} over {gone}, whose scores are at least {gap:.3g} "
                f"better; noise explains {explained:.1g}",
            )
    return count


def _gap(
    ids: list[int], scores: np.ndarray, theirs: list[int], K: int
) -> tuple[float, list[int], list[int]]:
    """Return by how much, at least, the best expert lost is better than the worst taken; and both.

    An expert beyond those whose scores are kept is taken to score as the last of them.
    """
    gone = sorted(set(ids[:K]) - set(theirs))
    taken = sorted(set(theirs) - set(ids[:K]))
    known = dict(zip(ids, scores.tolist(), strict=True))
    if not taken or len(set(theirs)) < len(theirs):
        return float("inf"), gone, taken
    worst = min(known.get(e, float(scores[-1])) for e in taken)
    return max(known[e] for e in gone) - worst, gone, taken


# --- words


def _last_good(first: str, names: Sequence[str], judged: Mapping[str, PointResult]) -> str:
    """Say which is the last point before the first wrong one that is within its rounding."""
    before = names[: names.index(first)]
    good = [p for p in before if p in judged and judged[p].multiple <= 1]
    return f"; the last point within its rounding is {reported(good[-1])}" if good else ""


def _limits(
    seen: DumpValues, samples: Mapping[str, _Sample], touched: Masks, router: Mapping[str, int]
) -> str:
    """Say what this verdict cannot see, and which rows were left out."""
    out = [
        "judged end to end against a truth, without the model: an error below the rounding "
        "of all that comes before a point is not seen, nor where in a layer a fault is"
    ]
    free = [p for p, s in samples.items() if not s.same and not p.endswith("#experts")]
    if free:
        out.append(
            f"{len(free)} of {len(samples)} points, from {reported(free[0])} on, against noise "
            "that includes flipped choices, as the dump shows too few rows of the same choices"
        )
    last = [m for p, s in samples.items() if s.same and (m := touched[p]) is not None]
    if last and last[-1].any():
        out.append(
            f"{int(last[-1].sum())} of {seen.T} rows left out of the later points, "
            f"as one of {router['flips']} flipped choices has reached them"
        )
    if router["after"]:
        out.append(f"{router['after']} flips in such rows not judged one by one")
    kept = {stored(p) for p in judged_points(seen.cfg, seen.truth.top)}
    others = [n for n in seen.dump.arrays if n.removesuffix("#sketch") not in kept]
    if others:
        out.append(f"{len(others)} tensors of the dump are of points that a truth lacks")
    return "; ".join(out)
