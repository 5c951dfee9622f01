"""Find out why the first wrong operation is wrong: every known fault is tried in its place.

At the failing point every candidate recomputes that one layer on the engine's own inputs, as an
engine with that fault would. What is then left of the error is measured against the envelope, as
the healthy hypothesis was: inside it, the fault explains the engine. Of those that do, the one that
also explains the layer's other points best is named, with its fitted constant, the runner-up, and
how much worse that fits. A fault of one expert is tried for the expert that all wrong rows and no
right one have chosen.

If nothing fits, the shape of the error is described: what is constant in it is a clue.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from refmoe.model.decoder import Decoder, head, layer
from refmoe.model.experts import MlpWeights
from refmoe.model.mla import Segment
from refmoe.model.points import SWIGLU, kind, parse
from refmoe.oracle.constants import SURE, Found, noise_of, related, solve_constants
from refmoe.oracle.faults.base import Fault, altered, strength_of
from refmoe.oracle.faults.dictionary import BY_ID, candidates, same_as
from refmoe.oracle.judge import Cause, Judgement
from refmoe.oracle.noise import rms
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.replay import Replay
from refmoe.oracle.solve import solve
from refmoe.progress import Said, say_nothing

NOISE = 0.1  # of what is explained: below it, two hypotheses fit alike
ALIKE = 1.1  # nor can these numbers decide between two that leave so nearly the same
PART = 1e-5  # of the squared error is left by one who only rounds a constant
SAME = 0.01  # times the variance: squares between two that are one thing under two names
UNRELATED = 0.3  # a correlation below it leaves nothing of the right weights in a tensor
CLEAR = 0.6  # of what is explained is left at most by a fault that no constant need compete with
TIES = 1 / 100  # of all choices of experts may differ by ties
MOST_EXPERTS = 4  # are tried one by one


@dataclass(frozen=True)
class _Trial:
    """How well one fault, in every expert or in one, explains what the engine computed."""

    fault: Fault
    expert: int | None
    part: str | None
    here: float  # misfit at the failing point, of what is explained; for choices, wrong ones in all
    layer: float  # the worst misfit of the layer's points, this one included
    fitted: str | None = None
    squares: float = np.inf  # Σ (error / noise)² over the layer's points
    found: Found | None = None  # where it is no fault of the dictionary, but a constant
    alike: tuple[str, ...] = ()  # of a constant: ids of others that fit as well

    @property
    def confined(self) -> int:
        """How narrow the fault is: of two that fit alike, the one that explains more rows wins."""
        free = self.fault.free is not None  # nor is one with a constant of its own preferred
        return (self.expert is not None) + (self.part is not None) + free

    @property
    def text(self) -> str:
        part = f"{self.part} of " if self.part else ""
        where = f", in {part}expert {self.expert}" if self.expert is not None else ""
        return self.fault.text + where


def find_cause(case: Judgement, progress: Said = say_nothing) -> Cause | None:
    """Return the fault that explains the first wrong point; None where none does."""
    point = case.report.point
    if point is None or point not in case.exact.theirs:
        return None
    if case.report.reason == "not finite":
        return _named("not-finite")
    enough = _enough(case, point)
    trials = [t for t in _trials(case, point, progress) if t.fault.predicts]
    trials.sort(key=lambda t: (t.here > enough, max(t.layer, NOISE), t.confined))
    trials = _among_constants(case, point, trials, enough)
    if not trials or trials[0].here > enough:
        return _random_weights(case, point)
    return _cause(trials, enough)


def _cause(trials: list[_Trial], enough: float) -> Cause:
    """Name the best of these trials, with the ids that fit alike and the next best."""
    best = trials[0]

    # a fault elsewhere in the layer, or a hypothesis wider than the fault: only this point counts
    def fit(t: _Trial) -> float:
        return t.here if best.layer > 1 else t.layer

    least = max(fit(best), NOISE)
    rivals = [t for t in trials[1:] if t.fault.id != best.fault.id]
    alike = [t.fault.id for t in rivals if t.here <= enough and fit(t) <= ALIKE * least]
    alike += [i for i in same_as(best.fault.id) if i in {t.fault.id for t in rivals}]
    alike = [i for i in dict.fromkeys(alike) if i != best.fault.id]
    others = [t for t in rivals if t.fault.id not in alike]
    worse = fit(others[0]) / least if others else np.inf
    return Cause(
        best.fault.id,
        best.text,
        best.fault.references,
        best.fitted,
        others[0].fault.id if others else None,
        worse if np.isfinite(worse) else None,
        tuple(alike) if best.fault.id in BY_ID else best.alike,
        best.found.solved if best.found else None,
    )


def _among_constants(
    case: Judgement, point: str, trials: list[_Trial], enough: float
) -> list[_Trial]:
    """Return the faults, and the constants that can explain the point; the best first.

    Where a fault leaves nothing, it competes with the constant that it is a value of, and with the
    others only if that beats it.
    """
    error = _squares(case, _points_of_layer(case, point), case.exact)
    if trials and trials[0].here <= CLEAR and trials[0].layer <= 1:
        only = trials[0].fault.id
        if not related(only):
            return trials
        among = _with_constants(trials, list(_constants(case, point, only)), enough, error)
        if among[0].fault.id in BY_ID:
            return among
    return _with_constants(trials, list(_constants(case, point, None)), enough, error)


def _constants(case: Judgement, point: str, only: str | None) -> Iterator[_Trial]:
    """Solve for the constants that can explain the point, or those of one fault."""
    within = _points_of_layer(case, point)
    kinds = [kind(p) for p in (point, *judged_points(point, case.report.judged_with(point)))]

    def replayed(fault: Fault) -> Replay:
        return _replay_layer(case, fault, None, None, point)

    for found in solve_constants(case, point, kinds, replayed, only):
        seen = replayed(found.fault)
        misfits = {p: _misfit(case, p, seen.ours.get(p)) for p in within}
        if all(m <= _enough(case, p) for p, m in misfits.items()):
            squares = _squares(case, within, seen)
            worst = max(misfits.values())
            fault = replace(found.fault, text=found.text)
            trial = _Trial(fault, None, None, misfits[point], worst, found.fitted, squares)
            yield replace(trial, found=found)


def _squares(case: Judgement, within: list[str], seen: Replay) -> float:
    """Return the squared errors of a hypothesis in units of their noise, over these points."""
    total = 0.0
    for p in within:
        if not p.endswith("#experts"):
            ours, theirs = seen.ours.get(p), case.exact.theirs[p]
            if ours is None or ours.shape != theirs.shape:
                return np.inf
            noise = noise_of(case, p)
            total += float((((theirs - ours).reshape(len(ours), -1) / noise) ** 2).sum())
    return total if np.isfinite(total) else np.inf


def _with_constants(
    trials: list[_Trial], solved: list[_Trial], enough: float, error: float
) -> list[_Trial]:
    """Return faults and constants, the best first: a fault that fits as well as any constant wins.

    A fault is beaten where a constant leaves fewer squares by those of `SURE` deviations, and by
    `PART` of all that is to be explained: its value is then surely another than the fault's. Of
    constants that are not beaten, one with another model's value wins, and all are in `fitted`.
    error  the squares that a healthy engine's hypothesis leaves
    """
    found = [(t, t.found) for t in solved if t.found is not None]
    if not found:
        return trials
    closest, its = min(found, key=lambda pair: pair[0].squares)
    most = closest.squares + max(SURE**2 * its.spread, PART * (error - closest.squares))

    known = next((t for t in trials if t.here <= enough and t.squares <= most), None)
    if known is not None:
        of = [f for t, f in found if known.fault.id in f.constant.faults and t.squares <= most]
        if of:
            said = known.fitted or of[0].fitted
            known = replace(known, fitted=said, found=of[0])
        return [known, *(t for t in trials if t.fault.id != known.fault.id)]
    alike = [(t, f) for t, f in found if t.squares <= most]
    same = [t for t, _ in alike if t.squares <= closest.squares + SAME * its.spread]
    best = next((t for t, f in alike if f.solved.whose), same[0])
    others = [t for t, _ in alike if t is not best]
    said = "; or ".join(str(t.fitted) for t in (best, *others))
    best = replace(best, fitted=said, alike=tuple(t.fault.id for t in others))
    rest = [*trials, *(t for t in solved if t.fault.id != best.fault.id)]
    return [best, *sorted(rest, key=lambda t: (t.here > enough, max(t.layer, NOISE), t.confined))]


def _named(id: str) -> Cause:
    """Return a fault of the dictionary as a cause that nothing was fitted for."""
    fault = BY_ID[id]
    return Cause(id, fault.text, fault.references, None, None, None, ())


def _random_weights(case: Judgement, point: str) -> Cause | None:
    """Return the fault of weights never loaded, if the point has nothing of what it should be."""
    through = case.report.judged_with(point)
    faults = candidates(point, judged_points(point, through), case.decoder.cfg)
    random = [f for f in faults if not f.predicts and f.id.endswith("-random")]
    if not random or point.endswith("#experts") or not point.endswith(random[0].points):
        return None
    ours, theirs = case.exact.ours[point], case.exact.theirs[point]
    length = float(np.sqrt((ours * ours).sum() * (theirs * theirs).sum()))
    alike = abs(float((ours * theirs).sum())) / max(length, 1e-300)
    return _named(random[0].id) if alike < UNRELATED else None


def _enough(case: Judgement, point: str) -> float:
    """Return the misfit up to which a fault explains a point: the envelope; of choices, ties."""
    return max(1.0, case.exact.theirs[point].size * TIES) if point.endswith("#experts") else 1.0


def _trials(case: Judgement, point: str, progress: Said) -> Iterator[_Trial]:
    """Try every candidate, in every expert and in those that only the wrong rows have chosen."""
    through = case.report.judged_with(point)
    places: list[tuple[int | None, str | None]] = [(None, None)]
    places += [
        (e, part) for e in _suspect_experts(case, point) for part in (None, *MlpWeights._fields)
    ]
    within = _points_of_layer(case, point)
    faults = list(candidates(point, judged_points(point, through), case.decoder.cfg))
    for i, fault in enumerate(faults):
        progress("known faults tried", i, len(faults))
        solved = None
        if fault.free is not None:
            constant = _solved(case, fault, point)
            if constant is None:
                continue
            fault, solved = constant
        for expert, part in places:
            try:
                seen = _replay_layer(case, fault, expert, part, point)
            except ValueError:  # no fault of a single expert, or of a part of it
                continue
            misfits = {p: _misfit(case, p, seen.ours.get(p)) for p in within}
            fitted = solved
            if fault.fitted is not None and np.isfinite(misfits[point]):
                healthy, theirs = case.exact.ours[point], case.exact.theirs[point]
                strength = strength_of(theirs, healthy, seen.ours[point])
                found = fault.fitted.at(case.decoder.cfg, strength)
                right = fault.fitted.value(case.decoder.cfg)
                fitted = f"{fault.fitted.name} {found:.5g}, expected {right:.5g}"
            squares = _squares(case, within, seen)
            worst = max(misfits.values())
            yield _Trial(fault, expert, part, misfits[point], worst, fitted, squares)


def judged_points(point: str, through: tuple[str, ...]) -> list[str]:
    """Return the points that are judged with this one, the experts' own among them.

    Reports leave those out, as there are too many.
    """
    routed = [p for p in (point, *through) if p.endswith(".mlp.experts")]
    return [*through, *(f"{p}.0.{end}" for p in routed for end in SWIGLU)]


def _points_of_layer(case: Judgement, point: str) -> list[str]:
    """Return the points of the dump that a fault of this point's layer may change."""
    if not point.startswith("model.layers."):
        return [point]
    at = "model.layers." + point.split(".")[2].split("#")[0]
    inside = [p for p in case.exact.theirs if p == at or p.startswith((at + ".", at + "#"))]
    return [p for p in inside if p in case.rows or p.endswith("#experts")]


