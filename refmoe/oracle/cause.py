"""Why is the first wrong operation wrong? Each fault of the dictionary is tried in its place.

At the failing point every candidate (faults.py) recomputes that one layer on the engine's own
inputs, as an engine with that fault would. The residual left is measured against the envelope as
the healthy hypothesis was: inside it, the fault explains the engine. Of those that do, the one that
also explains the layer's other points best is named, with its fitted constant, the runner-up, and
how much worse that fits. A fault of one expert is tried for the expert that all wrong rows and no
right one have chosen.

Where nothing fits, the residual's shape is described: what is constant in it is a clue.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from refmoe.model.decoder import Decoder, head, layer
from refmoe.model.experts import MlpWeights
from refmoe.model.mla import Segment
from refmoe.model.points import SWIGLU
from refmoe.oracle.faults.base import Fault, altered, strength_of
from refmoe.oracle.faults.dictionary import BY_ID, candidates, equivalent
from refmoe.oracle.noise import rms
from refmoe.oracle.replay import Replay

if TYPE_CHECKING:
    from refmoe.oracle.check import Case


@dataclass(frozen=True)
class Cause:
    id: str
    text: str  # a sentence, with the layer's expert where it is one expert's
    references: tuple[str, ...]
    fitted: str | None  # what the numbers say of its constant
    runner_up: str | None  # id of the next best that is not equivalent to it
    times_worse: float | None  # its residual over the best one's
    equivalent: tuple[str, ...]  # ids that these numbers cannot tell from it


@dataclass(frozen=True)
class _Trial:
    fault: Fault
    expert: int | None
    part: str | None
    here: float  # misfit at the failing point, of what is explained; for choices, wrong ones in all
    layer: float  # the worst misfit of the layer's points, this one included
    fitted: str | None = None

    @property
    def confined(self) -> int:
        """Of two that fit alike, the one that explains more rows says more."""
        return (self.expert is not None) + (self.part is not None)

    @property
    def text(self) -> str:
        part = f"{self.part} of " if self.part else ""
        where = f", in {part}expert {self.expert}" if self.expert is not None else ""
        return self.fault.text + where


NOISE = 0.1  # of what is explained: below it, two hypotheses fit alike
ALIKE = 1.1  # nor can these numbers decide between two that leave so nearly the same


def find(case: "Case") -> Cause | None:
    """The fault that explains the first wrong point, or None where none does."""
    point = case.report.point
    if point is None or point not in case.exact.theirs:
        return None
    if case.report.reason == "not finite":
        return _named("not-finite")
    enough = _enough(case, point)
    trials = [t for t in _trials(case, point) if t.fault.predicts]
    trials.sort(key=lambda t: (t.here > enough, max(t.layer, NOISE), t.confined))
    if not trials or trials[0].here > enough:
        return _unforeseeable(case, point)
    best = trials[0]
    declared = next((ids for ids in equivalent if best.fault.id in ids), ())

    # a fault elsewhere in the layer, or a hypothesis wider than the fault: only this point counts
    def fit(t: _Trial) -> float:
        return t.here if best.layer > 1 else t.layer

    least = max(fit(best), NOISE)
    rivals = [t for t in trials[1:] if t.fault.id != best.fault.id]
    alike = [t.fault.id for t in rivals if t.here <= enough and fit(t) <= ALIKE * least]
    alike += [i for i in declared if i in {t.fault.id for t in rivals}]
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
        tuple(alike),
    )


def _named(id: str) -> Cause:
    fault = BY_ID[id]
    return Cause(id, fault.text, fault.references, None, None, None, ())


UNRELATED = 0.3  # a correlation below it leaves nothing of the right weights in a tensor


def _unforeseeable(case: "Case", point: str) -> Cause | None:
    """Weights that nobody knows: what they give has nothing of what it should be."""
    through = case.report.judged_with(point)
    faults = candidates(point, inside(point, through), case.decoder.cfg)
    faults = [f for f in faults if not f.predicts]
    random = [f for f in faults if f.id.endswith("-random")]
    if not random or point.endswith("#experts") or not point.endswith(random[0].points):
        return None
    ours, theirs = case.exact.ours[point], case.exact.theirs[point]
    length = float(np.sqrt((ours * ours).sum() * (theirs * theirs).sum()))
    alike = abs(float((ours * theirs).sum())) / max(length, 1e-300)
    return _named(random[0].id) if alike < UNRELATED else None


def _enough(case: "Case", point: str) -> float:
    """Inside the envelope; of choices, one in a hundred may be a tie."""
    return max(1.0, case.exact.theirs[point].size / 100) if point.endswith("#experts") else 1.0


def _trials(case: "Case", point: str) -> Iterator[_Trial]:
    through = case.report.judged_with(point)
    places: list[tuple[int | None, str | None]] = [(None, None)]
    places += [(e, part) for e in _experts(case, point) for part in (None, *MlpWeights._fields)]
    within = _around(case, point)
    for fault in candidates(point, inside(point, through), case.decoder.cfg):
        for expert, part in places:
            try:
                seen = _again(case, fault, expert, part, point)
            except ValueError:  # no fault of a single expert, or of a part of it
                continue
            misfits = {p: _misfit(case, p, seen.ours.get(p)) for p in within}
            fitted = None
            if fault.fitted is not None and np.isfinite(misfits[point]):
                healthy, theirs = case.exact.ours[point], case.exact.theirs[point]
                strength = strength_of(theirs, healthy, seen.ours[point])
                found = fault.fitted.at(case.decoder.cfg, strength)
                right = fault.fitted.value(case.decoder.cfg)
                fitted = f"{fault.fitted.name} {found:.5g}, expected {right:.5g}"
            yield _Trial(fault, expert, part, misfits[point], max(misfits.values()), fitted)


def inside(point: str, through: tuple[str, ...]) -> list[str]:
    """What is judged with the point; reports leave out the experts' own points."""
    routed = [p for p in (point, *through) if p.endswith(".mlp.experts")]
    return [*through, *(f"{p}.0.{end}" for p in routed for end in SWIGLU)]


