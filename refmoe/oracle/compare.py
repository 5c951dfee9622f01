"""Where does another engine first go wrong, beyond what its rounding explains?

Every operation is computed in float64 on the engine's *own* inputs: the watcher hands each of its
tensors back, so errors do not accumulate and the first wrong operation is the only wrong one. Where
the dump lacks a tensor, the operations around it are judged as one, and the report says which.

    e     = |theirs - ours| / |ours|                    RMS of each row
    noise = the same of emulated runs (noise.py), same inputs, a dozen times
    R, M  = RMS and maximum over rows of e / noise

log R and log M of a healthy engine are spread as those of one emulated run against the others;
the spread is pooled over the layers. SLACK allows for what the profile does not know of the engine.
All points of a report are one family of tests: Holm's correction keeps the chance of any false
alarm below `alpha`. Routing is compared as sets; a flip is explained if the scores that changed
places were nearer than the noise of a score; what follows uses the engine's choice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import log
from statistics import NormalDist
from typing import Any

import numpy as np

from refmoe.engines import CONVENTIONS
from refmoe.files import InputError
from refmoe.model.decoder import Decoder, policy
from refmoe.model.experts import MoeWeights
from refmoe.model.matrix import dequantize
from refmoe.model.router import limit_groups, sigmoid
from refmoe.oracle import cause as causes
from refmoe.oracle.adapters import adapt
from refmoe.oracle.graph import kind, through
from refmoe.oracle.noise import PROFILES, Envelope, Profile, envelope, profile_of, rms
from refmoe.oracle.readers import Dump, nearest
from refmoe.oracle.replay import TOP, Replay
from refmoe.run.model import Model

RUNS = 12
ALPHA = 1e-3
SLACK = 2.0  # of the noise: four times as many roundings as the profile knows
LEAST_SPREAD = 0.05  # of log R: no spread is known better than this from a dozen runs
WIDE = 0.5  # noise that is half the signal decides nothing


@dataclass(frozen=True)
class Point:
    name: str
    rel_error: float  # RMS over rows
    envelope: float  # the largest rel_error that is explained
    multiple: float  # of what is explained; above 1 is outside
    through: tuple[str, ...]  # points that the dump lacks and that are judged with it


@dataclass(frozen=True)
class Report:
    verdict: str  # pass, fault, undecidable
    point: str | None  # the first outside
    reason: str
    engine: str
    profile: str
    conventions: dict[str, str]  # where the engine's sides are not ours
    compared: int
    missing: tuple[str, ...]  # points of ours that the dump lacks
    unmatched: dict[str, str]  # what of the dump is no point of this model, and why
    points: tuple[Point, ...]
    router: dict[str, int]
    alpha: float
    cause: causes.Cause | None = None
    shape: str | None = None  # of a residual that no known fault explains

    def judged_with(self, point: str | None) -> tuple[str, ...]:
        """The points that the dump lacks on the way to this one."""
        return next((p.through for p in self.points if p.name == point), ())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check(
    model: Model,
    dump: Dump,
    tokens: Sequence[int] | None = None,
    *,
    engine: str = "refmoe",
    profile: Profile | str | None = None,
    alpha: float = ALPHA,
    runs: int = RUNS,
    keep: bool = True,
) -> Report:
    """Judge a dump of the same tokens and weights.

    engine   whose conventions it is to be held to
    profile  its precision; without one, that of the values in the dump
    keep     False: sample the envelope anew, and leave nothing on disk
    Raises `InputError` where tokens are missing, or a name is unknown.
    """
    return Case(model, dump, tokens, engine, profile, alpha, runs, keep).report


class Case:
    """A dump before its judge: both replays, and what can be asked of them afterwards."""

    def __init__(
        self,
        model: Model,
        dump: Dump,
        tokens: Sequence[int] | None = None,
        engine: str = "refmoe",
        profile: Profile | str | None = None,
        alpha: float = ALPHA,
        runs: int = RUNS,
        keep: bool = True,
        explain: bool = True,
    ):
        if isinstance(profile, str):
            if profile not in PROFILES:
                raise InputError(f"profile {profile!r}; known: {', '.join(PROFILES)}")
            profile = PROFILES[profile]
        tokens = dump.tokens if tokens is None else tokens
        if tokens is None:
            raise InputError(f"{dump.path}: it does not say its tokens; give them (--tokens FILE)")
        self.tokens, self.engine = tokens, engine
        self.decoder = model.decoder.using(policy("float64", engine))  # refuses unknown engines
        self.profile = profile or profile_of(dump.rounded, engine)
        self.dump = replace(dump, arrays=adapt(dump.arrays, model.cfg))
        self.exact = self.replay(self.decoder)
        self.envelope = envelope(
            self.decoder,
            self.profile,
            tokens,
            self.exact.lenses,
            runs,
            model.checkpoint.identity if keep else None,
        )
        self.report, self.rows = _judge(
            self.decoder, self.dump, self.exact, self.envelope, engine, self.profile, alpha
        )
        if explain and self.report.verdict == "fault":
            found = causes.find(self)
            shape = None if found else causes.describe(self)
            self.report = replace(self.report, cause=found, shape=shape)

    def replay(self, decoder: Decoder) -> Replay:
        """This decoder, or an altered one, on the engine's own inputs."""
        seen = Replay(self.dump, decoder)
        watched = decoder.nx.watching(seen)
        decoder.using(replace(watched, stop_at_nonfinite=False)).logits(self.tokens)
        return seen