def _replay_layer(
    case: Judgement, fault: Fault, expert: int | None, part: str | None, point: str
) -> Replay:
    """Compute the layer as an engine with this fault does, from this engine's inputs."""
    seen = Replay(case.dump, case.decoder)
    nx = replace(case.decoder.nx.watching(seen), stop_at_nonfinite=False)
    with np.errstate(all="ignore"):
        run_layer(altered(case.decoder.using(nx), fault, expert=expert, part=part), case, point)
    return seen


class _Reached(Exception):
    """The failing point has been computed, and nothing else is wanted."""


class _UntilPoint(Replay):
    """A replay that ends at one point."""

    def __init__(self, dump: Dump, decoder: Decoder, point: str):
        super().__init__(dump, decoder)
        self.point = point

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        x = super().__call__(path, x)
        if path == self.point and not path.endswith("kv_b_proj"):  # shown twice: caches.reading
            raise _Reached
        return x


def replay_until(
    case: Judgement, decoder: Decoder, point: str, fault: Fault | None = None
) -> Replay:
    """Compute what leads to one point, from the engine's inputs, with a fault or under a decoder.

    What follows the point is not computed.
    """
    seen = _UntilPoint(case.dump, decoder, point)
    watched = decoder.using(replace(decoder.nx.watching(seen), stop_at_nonfinite=False))
    with np.errstate(all="ignore"), suppress(_Reached):
        run_layer(altered(watched, fault) if fault else watched, case, point)
    return seen


