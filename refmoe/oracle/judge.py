"""Judge a replayed dump: each point against its envelope, each choice of experts against ties."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isinf
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.engines import CONVENTIONS, Profile
from refmoe.model.decoder import Decoder
from refmoe.model.experts import MoeWeights
from refmoe.model.matrix import dequantize
from refmoe.model.points import parents, parse
from refmoe.model.router import limit_groups, sigmoid
from refmoe.oracle.envelope import Envelope
from refmoe.oracle.forms.prefix import prefix_of, rests_on_prefix
from refmoe.oracle.forms.rows import ranges
from refmoe.oracle.noise import UNIT
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.replay import TOP, Replay
from refmoe.oracle.statistics import WIDE, PointResult, RowErrors, judge_points, row_errors


@dataclass(frozen=True)
class Solved:
    """A constant of the model that was solved for."""

    constant: str  # a name of faults/constants.py
    value: float
    uncertainty: float  # one deviation; 0 of a whole number that no neighbour fits
    expected: float | None  # None: a window, where all is expected
    whose: tuple[str, ...]  # models that have this value


@dataclass(frozen=True)
class Cause:
    """The fault that explains the first wrong point, of the dictionary or a constant's value."""

    id: str
    text: str  # a sentence, with the layer's expert where it is one expert's
    references: tuple[str, ...]
    fitted: str | None  # what the numbers say of its constant
    runner_up: str | None  # id of the next best that is not equivalent to it
    times_worse: float | None  # its residual over the best one's
    equivalent: tuple[str, ...]  # ids that these numbers cannot tell from it
    solved: Solved | None = None  # the constant that it is, where it is one


@dataclass(frozen=True)
class Coverage:
    """How much of what was dumped, and of what the model computes, a report rests on."""

    tensors: int  # of the dump that bear a point's name
    unfitted: dict[str, str]  # those of them that could not be compared, and why
    parts: dict[str, str]  # compared in part: name → which rows, columns or numbers
    operations: int  # of the model, a mixture's experts being one
    alone: int  # judged on their own
    together: int  # judged as one with others
    layers: tuple[int, ...]  # of which no operation was judged
    positions: tuple[int, int]  # judged anywhere, of all


@dataclass(frozen=True)
class PromptResult:
    """The verdict over one of several prompts of a dump, or over rows that were computed again."""

    label: str
    verdict: str
    point: str | None
    reason: str


@dataclass(frozen=True)
class Report:
    """The result of `check`; `as_json` is the document that `check --json` prints."""

    verdict: str  # pass, fault, undecidable
    point: str | None  # the first outside
    reason: str
    engine: str
    profile: str
    conventions: dict[str, str]  # in which the engine differs from refmoe, and how
    compared: int
    missing: tuple[str, ...]  # points of ours that the dump lacks
    unmatched: dict[str, str]  # what of the dump is no point of this model, and why
    points: tuple[PointResult, ...]
    router: dict[str, int]
    alpha: float
    cause: Cause | None = None
    shape: str | None = None  # of a residual that no known fault explains
    coverage: Coverage | None = None
    profile_guessed: bool = False
    profile_from: str | None = None  # what it was guessed from
    passes_under: tuple[str, ...] = ()  # options under which nothing would be wrong
    seen: dict[str, str] = field(default_factory=dict)  # sides seen in place of the engine's own
    cache: str | None = None  # the declared one, in the form that was found
    notes: tuple[str, ...] = ()  # how the dump's rows were placed
    prompts: tuple[PromptResult, ...] = ()  # of each, where the dump has several
    form: str | None = None  # in which a server wrote log-probabilities
    undone: tuple[str, ...] = ()  # done to log-probabilities, and undone before they were judged

    def judged_with(self, point: str | None) -> tuple[str, ...]:
        """Return the points that the dump lacks and that are judged with this one."""
        return next((p.through for p in self.points if p.name == point), ())

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Judgement:
    """A report with all that it rests on, for whoever asks further: cause, HTML page, repro."""

    decoder: Decoder  # in float64, under the engine's conventions
    tokens: Sequence[int]
    engine: str
    profile: Profile
    dump: Dump
    exact: Replay
    envelope: Envelope
    rows: dict[str, RowErrors]
    report: Report


