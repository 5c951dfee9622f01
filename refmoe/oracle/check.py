"""Judge another engine: where does it first go wrong, beyond what its rounding explains?

Every operation is computed in float64 on the engine's *own* inputs: the watcher hands each of its
tensors back (replay.py), so that errors do not accumulate and the first wrong operation is the only
wrong one. Where the dump lacks a tensor, the operations around it are judged as one, and the report
says which.

The error of each point is compared with that of emulated runs of the same precision on the same
inputs (envelope.py). statistics.py decides whether it is larger than these explain; all points of a
report are one family of tests, whose chance of any false alarm is below `alpha`. Choices of experts
are compared as sets: one that differs is explained if the scores that changed places were nearer
than the noise of a score, and what follows uses the engine's choice (judge.py). For the first wrong
point every known fault is tried (cause.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import log
from typing import Any

import numpy as np

from refmoe.engines import Profile, find_profile, profile_of
from refmoe.fast.reproducible import reproducible_policy
from refmoe.fast.threads import single_blas_thread
from refmoe.model.points import FORMS, parse
from refmoe.oracle.cause import describe_error, find_cause
from refmoe.oracle.envelope import sample_envelope
from refmoe.oracle.forms.place import Placed, place
from refmoe.oracle.forms.prefix import after
from refmoe.oracle.forms.ranks import join_ranks, wrong_ranks
from refmoe.oracle.judge import Judgement, PromptResult, Report, joined, judge
from refmoe.oracle.readers.adapt import adapt
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.replay import replay
from refmoe.oracle.statistics import ALPHA, RUNS
from refmoe.run.load import Model

VERDICTS = ("fault", "undecidable", "pass")  # the worst first


def check(
    model: Model,
    dump: Dump,
    tokens: Sequence[int] | Sequence[Sequence[int]] | None = None,
    *,
    engine: str = "refmoe",
    profile: Profile | str | None = None,
    alpha: float = ALPHA,
    runs: int = RUNS,
    keep: bool = True,
) -> Report:
    """Judge a dump of the same tokens and weights.

    tokens   of the dump, or of each of its prompts; without them, those that its file has, or that
             the rows of its embedding name
    engine   whose conventions it is to be held to
    profile  its precision; without one, that of the values in the dump
    alpha    chance of a false alarm in the whole report
    runs     emulated runs that an envelope is sampled from
    keep     False: sample the envelope anew, and leave nothing on disk
    Raises `InputError` where tokens are missing, or a name is unknown.
    """
    return judge_dump(model, dump, tokens, engine, profile, alpha, runs, keep).report


@single_blas_thread()
def judge_dump(
    model: Model,
    dump: Dump,
    tokens: Sequence[int] | Sequence[Sequence[int]] | None = None,
    engine: str = "refmoe",
    profile: Profile | str | None = None,
    alpha: float = ALPHA,
    runs: int = RUNS,
    keep: bool = True,
    explain: bool = True,
) -> Judgement:
    """Judge a dump as `check` does, and return all that the report rests on.

    Where the dump has several prompts, or rows that were computed again, each is judged, and what
    is returned is of the first that is wrong; its report tells of all.
    explain  False: do not look for the cause of a fault
    """
    if isinstance(profile, str):
        profile = find_profile(profile)
    decoder = model.decoder.using(reproducible_policy("float64", engine))  # refuses unknown engines
    profile = profile or profile_of(dump.rounded, engine)
    ranks = tuple(adapt(arrays, model.cfg) for arrays in dump.ranks)
    dump = replace(dump, arrays=adapt(dump.arrays, model.cfg), ranks=ranks)
    if "absorbed" in forms_of(dump.arrays):
        decoder = decoder.using(replace(decoder.nx, attention="absorbed"))
    identity = model.checkpoint.identity if keep else None
    joined_ranks = join_ranks(dump, model.cfg)
    placed = [
        replace(p, label=", ".join(filter(None, (j.label, p.label))), notes=j.notes + p.notes)
        for j in joined_ranks
        for p in place(j.dump, decoder, tokens)
    ]
    found = []
    for each in placed:
        here = after(decoder, each.before)
        exact = replay(each.dump, here, each.tokens)
        own = None if each.before else identity
        envelope = sample_envelope(here, profile, each.tokens, exact.lenses, runs, own)
        chance = alpha / len(placed)
        case = judge(here, each.dump, each.tokens, exact, envelope, engine, profile, chance)
        found.append(_with_place(case, each, joined_ranks[0].parts))
    return _first_wrong(found, [p.label for p in placed], alpha, explain)


def forms_of(names: Iterable[str]) -> set[str]:
    """Return the forms of attention of which a dump has points that only they compute."""
    points = (parse(n.removesuffix("#sketch")).point for n in names)
    return {p.where for p in points if p is not None and p.where in FORMS}


def _with_place(case: Judgement, placed: Placed, ranks: int) -> Judgement:
    """Return a judgement whose report says what `place` had to do, and which rank is wrong."""
    report = replace(case.report, notes=placed.notes)
    point = report.point
    if ranks > 1 and point in case.exact.theirs and point in case.exact.ours:
        said = wrong_ranks(case.exact.ours[point], case.exact.theirs[point], ranks)
        report = replace(report, notes=(*placed.notes, said) if said else placed.notes)
    if placed.wrong_tokens is not None and report.verdict == "pass":
        reason = f"wrong list of tokens: {placed.wrong_tokens}; with its own, {report.reason}"
        report = replace(report, verdict="undecidable", reason=reason)
    elif placed.wrong_tokens is not None:
        note = f"wrong list of tokens: {placed.wrong_tokens}; judged with its own"
        report = replace(report, notes=(*report.notes, note))
    return replace(case, report=report)


def _first_wrong(
    found: list[Judgement], labels: list[str], alpha: float, explain: bool
) -> Judgement:
    """Return the first judgement of the worst verdict, with a report that tells of all."""
    worst = min(found, key=lambda c: VERDICTS.index(c.report.verdict))
    report = worst.report
    if explain and report.verdict == "fault":
        cause = find_cause(worst)
        report = replace(report, cause=cause, shape=None if cause else describe_error(worst))
    if len(found) > 1:
        label = labels[[c is worst for c in found].index(True)]
        results = [
            PromptResult(label, c.report.verdict, c.report.point, c.report.reason)
            for label, c in zip(labels, found, strict=True)
        ]
        points = sum(len(c.report.points) for c in found)
        passed = f"{len(found)} parts, {points} points within their rounding"
        report = replace(
            report,
            reason=passed if report.verdict == "pass" else f"{label}: {report.reason}",
            alpha=alpha,
            compared=sum(c.report.compared for c in found),
            notes=tuple(dict.fromkeys(n for c in found for n in c.report.notes)),
            prompts=tuple(results),
            coverage=joined([c.report.coverage for c in found if c.report.coverage]),
        )
    return replace(worst, report=report)


@dataclass(frozen=True)
class Arbitration:
    """Two engines against float64: which is further from it, and whether either is at fault.

    The two may be one engine: prefill and decoding, two chunk sizes, two batch neighbours. Both
    then pass, and `first_difference` is where their bits part, None if they never do.
    """

    a: Report
    b: Report
    shared: int  # points of both
    equal: int  # of these, bit for bit
    first_difference: str | None
    ratio: float | None  # geometric mean of a's error over b's, at the points where both err

    @property
    def further(self) -> str:
        """The engine with the larger errors, "a" or "b"; "neither" within a factor of 1.5."""
        if self.ratio is None or 1 / 1.5 < self.ratio < 1.5:
            return "neither"
        return "a" if self.ratio > 1 else "b"

    def as_json(self) -> dict[str, Any]:
        """Return the arbitration as plain data."""
        return {**asdict(self), "further": self.further}


def arbitrate(a: Judgement, b: Judgement) -> Arbitration:
    """Compare two judgements; each is on its own inputs, so no error is counted for the other."""
    errors = {p.name: p.rel_error for p in b.report.points}
    pairs = [(p.rel_error, errors[p.name]) for p in a.report.points if p.name in errors]
    logs = [log(x / y) for x, y in pairs if x > 0 and y > 0]
    ratio = float(np.exp(np.mean(logs))) if logs else None
    shared = [p for p in a.exact.theirs if p in b.exact.theirs]
    differ = [p for p in shared if not np.array_equal(a.exact.theirs[p], b.exact.theirs[p])]
    first = differ[0] if differ else None
    return Arbitration(a.report, b.report, len(pairs), len(shared) - len(differ), first, ratio)