def _solved(case: Judgement, fault: Fault, point: str) -> tuple[Fault, str] | None:
    """Return a fault with its constant solved for at the failing point; None where it fits none."""
    theirs = case.exact.theirs[point]
    if point not in case.rows:
        return None

    def left(trial: Fault) -> float:
        seen = replay_until(case, case.decoder, point, trial)
        ours = seen.ours.get(point)
        if ours is None or ours.shape != theirs.shape or not np.isfinite(ours).all():
            return np.inf
        return float(np.linalg.norm(theirs - ours))

    wrong, _ = _wrong_rows(case, point)
    if case.rows[point].multiple() <= 1 or not wrong.any():
        wrong = case.rows[point].error >= case.rows[point].error.max() / 2
    first = int(case.exact.positions(point)[np.argmax(wrong)])
    begins = [t for t in (first, first - 1, first + 1) if 0 < t < len(case.tokens)]
    error = float(np.linalg.norm(theirs - case.exact.ours[point]))
    return solve(fault, left, error, begins)


def run_layer(decoder: Decoder, case: Judgement, point: str) -> None:
    """Run only the part of the network that ends in this point, from what went into it."""
    cfg, nx = decoder.cfg, decoder.nx
    judged = (point, *case.report.judged_with(point))
    if "model.embed_tokens" in judged:
        decoder.logits(case.tokens)
        return
    layers = [i for p in judged if (i := parse(p).layer) is not None]
    first, last = min(layers, default=len(decoder.layers)), max(layers, default=-1)
    x = _entering(decoder, case, first)
    for i in range(first, last + 1):
        segments = [Segment(slice(0, len(x)), decoder.caches()[i])]
        inside = nx.within(f"model.layers.{i}.")
        x = layer(x, decoder.layers[i], decoder.experts[i], segments, cfg, inside)
    if not point.startswith("model.layers."):
        head(x, decoder.norm, decoder.lm_head, cfg, nx)