def judge(
    decoder: Decoder,
    dump: Dump,
    tokens: Sequence[int],
    exact: Replay,
    envelope: Envelope,
    engine: str,
    profile: Profile,
    alpha: float,
) -> Judgement:
    """Judge the replay of a dump by an envelope that was sampled for it.

    The verdict is a fault if a point is outside its envelope, not finite, or a choice of experts
    that noise does not explain; undecidable if nothing can be compared or if noise could explain
    anything; a pass otherwise. The point of the report is the first wrong one in the order of
    computation.
    """
    numbers = [p for p in exact.theirs if not p.endswith("#experts")]
    finite = {p for p in numbers if np.isfinite(exact.theirs[p]).all()}
    # what comes of an engine's NaN is not finite either, and is judged no more
    judged = [p for p in numbers if p in finite and np.isfinite(exact.ours[p]).all()]
    rows = row_errors(exact, envelope, judged)
    fed = {p for p, lens in exact.lenses.items() if lens.goes_on and not lens.narrow}
    order = dict.fromkeys(exact.order)
    through = {p: tuple(points_between(p, fed, order, decoder.cfg)) for p in rows}
    unjudged = {p: "here it is not finite" for p in finite if p not in rows}
    if before := prefix_of(decoder):
        for p in [p for p in rows if rests_on_prefix(p, through[p])]:
            del rows[p]
            unjudged[p] = f"it rests on {before} tokens before these, which are not given"
    outside, points = judge_points(rows, through, alpha)
    flipped = [
        f
        for f in flips(decoder, exact, envelope, profile)
        if not before
        or not rests_on_prefix(f.path, points_between(f.path, fed, order, decoder.cfg))
    ]
    suspects = {p: exact.misfits[p] for p in exact.broken}
    suspects |= {p: "not finite" for p in numbers if p not in finite}
    suspects |= {p: f"{points[p].multiple:.3g} times what rounding explains" for p in outside}
    for f in flipped:
        if not f.explained:
            suspects.setdefault(f.path, str(f))
    first = next((p for p in exact.order if p in suspects), None)
    known = [p for p in order if not p.endswith("#rows")]
    covered = coverage(dump, exact, known, through, len(tokens), unjudged)
    verdict, reason = _verdict(points, covered, None if first is None else suspects[first])
    explained = sum(f.explained for f in flipped)
    report = Report(
        verdict,
        first,
        reason,
        engine,
        profile.name,
        conventions_shown(decoder),
        len(exact.theirs),
        tuple(p for p in known if p not in exact.theirs and ".experts." not in p),
        _unmatched(dump, exact, known),
        tuple(points.values()),
        {
            "flips": len(flipped),
            "explained": explained,
            "unexplained": len(flipped) - explained,
        },
        alpha,
        coverage=covered,
        form=dump.form,
    )
    return Judgement(decoder, tokens, engine, profile, dump, exact, envelope, rows, report)


def points_between(
    path: str, known: Collection[str], order: Collection[str], cfg: Config
) -> list[str]:
    """Return the points between the `known` ones and this one, in the `order` of computation.

    A point is judged from the engine's tensors that it is computed from (model/points.py). Where
    the dump lacks one of them, it is computed here too, from its own parents.
    """
    found: set[str] = set()
    todo = list(parents(path, cfg))
    while todo:
        point = todo.pop()
        if point not in known and point in order and point not in found:
            found.add(point)
            todo += parents(point, cfg)
    return [p for p in order if p in found]