def _around(case: "Case", point: str) -> list[str]:
    """The points of the dump that one layer's fault may change: the layer's, from the first on."""
    if not point.startswith("model.layers."):
        return [point]
    at = "model.layers." + point.split(".")[2].split("#")[0]
    inside = [p for p in case.exact.theirs if p == at or p.startswith((at + ".", at + "#"))]
    return [p for p in inside if p in case.rows or p.endswith("#experts")]


def _again(case: "Case", fault: Fault, expert: int | None, part: str | None, point: str) -> Replay:
    """The layer as an engine with this fault computes it, from this engine's inputs."""
    seen = Replay(case.dump, case.decoder)
    nx = replace(case.decoder.nx.watching(seen), stop_at_nonfinite=False)
    with np.errstate(all="ignore"):
        run_layer(altered(case.decoder.using(nx), fault, expert=expert, part=part), case, point)
    return seen


def run_layer(decoder: Decoder, case: "Case", point: str) -> None:
    """Only the part of the network that ends in this point, from what went into it."""
    cfg, nx = decoder.cfg, decoder.nx
    judged = (point, *case.report.judged_with(point))
    if "model.embed_tokens" in judged:
        decoder.logits(case.tokens)
        return
    layers = [int(p.split(".")[2].split("#")[0]) for p in judged if p.startswith("model.layers.")]
    first, last = min(layers, default=len(decoder.layers)), max(layers, default=-1)
    x = _entering(decoder, case, first)
    for i in range(first, last + 1):
        segments = [Segment(slice(0, len(x)), decoder.caches()[i])]
        inside = nx.within(f"model.layers.{i}.")
        x = layer(x, decoder.layers[i], decoder.experts[i], segments, cfg, inside)
    if not point.startswith("model.layers."):
        head(x, decoder.norm, decoder.lm_head, cfg, nx)


def _entering(decoder: Decoder, case: "Case", i: int) -> np.ndarray:
    """What entered layer i, shown to the watcher as its own output was."""
    path = f"model.layers.{i - 1}" if i else "model.embed_tokens"
    return decoder.nx.tap(path, case.exact.entering[path])


def _misfit(case: "Case", point: str, ours: np.ndarray | None) -> float:
    theirs = case.exact.theirs[point]
    if ours is None or ours.shape != theirs.shape:
        return np.inf
    if point.endswith("#experts"):
        pairs = zip(ours.tolist(), theirs.tolist(), strict=True)
        return float(sum(len(set(b) - set(a)) for a, b in pairs))
    if not np.isfinite(ours).all():
        return np.inf
    return case.rows[point].against(ours, theirs)


def _experts(case: "Case", point: str) -> list[int]:
    """Experts that every wrong row has chosen, and no right one."""
    name, _, _ = point.partition(".mlp")
    chosen = case.exact.theirs.get(f"{name}.mlp.gate#experts")
    if not point.endswith((".mlp", ".mlp.experts")) or chosen is None:
        return []
    wrong, _ = _wrong(case, point)
    if not wrong.any() or wrong.all():
        return []
    present = {int(e): (chosen == e).any(axis=1) for e in np.unique(chosen)}
    return [e for e, rows_of in present.items() if (rows_of == wrong).all()][:4]


def _wrong(case: "Case", point: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows beyond eight deviations of their noise [T], and that noise [T]."""
    rows = case.rows[point]
    level = np.sqrt((rows.noise**2).mean(axis=0))
    return rows.error > 8 * np.maximum(level, level.mean() / 10), level


def describe(case: "Case") -> str | None:
    """The shape of a residual that no fault of the dictionary explains."""
    point = case.report.point
    if point is None or point.endswith("#experts") or point not in case.rows:
        return None
    ours, theirs = case.exact.ours[point], case.exact.theirs[point]
    wrong, level = _wrong(case, point)
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
    elif len(wrong) > 7 and _rank(case.rows[point].error) > 0.9:
        said.append("it grows with the position")
    said += _blocks(case, point, flat, other)
    experts = _experts(case, point)
    if experts:
        said.append(f"only tokens that chose expert {experts[0]} are wrong")
    return "; ".join(said) or None


def _rank(error: np.ndarray) -> float:
    """Spearman's correlation with the position."""
    order = np.argsort(np.argsort(error))
    return float(np.corrcoef(order, np.arange(len(error)))[0, 1])


def _blocks(case: "Case", point: str, ours: np.ndarray, theirs: np.ndarray) -> list[str]:
    """Whether whole heads, or whole groups of 32 columns, are wrong and others right."""
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