def _entering(decoder: Decoder, case: Judgement, i: int) -> np.ndarray:
    """Return what entered layer i, shown to the watcher as the output of the one before."""
    path = f"model.layers.{i - 1}" if i else "model.embed_tokens"
    return decoder.nx.tap(path, case.exact.entering[path])


def _misfit(case: Judgement, point: str, ours: np.ndarray | None) -> float:
    """Return how far a hypothesis is from the engine: times what is explained, or choices lost."""
    theirs = case.exact.theirs[point]
    if ours is None or ours.shape != theirs.shape:
        return np.inf
    if point.endswith("#experts"):
        pairs = zip(ours.tolist(), theirs.tolist(), strict=True)
        return float(sum(len(set(b) - set(a)) for a, b in pairs))
    if not np.isfinite(ours).all():
        return np.inf
    return case.rows[point].multiple_of(ours, theirs)


def _suspect_experts(case: Judgement, point: str) -> list[int]:
    """Return the experts that every wrong row has chosen, and no right one."""
    name, _, _ = point.partition(".mlp")
    chosen = case.exact.theirs.get(f"{name}.mlp.gate#experts")
    if not point.endswith((".mlp", ".mlp.experts")) or chosen is None:
        return []
    wrong, _ = _wrong_rows(case, point)
    if not wrong.any() or wrong.all():
        return []
    present = {int(e): (chosen == e).any(axis=1) for e in np.unique(chosen)}
    return [e for e, rows_of in present.items() if (rows_of == wrong).all()][:MOST_EXPERTS]


