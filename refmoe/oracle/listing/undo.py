"""Find out what was done to listed log-probabilities, undo it where it is a form, and judge anew.

A hypothesis (solve.py) is accepted only if the rows, judged against what it makes of our logits and
against an envelope sampled of that, are within their rounding. The one with the fewest fitted
numbers wins. Then

    a form           another base, logits in place of log-probabilities, log-probabilities in place
                     of logits, or anything where the response itself says that its probabilities
                     are of after sampling: judged after undoing it, a pass with a note
    anything else    temperature, a list made to sum to 1, penalties, a bias, rows one position off:
                     a fault, for raw log-probabilities were expected; it is the cause
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from refmoe.oracle.envelope import Envelope, Lens
from refmoe.oracle.judge import Cause, Judgement, judge
from refmoe.oracle.listing.processing import Listed, Processing
from refmoe.oracle.listing.solve import Problem, hypotheses
from refmoe.oracle.noise import rms
from refmoe.text.tokenizer import Tokenizer

POINT = "lm_head"
PROMISING = 8.0  # times the noise of the rows: beyond it no envelope is sampled
ENTRIES = 4  # numbers that must be listed, and as many for each that is fitted
TRIED = 3  # envelopes that are sampled for one dump
NEARER = 1.5  # times what the best leaves: beyond it a simpler hypothesis is not what was done
FLOOR = 1e-3  # of the noise: two hypotheses that leave less are equally near
ALIKE = 1.1  # of two that leave so nearly the same, the numbers decide nothing
TIE = 0.5  # nats by which a token must be likelier than a listed one to be missed
NORMAL = 1e-2  # log of what the probabilities of a row sum to, if they are all there

Sample = Callable[[Mapping[str, Lens]], Envelope]


def undo(case: Judgement, sample: Sample, words: Tokenizer | None = None) -> Judgement:
    """Return the judgement after what was done to log-probabilities is known.

    sample  makes the envelope of these lenses
    words   spell a token; without them it is its id
    """
    if case.report.verdict != "fault" or case.report.point != POINT:
        return case
    problem = _problem(case)
    if problem is None:
        return case
    ways = _promising(problem, case)
    for way, _ in ways[:TRIED]:
        found = _judge_again(case, way, problem, sample)
        if found.report.verdict == "pass":
            return _accepted(case, found, way, ways, words)
    return case


def _problem(case: Judgement) -> Problem | None:
    """Return what is to be explained: the listed rows, or a whole lm_head that sums to 1."""
    full = case.exact.logits
    if full is None or POINT not in case.exact.theirs or POINT not in case.rows:
        return None
    noise = np.sqrt((case.rows[POINT].noise ** 2).mean(axis=0))
    level = np.maximum(noise * rms(case.exact.ours[POINT]), 1e-12)
    level = np.maximum(level, level.mean() / 10)
    tokens = case.tokens
    prompt = len(tokens) if case.dump.generated is None else case.dump.generated
    if case.dump.top is not None:
        ids, values = case.dump.top
        rows = np.flatnonzero(((ids >= 0) & np.isfinite(values)).any(axis=1))
        listed = Listed(tokens, rows, ids[rows], values[rows], prompt)
    else:
        theirs = case.exact.theirs[POINT]
        if theirs.shape != full.shape or not _sums_to_one(theirs):
            return None
        ids = np.broadcast_to(np.arange(full.shape[1]), full.shape)
        listed = Listed(tokens, np.arange(len(full)), ids, theirs, prompt)
    nothing = (np.zeros((0, 0), int), np.zeros((0, 0)))
    return Problem(full, listed, level, case.dump.top or nothing)


def _sums_to_one(rows: np.ndarray) -> bool:
    """Tell whether these are logarithms of probabilities of all tokens."""
    most = rows.max(axis=1, keepdims=True)
    totals = np.log(np.exp(rows - most).sum(axis=1)) + most[:, 0]
    return bool((np.abs(totals) < NORMAL).all())


def _promising(problem: Problem, case: Judgement) -> list[tuple[Processing, float]]:
    """Return the hypotheses that leave little, with what they leave, the simplest first.

    A simple one is dropped where another leaves far less: it is but near to what was done.
    """
    entries = int(problem.listed.finite.sum())
    whole = case.dump.top is None
    out = []
    for way in hypotheses(problem):
        if entries < ENTRIES * (1 + way.parameters) or not (way.ids or whole):
            continue
        left = problem.misfit(way)
        if left <= PROMISING and _lists_the_kept(problem, way) and _forbids(problem, way):
            out.append((way, left))
    least = min((left for _, left in out), default=0.0)
    return [(way, left) for way, left in out if left <= NEARER * max(least, FLOOR)]


def _forbids(problem: Problem, way: Processing) -> bool:
    """Tell whether a hypothesis forbids what is listed as impossible and is likely here."""
    for t, i in unlikely(problem.full, problem.impossible):
        row = problem.full[t].astype(np.float64)
        forbidden = dict(way.bias).get(i) == -np.inf
        if way.kept is not None and way.kept.rule != "list":
            y = row if way.kept.last else row / way.temperature
            forbidden |= not way.kept.mask(y, np.array([i]))[i]
        if not forbidden:
            return False
    return True


def _lists_the_kept(problem: Problem, way: Processing) -> bool:
    """Tell whether no token that is left out of a list which sums to 1 is likelier than its own.

    The last but one listed is the bound, as the token that was drawn is listed however unlikely.
    """
    if way.kept is None or way.kept.rule != "list":
        return True
    listed = problem.listed
    for row in problem.some().tolist():
        ids = listed.ids[row][listed.finite[row]]
        t = int(listed.rows[row]) + way.shift
        if len(ids) < 2 or not 0 <= t < len(problem.full):
            continue
        z = problem.full[t].astype(np.float64)
        bound = np.sort(z[ids])[1]
        z[ids] = -np.inf
        if z.max() > bound + 4 * problem.level[row] + 1e-6:
            return False
    return True


def _judge_again(case: Judgement, way: Processing, problem: Problem, sample: Sample) -> Judgement:
    """Return the judgement of the rows against what a hypothesis makes of our logits."""
    listed = problem.listed
    rows = np.flatnonzero(way.judged(listed, len(problem.full)))

    def look(full: np.ndarray) -> np.ndarray:
        return way.look(full, listed, rows)

    old = case.exact.lenses[POINT]
    lens = Lens(look, False, old.step, f"{old.key}{way.key}{listed.tokens}")
    theirs = np.where(listed.finite, listed.values, 0)[rows]
    exact = case.exact.with_logits_seen(lens, theirs, listed.rows[rows])
    envelope = sample(exact.lenses)
    report = case.report
    return judge(
        case.decoder,
        case.dump,
        case.tokens,
        exact,
        envelope,
        report.engine,
        case.profile,
        report.alpha,
    )


def _accepted(
    case: Judgement,
    found: Judgement,
    way: Processing,
    ways: Sequence[tuple[Processing, float]],
    words: Tokenizer | None,
) -> Judgement:
    """Return the judgement that says what was done: a pass with a note, or a fault with a cause."""
    token = ""
    if way.bias:
        i = way.bias[0][0]
        token = str(i) if words is None else f"{words.decode([i])!r} ({i})"
    told = way.sentences(token)
    if case.dump.top is None:
        told = ["lm_head holds log-probabilities, not logits", *told]
    if way.is_form or case.dump.sampled:
        note = f"judged after undoing this: {'; '.join(told)}"
        notes = (*case.report.notes, note)
        return replace(found, report=replace(found.report, notes=notes, undone=tuple(told)))
    left = next(x for w, x in ways if w is way)
    others = [(w, x) for w, x in ways if not set(way.ids) <= set(w.ids)]
    alike = [_id(w) for w, x in others if x <= ALIKE * left]
    cause = Cause(
        _id(way), "; ".join(told), (), _numbers(way), None, None, tuple(dict.fromkeys(alike))
    )
    return replace(case, report=replace(case.report, cause=cause))


def _id(way: Processing) -> str:
    """Return the name of a cause: its steps with + between."""
    return "+".join(way.ids)


def _numbers(way: Processing) -> str | None:
    """Return the fitted numbers with their standard errors."""
    healthy = {"temperature": 1, "repetition": 1}
    values = {"bias": way.bias[-1][1] if way.bias else 0.0}
    out = []
    for name, error in dict(way.errors).items():
        value = values.get(name, getattr(way, name, None))
        out.append(f"{name} {value:.6g} ± {error:.1g}, expected {healthy.get(name, 0)}")
    if way.kept is not None and way.kept.rule != "list":
        out.append(f"{way.kept.rule} about {way.kept.number:.3g}, expected none")
    return "; ".join(out) or None


def impossible(case: Judgement) -> str | None:
    """Return a sentence where a row calls a token impossible that is likelier than a listed one."""
    full, top = case.exact.logits, case.dump.top
    if full is None or top is None or len(top[0]) != len(full):
        return None
    for t, i in unlikely(full, top):
        return f"token {i} is said to be impossible after token {t}, where it is likely"
    return None


def unlikely(full: np.ndarray, top: tuple[np.ndarray, np.ndarray]) -> Iterator[tuple[int, int]]:
    """Yield positions and tokens that are listed as impossible and likelier than a listed one.

    full  our logits [T, Z]
    top   ids and numbers [T, K], -inf for a token that cannot come
    """
    ids, values = top
    gone = (ids >= 0) & np.isneginf(values)
    for t in np.flatnonzero(gone.any(axis=1)).tolist():
        finite = (ids[t] >= 0) & np.isfinite(values[t])
        z = full[t].astype(np.float64)
        least = z[ids[t][finite]].min() if finite.any() else z.max()
        yield from ((t, i) for i in ids[t][gone[t]].tolist() if z[i] > least + TIE)
