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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import log
from typing import Any

import numpy as np

from refmoe.engines import Profile, read_conventions
from refmoe.fast.reproducible import reproducible_policy
from refmoe.fast.threads import single_blas_thread
from refmoe.files import InputError
from refmoe.model.decoder import Decoder
from refmoe.model.points import FORMS, parse
from refmoe.oracle.caches import read_cache
from refmoe.oracle.cause import describe_error
from refmoe.oracle.envelope import Envelope, Lens, sample_envelope
from refmoe.oracle.forms.place import Placed, place
from refmoe.oracle.forms.ranks import Joined, join_ranks, wrong_ranks
from refmoe.oracle.judge import Judgement, PromptResult, Report, joined
from refmoe.oracle.listing.undo import impossible, undo
from refmoe.oracle.listing.vocabulary import Vocabulary
from refmoe.oracle.noise import UNIT
from refmoe.oracle.profiles import read_profile
from refmoe.oracle.readers.adapt import adapt
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.readers.logprobs import settle_dump
from refmoe.oracle.settle import Bench, Declared, cause_of, settle
from refmoe.oracle.statistics import ALPHA, RUNS
from refmoe.progress import Said, say_nothing
from refmoe.run.load import Model

VERDICTS = ("fault", "undecidable", "pass")  # the worst first


def check(
    model: Model,
    dump: Dump,
    tokens: Sequence[int] | Sequence[Sequence[int]] | None = None,
    *,
    engine: str | None = None,
    profile: Profile | str | None = None,
    alpha: float = ALPHA,
    runs: int = RUNS,
    keep: bool = True,
    conventions: Iterable[str] = (),
    cache: str | None = None,
) -> Report:
    """Judge a dump of the same tokens and weights.

    tokens       of the dump, or of each of its prompts; without them, those that its file has, or
                 that the rows of its embedding name
    engine       whose conventions it is to be held to; None: refmoe's, and a free choice of another
                 engine that explains the dump leaves it undecided
    profile      its precision, as `read_profile` reads it; None: guessed from the values
    alpha        chance of a false alarm in the whole report
    runs         emulated runs that an envelope is sampled from
    keep         False: sample the envelope anew, and leave nothing on disk
    conventions  NAME=VALUE each, in place of the engine's sides
    cache        type of the cache where it is narrower than the tensors, a key of `CACHES`
    Raises `InputError` where tokens are missing, or a name is unknown.
    """
    case = judge_dump(
        model, dump, tokens, engine, profile, alpha, runs, keep, True, conventions, cache
    )
    return case.report


@single_blas_thread()
def judge_dump(
    model: Model,
    dump: Dump,
    tokens: Sequence[int] | Sequence[Sequence[int]] | None = None,
    engine: str | None = None,
    profile: Profile | str | None = None,
    alpha: float = ALPHA,
    runs: int = RUNS,
    keep: bool = True,
    explain: bool = True,
    conventions: Iterable[str] = (),
    cache: str | None = None,
    progress: Said = say_nothing,
) -> Judgement:
    """Judge a dump as `check` does, and return all that the report rests on.

    Where the dump has several prompts, or rows that were computed again, each is judged, and what
    is returned is of the first that is wrong; its report tells of all.
    explain   False: do not look for the cause of a fault, nor for settings that would explain it
    progress  is told what is being done, and how much of it is done
    """
    declared = _declared(engine, profile, list(conventions), cache)
    decoder = model.decoder.using(reproducible_policy("float64", declared.sides))
    ranks = tuple(adapt(arrays, model.cfg) for arrays in dump.ranks)
    dump = replace(dump, arrays=adapt(dump.arrays, model.cfg), ranks=ranks)
    if "absorbed" in forms_of(dump.arrays):
        decoder = decoder.using(replace(decoder.nx, attention="absorbed"))
    joined_ranks = join_ranks(dump, model.cfg)
    placed = [
        replace(p, label=", ".join(filter(None, (j.label, p.label))), notes=j.notes + p.notes)
        for j in joined_ranks
        for p in _placed(model, decoder, j.dump, tokens)
    ]
    found = []
    for each in placed:
        chance = alpha / len(placed)
        how = (decoder.nx.attention, chance, runs, keep, each.before, progress)
        bench = Bench(model, each.dump, each.tokens, engine or "refmoe", *how)
        case = settle(bench, declared, explain)
        case = _with_place(case, each, joined_ranks[0])
        found.append(_undone(model, case, runs, keep))
    return _first_wrong(found, [p.label for p in placed], alpha, explain, progress)