def _judge(
    decoder: Decoder,
    dump: Dump,
    exact: Replay,
    noise: Envelope,
    engine: str,
    profile: Profile,
    alpha: float,
) -> tuple[Report, dict[str, "Rows"]]:
    numbers = [p for p in exact.theirs if not p.endswith("#experts")]
    finite = {p for p in numbers if np.isfinite(exact.theirs[p]).all()}
    # what comes of an engine's NaN is not finite either, and is judged no more
    judged = [p for p in numbers if p in finite and np.isfinite(exact.ours[p]).all()]
    rows = _rows(exact, noise, judged)
    fed = {p for p, lens in exact.lenses.items() if lens.goes_on}
    order = dict.fromkeys(exact.order)
    lacking = {p: tuple(through(p, fed, order, decoder.cfg)) for p in rows}
    outside, points = _holm(rows, _spread(rows), lacking, alpha)
    flipped = list(flips(decoder, exact, noise))
    explained = sum(f.explained for f in flipped)
    router = {"flips": len(flipped), "explained": explained}
    router["unexplained"] = len(flipped) - explained
    suspects = {p: exact.misfits[p] for p in exact.broken}
    suspects |= {p: "not finite" for p in numbers if p not in finite}
    suspects |= {p: f"{points[p].multiple:.3g} times what rounding explains" for p in outside}
    for f in flipped:
        if not f.explained:
            suspects.setdefault(f.path, str(f))
    first = next((p for p in exact.order if p in suspects), None)
    known = [p for p in order if not p.endswith("#rows")]
    unmatched = {}
    for name in dump.arrays:
        if name.removesuffix("#sketch") not in exact.theirs and not name.endswith("#rows"):
            near = nearest(name, known)
            unmatched[name] = exact.misfits.get(name) or (
                f"no such point{f'; the nearest is {near}' if near else ''}"
            )
    if TOP in exact.misfits:
        unmatched[TOP] = exact.misfits[TOP]
    wide = [p for p in points if points[p].envelope > WIDE]
    if first is not None:
        verdict, reason = "fault", suspects[first]
    elif not exact.theirs:
        verdict, reason = "undecidable", "no tensor of the dump is a point of this model"
    elif len(wide) == len(points):
        verdict, reason = "undecidable", "rounding alone could explain anything here"
    else:
        verdict, reason = "pass", f"{len(points)} points within their rounding"
    report = Report(
        verdict,
        first,
        reason,
        engine,
        profile.name,
        _sides(decoder),
        len(exact.theirs),
        tuple(p for p in known if p not in exact.theirs and ".experts." not in p),
        unmatched,
        tuple(points.values()),
        router,
        alpha,
    )
    return report, rows


def _sides(decoder: Decoder) -> dict[str, str]:
    """Where the engine's conventions are not ours, as far as this model can show it."""
    cfg, ours, theirs = decoder.cfg, CONVENTIONS["refmoe"], decoder.nx.conventions
    idle = {"name"}
    if cfg.quantization is None:
        idle.add("rounded_products")
    if cfg.n_group == cfg.topk_group:
        idle.add("masked_groups")
    if cfg.rope_scaling is None:
        idle.add("yarn_betas")
    return {
        f.name: f"{_said(getattr(theirs, f.name))} (here {_said(getattr(ours, f.name))})"
        for f in fields(theirs)
        if f.name not in idle and getattr(theirs, f.name) != getattr(ours, f.name)
    }