def _verdict(
    points: Mapping[str, PointResult], covered: Coverage, suspect: str | None
) -> tuple[str, str]:
    """Return verdict and reason; `suspect` says what is wrong with the first wrong point."""
    wide = [p for p in points if points[p].envelope > WIDE]
    compared = covered.tensors - len(covered.unfitted)
    if suspect is not None:
        return "fault", suspect
    if covered.unfitted:
        name, why = next(iter(covered.unfitted.items()))
        return "undecidable", (
            f"{len(covered.unfitted)} of {covered.tensors} points of the dump could not be fitted, "
            f"first {name}: {why}"
        )
    if not compared:
        return "undecidable", "no tensor of the dump is a point of this model"
    if len(wide) == len(points):
        return "undecidable", "rounding alone could explain anything here"
    return "pass", f"{len(points)} points within their rounding"


def coverage(
    dump: Dump,
    exact: Replay,
    known: Sequence[str],
    through: Mapping[str, tuple[str, ...]],
    tokens: int,
    unjudged: Mapping[str, str],
) -> Coverage:
    """Return what a report of this replay rests on.

    unjudged  points that were compared and could not be judged, and why

    known    points that were computed here, in order
    through  for each point that was judged, those that were judged with it
    """
    names = [n for n in dump.arrays if _is_point(n)]
    unread = {n: why for n, why in dump.unread.items() if _is_point(n)}
    unfitted = {**unread, **unjudged}
    for name in names:
        if name.removesuffix("#sketch") not in exact.theirs and not name.endswith("#rows"):
            unfitted[name] = exact.misfits.get(name.removesuffix("#sketch")) or _absent(name, exact)
    if dump.top is not None:
        names.append(TOP)
        if TOP in exact.misfits:
            unfitted[TOP] = exact.misfits[TOP]
    operations = [p for p in known if ".experts." not in p]
    alone = [p for p in operations if p in exact.theirs and p not in unjudged]
    together = {p for points in through.values() for p in points} & set(operations) - set(alone)
    judged = {parse(p).layer for p in (*alone, *together)}
    layers = sorted(
        {i for p in operations if (i := parse(p).layer) is not None and i not in judged}
    )
    rows = np.zeros(tokens, bool)
    for p in alone:
        if not p.endswith("kv_b_proj"):  # its rows are positions
            rows[exact.positions(p)] = True
    return Coverage(
        len(names) + len(unread),
        unfitted,
        {p: _part(exact, p, tokens) for p in alone if p in exact.at or exact.lenses[p].narrow},
        len(operations),
        len(alone),
        len(together),
        tuple(layers),
        (int(rows.sum()), tokens),
    )


def joined(each: Sequence[Coverage]) -> Coverage:
    """Return the coverage of several prompts of one dump as one."""
    widest = max(each, key=lambda c: c.alone + c.together)
    layers = set.intersection(*(set(c.layers) for c in each))
    judged, total = (sum(c.positions[i] for c in each) for i in (0, 1))
    return Coverage(
        sum(c.tensors for c in each),
        {n: why for c in each for n, why in c.unfitted.items()},
        {n: part for c in each for n, part in c.parts.items()},
        widest.operations,
        widest.alone,
        widest.together,
        tuple(sorted(layers)),
        (judged, total),
    )


def _is_point(name: str) -> bool:
    """Tell whether a name of a dump is a point's, of whatever layer."""
    return parse(name.removesuffix("#sketch")).point is not None


def _absent(name: str, exact: Replay) -> str:
    """Say why a point that the dump names is none that was computed here."""
    _, layer, expert, _ = parse(name.removesuffix("#sketch"))
    layers = exact.cfg.num_hidden_layers
    if layer is not None and layer >= layers:
        return f"this model has layers 0 to {layers - 1}"
    if expert is not None:
        return "no token chose this expert here"
    return "this model, in this form of attention, computes no such point"


def _part(exact: Replay, path: str, tokens: int) -> str:
    """Say which part of a point was compared."""
    said = []
    if path in exact.at:
        said.append(f"rows {ranges(exact.at[path].tolist())} of {tokens}")
    if exact.lenses[path].narrow:
        columns = exact.dump.columns[path]
        said.append(f"columns {columns.start} to {columns.stop - 1}")
    return ", ".join(said)