def _wrong_rows(case: Judgement, point: str) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows are beyond eight deviations of their noise [T], and that noise [T]."""
    rows = case.rows[point]
    level = np.sqrt((rows.noise**2).mean(axis=0))
    return rows.error > 8 * np.maximum(level, level.mean() / 10), level


def describe_error(case: Judgement) -> str | None:
    """Describe the shape of an error that no fault of the dictionary explains; None: no clue."""
    point = case.report.point
    if point is None or point.endswith("#experts") or point not in case.rows:
        return None
    ours, theirs = case.exact.ours[point], case.exact.theirs[point]
    wrong, level = _wrong_rows(case, point)
    flat, other = ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)
    ratio = float((flat * other).sum() / max((flat * flat).sum(), 1e-300))
    rest = rms(other - ratio * flat) / np.maximum(rms(flat), 1e-300)
    said = []
    if abs(ratio - 1) > 1e-4 and (rest <= np.maximum(4 * level, 0.02 * abs(ratio - 1))).all():
        said.append(f"the engine's is ours times {ratio:.5g}")
    if wrong.sum() == 1 < len(wrong):
        said.append(f"only token {int(np.argmax(wrong))} is wrong")
    elif not wrong[0] and wrong[1:].all() and len(wrong) > 2:
        said.append("token 0 is right and all others are wrong, as with positions or masks")
    elif len(wrong) > 7 and _rank_correlation(case.rows[point].error) > 0.9:
        said.append("it grows with the position")
    said += _wrong_blocks(case, point, flat, other)
    experts = _suspect_experts(case, point)
    if experts:
        said.append(f"only tokens that chose expert {experts[0]} are wrong")
    return "; ".join(said) or None


def _rank_correlation(error: np.ndarray) -> float:
    """Return Spearman's correlation of the error with the position."""
    order = np.argsort(np.argsort(error))
    return float(np.corrcoef(order, np.arange(len(error)))[0, 1])


def _wrong_blocks(case: Judgement, point: str, ours: np.ndarray, theirs: np.ndarray) -> list[str]:
    """Say whether whole heads, or whole groups of 32 columns, are wrong and the others right."""
    cfg, width = case.decoder.cfg, ours.shape[1]
    sizes = {"head": cfg.num_attention_heads, "group": width // 32}
    if "self_attn" not in point or width % cfg.num_attention_heads:
        del sizes["head"]
    for name, count in sizes.items():
        if count < 2 or width % count:
            continue
        error = ((theirs - ours) ** 2).reshape(len(ours), count, -1).mean(axis=(0, 2))
        size = (ours**2).reshape(len(ours), count, -1).mean(axis=(0, 2))
        share = error / np.maximum(size, 1e-300)
        bad = share > 0.05 * share.max()
        if bad.sum() <= count // 2 and share[~bad].max() < 1e-2 * share.max():
            return [
                f"{int(bad.sum())} of {count} {name}s wrong: {np.flatnonzero(bad)[:8].tolist()}"
            ]
    return []