def _said(value: Any) -> str:
    if value is None:
        return "the config's"
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


class Rows:
    """Relative errors of one point: the engine's [T], and each emulated run's [runs, T]."""

    def __init__(self, ours: np.ndarray, theirs: np.ndarray, noise: np.ndarray):
        size = rms(ours)
        self.error = rms(theirs - ours) / np.where(size > 0, size, 1)
        self.noise = noise
        self.explained = np.ones(2)  # the largest R and M that are; `_holm` knows

    def multiple(self) -> float:
        """Of what is explained; above 1 is outside."""
        return float((np.exp(self.ratios(self.error, self.noise)) / self.explained).max())

    def against(self, ours: np.ndarray, theirs: np.ndarray) -> float:
        """The same for another hypothesis of what the engine should have computed here."""
        other = Rows(ours, theirs, self.noise)
        size = np.maximum(rms(ours), rms(theirs))  # a hypothesis of nothing explains nothing
        other.error = rms(theirs - ours) / np.where(size > 0, size, 1)
        other.explained = self.explained
        return other.multiple()

    def ratios(self, error: np.ndarray, noise: np.ndarray) -> tuple[float, float]:
        """log R and log M of an error against the noise of these runs."""
        ratio = error / row_levels((noise**2).mean(axis=0))
        return log(np.sqrt((ratio**2).mean()) + 1e-12), log(ratio.max() + 1e-12)


def row_levels(squares: np.ndarray) -> np.ndarray:
    """Noise of each row from its mean square [..., T], of one that vanished by chance a floor."""
    floor = np.sqrt(squares.mean(axis=-1, keepdims=True)) / 10 + 1e-30
    return np.maximum(np.sqrt(squares), floor)


def _rows(exact: Replay, noise: Envelope, judged: list[str]) -> dict[str, Rows]:
    """Where the engine chose other experts than float64 does, their rows have the kind's noise."""
    levels: dict[str, list[np.ndarray]] = {}
    for path, sampled in noise.noise.items():
        levels.setdefault(kind(path), []).append(np.sqrt((sampled**2).mean(axis=1)))
    out = {}
    for path in judged:
        ours, known = exact.ours[path], noise.noise.get(path)
        if known is None or known.shape[1] != len(ours):
            if kind(path) not in levels:
                continue
            level = np.sqrt(np.mean(np.square(levels[kind(path)]), axis=0))
            known = np.repeat(level[:, None], len(ours), axis=1)
        out[path] = Rows(ours, exact.theirs[path], known)
    return out


Spread = dict[str, tuple[np.ndarray, np.ndarray]]  # kind → mean and deviation of (log R, log M)


def _spread(rows: dict[str, Rows]) -> Spread:
    """How log R and log M of one emulated run lie against the others, pooled over layers."""
    drawn: dict[str, list[np.ndarray]] = {}
    for path, r in rows.items():
        drawn.setdefault(kind(path), []).append(_each_against_others(r.noise))
    out = {}
    for name, values in drawn.items():
        x = np.concatenate(values)
        out[name] = (x.mean(axis=0), np.maximum(x.std(axis=0, ddof=1), LEAST_SPREAD))
    return out


def _each_against_others(noise: np.ndarray) -> np.ndarray:
    """`Rows.ratios` of each run [runs, T] against all but itself: [runs, 2]."""
    runs = len(noise)
    others = (1 - np.eye(runs)) @ noise**2 / (runs - 1)  # mean squares of the others [runs, T]
    ratio = noise / row_levels(others)
    return np.log(np.stack((rms(ratio), ratio.max(axis=-1)), axis=-1) + 1e-12)


def _holm(
    rows: dict[str, Rows], spread: Spread, lacking: dict[str, tuple[str, ...]], alpha: float
) -> tuple[list[str], dict[str, Point]]:
    """The points outside, and every point with its share of what is explained."""
    normal = NormalDist()
    chance = {}
    for path, r in rows.items():
        mean, deviation = spread[kind(path)]
        z = (np.array(r.ratios(r.error, r.noise)) - log(SLACK) - mean) / deviation
        chance[path] = min(1.0, 2 * normal.cdf(-float(z.max())))  # two statistics a point
    outside = []
    ranked = sorted(chance, key=lambda p: chance[p])
    for i, path in enumerate(ranked):
        if chance[path] > alpha / (len(ranked) - i):
            break
        outside.append(path)
    reach = -normal.inv_cdf(alpha / (2 * max(1, len(rows))))
    points = {}
    for path, r in rows.items():
        mean, deviation = spread[kind(path)]
        r.explained = np.exp(mean + log(SLACK) + reach * deviation)
        level = float(np.sqrt((r.noise**2).mean()))
        error = float(np.sqrt((r.error**2).mean()))
        envelope = level * float(r.explained[0])
        points[path] = Point(path, error, envelope, r.multiple(), lacking[path])
    return outside, points