def _placed(
    model: Model,
    decoder: Decoder,
    dump: Dump,
    tokens: Sequence[int] | Sequence[Sequence[int]] | None,
) -> list[Placed]:
    """Return the sequences of a dump with their tokens; texts of log-probabilities become ids."""
    if dump.listing is None:
        return place(dump, decoder, tokens)
    every = [replace(dump, others=()), *dump.others]
    given: list[Any] = [tokens] * len(every)
    if tokens is not None and len(tokens) and not isinstance(tokens[0], int | np.integer):
        if len(tokens) != len(every):
            raise InputError(
                f"{dump.path}: {len(every)} sequences, and the tokens of {len(tokens)} prompts"
            )
        given = list(tokens)
    words = None
    if any(d.top is None for d in every) or tokens is not None:
        words = Vocabulary(model.tokenizer) if model.checkpoint.has_words else None
    out = []
    for n, (each, own) in enumerate(zip(every, given, strict=True)):
        if each.top is None or own is not None:
            each = settle_dump(each, own, words, model.bos)
        assert each.tokens is not None
        label = f"sequence {n + 1}" if len(every) > 1 else ""
        out.append(Placed(label, each.tokens, each, None, each.notes))
    return out


def _declared(
    engine: str | None, profile: Profile | str | None, conventions: list[str], cache: str | None
) -> Declared:
    """Return what a user said of an engine; raise `InputError` for an unknown name or value."""
    if isinstance(profile, str):
        profile = read_profile(profile)
    sides = read_conventions(engine or "refmoe", conventions)
    pinned = frozenset(setting.partition("=")[0] for setting in conventions)
    cache = read_cache(cache)
    if profile is not None and profile.cache not in (None, *UNIT):
        cache = cache or profile.cache  # what is deterministic is recomputed, and is no noise
    if profile is not None and cache is not None:
        profile = replace(profile, cache=None)
    return Declared(engine, sides, pinned, profile, cache)


def forms_of(names: Iterable[str]) -> set[str]:
    """Return the forms of attention of which a dump has points that only they compute."""
    points = (parse(n.removesuffix("#sketch")).point for n in names)
    return {p.where for p in points if p is not None and p.where in FORMS}


def _with_place(case: Judgement, placed: Placed, ranks: Joined) -> Judgement:
    """Return a judgement whose report says what `place` had to do, and which rank is wrong."""
    report = replace(case.report, notes=placed.notes)
    point = report.point
    if point in ranks.split and point in case.exact.theirs and point in case.exact.ours:
        said = wrong_ranks(case.exact.ours[point], case.exact.theirs[point], ranks.parts)
        report = replace(report, notes=(*placed.notes, said) if said else placed.notes)
    if placed.wrong_tokens is not None and report.verdict == "pass":
        reason = f"wrong list of tokens: {placed.wrong_tokens}; with its own, {report.reason}"
        report = replace(report, verdict="undecidable", reason=reason)
    elif placed.wrong_tokens is not None:
        note = f"wrong list of tokens: {placed.wrong_tokens}; judged with its own"
        report = replace(report, notes=(*report.notes, note))
    return replace(case, report=report)


def _first_wrong(
    found: list[Judgement], labels: list[str], alpha: float, explain: bool, progress: Said
) -> Judgement:
    """Return the first judgement of the worst verdict, with a report that tells of all."""
    worst = min(found, key=lambda c: VERDICTS.index(c.report.verdict))
    report = worst.report
    if explain and report.verdict == "fault" and report.cause is None:
        cause = cause_of(worst, progress)
        shape = None if cause or report.passes_under else describe_error(worst)
        report = replace(report, cause=cause, shape=shape)
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


def _undone(model: Model, found: Judgement, runs: int, keep: bool) -> Judgement:
    """Return the judgement after what was done to log-probabilities is known and undone."""
    identity = model.checkpoint.identity if keep else None

    def sample(lenses: Mapping[str, Lens]) -> Envelope:
        return sample_envelope(found.decoder, found.profile, found.tokens, lenses, runs, identity)

    case = found
    wrong = impossible(case)
    if wrong is not None and case.report.verdict == "pass":
        case = replace(
            case, report=replace(case.report, verdict="fault", point="lm_head", reason=wrong)
        )
    return undo(case, sample, model.tokenizer if model.checkpoint.has_words else None)


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
