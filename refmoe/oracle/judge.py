"""Judge each point of a dump against its envelope."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from refmoe.engines import CONVENTIONS, Profile
from refmoe.model.decoder import Decoder
from refmoe.model.experts import MoeWeights
from refmoe.model.matrix import dequantize
from refmoe.model.router import limit_groups, sigmoid
from refmoe.oracle import cause as causes
from refmoe.oracle.graph import through
from refmoe.oracle.noise import Envelope
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.replay import TOP, Replay
from refmoe.oracle.statistics import WIDE, Point, Rows, _holm, _rows, _spread


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
            near = _nearest(name, known)
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


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the most similar name, for a message about one that matches nothing."""
    found = difflib.get_close_matches(name, list(names), 1, 0.6)
    return found[0] if found else None


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
