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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import log
from typing import Any

import numpy as np

from refmoe.engines import Profile, find_profile, profile_of
from refmoe.fast.reproducible import reproducible_policy
from refmoe.fast.threads import single_blas_thread
from refmoe.files import InputError
from refmoe.oracle.cause import describe_error, find_cause
from refmoe.oracle.envelope import Envelope, Lens, sample_envelope
from refmoe.oracle.judge import Judgement, Report, judge
from refmoe.oracle.listing.undo import impossible, undo
from refmoe.oracle.listing.vocabulary import Vocabulary
from refmoe.oracle.readers.adapt import adapt
from refmoe.oracle.readers.base import Dump
from refmoe.oracle.readers.logprobs import settle_dump
from refmoe.oracle.replay import replay
from refmoe.oracle.statistics import ALPHA, RUNS
from refmoe.run.load import Model


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

    tokens   of the dump; without them, those that its file has
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
    tokens: Sequence[int] | None = None,
    engine: str = "refmoe",
    profile: Profile | str | None = None,
    alpha: float = ALPHA,
    runs: int = RUNS,
    keep: bool = True,
    explain: bool = True,
) -> Judgement:
    """Judge a dump as `check` does, and return all that the report rests on.

    explain  False: do not look for the cause of a fault
    """
    if isinstance(profile, str):
        profile = find_profile(profile)
    if dump.others:
        every = [replace(dump, others=()), *dump.others]
        return worst_of(
            [
                judge_dump(model, d, tokens, engine, profile, alpha, runs, keep, explain)
                for d in every
            ]
        )
    if dump.listing is not None:
        dump = _settled(model, dump, tokens)
        tokens = dump.tokens
    tokens = dump.tokens if tokens is None else tokens
    if tokens is None:
        raise InputError(f"{dump.path}: it does not say its tokens; give them (--tokens FILE)")
    decoder = model.decoder.using(reproducible_policy("float64", engine))  # refuses unknown engines
    profile = profile or profile_of(dump.rounded, engine)
    dump = replace(dump, arrays=adapt(dump.arrays, model.cfg))
    exact = replay(dump, decoder, tokens)
    identity = model.checkpoint.identity if keep else None
    precision, ids = profile, tokens  # the narrowed ones, for what follows

    def sample(lenses: Mapping[str, Lens]) -> Envelope:
        return sample_envelope(decoder, precision, ids, lenses, runs, identity)

    found = judge(decoder, dump, tokens, exact, sample(exact.lenses), engine, profile, alpha)
    found = _listed(model, found, sample)
    if not explain or found.report.verdict != "fault" or found.report.cause is not None:
        return found
    cause = find_cause(found)
    shape = None if cause else describe_error(found)
    return replace(found, report=replace(found.report, cause=cause, shape=shape))


def _settled(model: Model, dump: Dump, tokens: Sequence[int] | None) -> Dump:
    """Return a dump of log-probabilities with its tokens, texts turned into ids."""
    if tokens is None and dump.top is not None:
        return dump
    words = Vocabulary(model.tokenizer) if model.checkpoint.has_words else None
    return settle_dump(dump, tokens, words, model.bos)


def _listed(
    model: Model, found: Judgement, sample: Callable[[Mapping[str, Lens]], Envelope]
) -> Judgement:
    """Return the judgement after what was done to log-probabilities is known and undone."""
    wrong = impossible(found)
    if wrong is not None and found.report.verdict == "pass":
        found = replace(
            found, report=replace(found.report, verdict="fault", point="lm_head", reason=wrong)
        )
    words = model.tokenizer if model.checkpoint.has_words else None
    return undo(found, sample, words)


def worst_of(every: Sequence[Judgement]) -> Judgement:
    """Return the worst of the judgements of several sequences, which says how many there are."""
    order = ("pass", "undecidable", "fault")
    worst = max(range(len(every)), key=lambda n: (order.index(every[n].report.verdict), -n))
    verdicts = [case.report.verdict for case in every]
    told = ", ".join(f"{verdicts.count(v)} {v}" for v in order if v in verdicts)
    note = f"of {len(every)} sequences, judged one by one ({told}), this is number {worst + 1}"
    case = every[worst]
    compared = sum(c.report.compared for c in every)
    report = replace(case.report, compared=compared, notes=(note, *case.report.notes))
    return replace(case, report=report)


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