@dataclass(frozen=True)
class Flip:
    """A token whose experts are not ours: which, and how near to a tie."""

    path: str
    token: int
    taken: list[int]
    lost: list[int]
    gap: float  # between the best score lost and the worst taken; inf: of another group
    tie: float  # gap that the noise of scores explains
    groups: float  # margin of the group refused, where groups are limited
    explained: bool

    @property
    def layer(self) -> int:
        return int(self.path.split(".")[2])

    def __str__(self) -> str:
        return (
            f"token {self.token} chose {self.taken} over {self.lost}, whose scores are "
            f"{self.gap:.3g} better; noise explains {self.tie:.1g}"
        )


def flips(decoder: Decoder, exact: Replay, sampled: Envelope) -> Iterator[Flip]:
    """Choices as sets: which flipped, and whether they are nearer to a tie than the noise."""
    for path in (p for p in exact.theirs if p.endswith("gate#experts")):
        gate = path.removesuffix("#experts")
        weights = decoder.layers[int(path.split(".")[2])].mlp
        assert isinstance(weights, MoeWeights)
        ours = exact.gates[gate]  # of the engine's own input, where it dumped no logits
        whole = gate in exact.lenses and exact.lenses[gate].goes_on
        score = sigmoid(exact.theirs[gate] if whole else ours)
        score = score + dequantize(weights.gate.e_score_correction_bias, np.float64)
        score, margin = limit_groups(score, decoder.cfg, decoder.nx)
        # seven deviations of a difference of two scores, sigmoid' being at most 1/4
        tie = float(7 * np.sqrt(2) * 0.25 * sampled.gates[gate] + 4 * 2.0**-24)
        pairs = zip(exact.ours[path].astype(int), exact.theirs[path].astype(int), strict=True)
        for row, (mine, theirs) in enumerate(pairs):
            lost = sorted(set(mine.tolist()) - set(theirs.tolist()))
            taken = sorted(set(theirs.tolist()) - set(mine.tolist()))
            if not lost:
                continue
            gap = float(max(score[row, lost]) - min(score[row, taken])) if taken else np.inf
            groups = float(margin[row])
            # another group altogether: its two best are near the two best of the one refused
            near = gap <= tie or (np.isinf(gap) and bool(taken) and groups <= 2 * tie)
            yield Flip(path, row, taken, lost, gap, tie, groups, near)


@dataclass(frozen=True)
class Arbitration:
    """Two engines against float64: which is further, and whether either is at fault by itself.

    Also one engine against itself: prefill and decoding, two chunk sizes, two batch neighbours.
    Both then pass, and `first_difference` is where their bits part, None if they never do.
    """

    a: Report
    b: Report
    shared: int  # points of both
    equal: int  # of these, the same bit for bit
    first_difference: str | None
    ratio: float | None  # geometric mean of a's error over b's, at the points where both err

    @property
    def further(self) -> str:
        """The engine with the larger errors; neither, where they are within a factor of 1.5."""
        if self.ratio is None or 1 / 1.5 < self.ratio < 1.5:
            return "neither"
        return "a" if self.ratio > 1 else "b"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "further": self.further}


def arbitrate(a: Case, b: Case) -> Arbitration:
    """Both judged on their own inputs, so that one engine's error is not the other's."""
    errors = {p.name: p.rel_error for p in b.report.points}
    pairs = [(p.rel_error, errors[p.name]) for p in a.report.points if p.name in errors]
    logs = [log(x / y) for x, y in pairs if x > 0 and y > 0]
    ratio = float(np.exp(np.mean(logs))) if logs else None
    shared = [p for p in a.exact.theirs if p in b.exact.theirs]
    differ = [p for p in shared if not np.array_equal(a.exact.theirs[p], b.exact.theirs[p])]
    first = differ[0] if differ else None
    return Arbitration(a.report, b.report, len(pairs), len(shared) - len(differ), first, ratio)