def _unmatched(dump: Dump, exact: Replay, known: list[str]) -> dict[str, str]:
    """Return the names of the dump that are no point of this model, and why."""
    out = {}
    for name in dump.arrays:
        if name.removesuffix("#sketch") not in exact.theirs and not name.endswith("#rows"):
            near = _nearest(name, known)
            out[name] = exact.misfits.get(name.removesuffix("#sketch")) or (
                f"no such point{f'; the nearest is {near}' if near else ''}"
            )
    if TOP in exact.misfits:
        out[TOP] = exact.misfits[TOP]
    return {**dump.unread, **out}


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the most similar name, for a message about one that matches nothing."""
    found = difflib.get_close_matches(name, list(names), 1, 0.6)
    return found[0] if found else None


def conventions_shown(decoder: Decoder) -> dict[str, str]:
    """Return the conventions that are not refmoe's, as far as this model can show them.

    A value is "theirs (here ours)"; `words.split_convention` takes it apart.
    """
    cfg, ours, theirs = decoder.cfg, CONVENTIONS["refmoe"], decoder.nx.conventions
    idle = {"name"}
    if cfg.quantization is None:
        idle.add("rounded_products")
    if cfg.n_group == cfg.topk_group:
        idle.add("masked_groups")
    if cfg.rope_scaling is None:
        idle.add("yarn_betas")
    return {
        f.name: f"{_shown(getattr(theirs, f.name))} (here {_shown(getattr(ours, f.name))})"
        for f in fields(theirs)
        if f.name not in idle and getattr(theirs, f.name) != getattr(ours, f.name)
    }


def _shown(value: Any) -> str:
    """Return the value of a convention in words."""
    if value is None:
        return "the config's"
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


# --- choices of experts


def _layer_of(path: str) -> int:
    """Return the layer of a point that is in one."""
    layer = parse(path).layer
    assert layer is not None, f"{path} is in no layer"
    return layer


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
        """The layer of the router that chose."""
        return _layer_of(self.path)

    def __str__(self) -> str:
        return (
            f"token {self.token} chose {self.taken} over {self.lost}, whose scores are "
            f"{self.gap:.3g} better; noise explains {self.tie:.1g}"
        )


DEVIATIONS = 7  # of a difference of two scores: a larger gap is no tie


def flips(decoder: Decoder, exact: Replay, envelope: Envelope, profile: Profile) -> Iterator[Flip]:
    """Yield the tokens whose set of experts is not ours, and whether noise explains it.

    Noise explains a flip if the scores that changed places are nearer than seven deviations of a
    difference of two scores, sigmoid' being at most 1/4.
    """
    for path in (p for p in exact.theirs if p.endswith("gate#experts")):
        gate = path.removesuffix("#experts")
        weights = decoder.layers[_layer_of(path)].mlp
        assert isinstance(weights, MoeWeights)
        at = exact.positions(path)
        ours = exact.gates[gate][at]  # of the engine's own input, where it dumped no logits
        whole = gate in exact.lenses and exact.lenses[gate].goes_on
        whole = whole and np.array_equal(exact.positions(gate), at)
        score = sigmoid(exact.theirs[gate] if whole else ours)
        score = score + dequantize(weights.gate.e_score_correction_bias, np.float64)
        score, margin = limit_groups(score, decoder.cfg, decoder.nx)
        tie = DEVIATIONS * np.sqrt(2) * 0.25 * envelope.gates[gate]
        tie = float(tie + 4 * UNIT[profile.weights])  # scores have the type of the weights
        pairs = zip(exact.ours[path].astype(int), exact.theirs[path].astype(int), strict=True)
        for row, (mine, theirs) in enumerate(pairs):
            lost = sorted(set(mine.tolist()) - set(theirs.tolist()))
            taken = sorted(set(theirs.tolist()) - set(mine.tolist()))
            if not lost:
                continue
            gap = float(max(score[row, lost]) - min(score[row, taken])) if taken else np.inf
            groups = float(margin[row])
            # another group altogether: its two best are near the two best of the one refused
            near = gap <= tie or (isinf(gap) and bool(taken) and groups <= 2 * tie)
            yield Flip(path, int(at[row]), taken, lost, gap, tie, groups, near)
