"""Solve for what was done to log-probabilities: hypotheses with their numbers fitted.

Of each row one slope a and one constant b are seen, theirs = a·ours + b:

    a             one for all rows: 1/temperature, or 1/log(base)
    b             what the rows were normalised over: all (of the heated row), the list, a top-k, a
                  top-p, a min-p; each foretells every row's b from one number
    the position  whose rows they are: this, the next, the previous one
    the rest      entries off this line: tokens that were seen before, or one that has a bias

Nothing here decides: each hypothesis is judged by its own envelope afterwards (undo.py), the ones
with the fewest fitted numbers first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from refmoe.oracle.listing.processing import Kept, Listed, Processing, Scope, logsumexp
from refmoe.oracle.solve import golden_section

ROWS = 128  # that numbers are fitted to, at most
BASES = (2.0, 10.0)
SHIFTS = (1, -1)
SURE = 0.3  # of the noise: what leaves less, without a fitted number, is what was done
FEW = 32  # rows on which a number is sought first
SECTIONS = 8  # of the golden ratio, before least squares
STEPS = 8  # of least squares
TEMPERATURES = np.geomspace(0.05, 20, 31)
DEEPEST = 4096  # likeliest tokens among which a top-k or top-p is sought
BANNED = 5  # tokens that are tried for one that was forbidden
BIASED = 3  # tokens with a bias, at most
EQUAL = 1e-5  # a temperature or factor so near 1 is 1
SCOPES: tuple[Scope, ...] = ("all", "generated", "last 64")


@dataclass(frozen=True)
class Problem:
    """Our logits of a sequence, what is listed of another engine's, and the noise of its rows."""

    full: np.ndarray  # [T, Z]
    listed: Listed
    level: np.ndarray  # [n] noise of a row's numbers, absolute
    impossible: tuple[np.ndarray, np.ndarray]  # ids [T, K] and numbers, -inf where listed as such

    def some(self) -> np.ndarray:
        """Return the rows that numbers are fitted to, evenly spread."""
        n = len(self.listed.rows)
        return np.unique(np.linspace(0, n - 1, min(n, ROWS)).astype(int))

    def predicted(self, way: Processing, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return those of the rows that say anything under a hypothesis, and their numbers."""
        rows = rows[way.judged(self.listed, len(self.full))[rows]]
        return rows, way.look(self.full, self.listed, rows, self.totals)

    @cached_property
    def totals(self) -> np.ndarray:
        """Return log Σ e^z of each row [T]."""
        rows = (logsumexp(row[None].astype(np.float64))[0, 0] for row in self.full)
        return np.fromiter(rows, np.float64, len(self.full))

    def errors(self, way: Processing, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return theirs less what a hypothesis foretells [rows, K], and the rows; 0 for none."""
        rows, ours = self.predicted(way, rows)
        theirs = np.where(self.listed.finite, self.listed.values, 0)[rows]
        return theirs - ours, rows

    def misfit(self, way: Processing, rows: np.ndarray | None = None) -> float:
        """Return the errors' RMS over the noise; infinite where no row says anything."""
        error, rows = self.errors(way, self.some() if rows is None else rows)
        if not len(rows):
            return np.inf
        scale = self.level[rows] * max(1.0, 1 / way.temperature)
        return float(np.sqrt((((error**2).mean(axis=1)) / scale**2).mean()))


def hypotheses(problem: Problem) -> list[Processing]:
    """Return what may have been done, fitted, the fewest numbers first.

    Where one without a fitted number leaves much less than the noise, only those are returned. A
    whole row of logits can only have been heated.
    """
    found = list(_exact())
    if problem.listed.ids.shape[1] == problem.full.shape[1]:
        found = [Processing(), *_heated(problem, Processing())]
    elif min(map(problem.misfit, found[1:])) > SURE:
        found += _fits(problem)
    each: dict[str, Processing] = {}
    for way in found:
        each.setdefault(way.key, way)
    return sorted(each.values(), key=lambda way: way.parameters)


def _exact() -> Iterator[Processing]:
    """Yield the hypotheses without a fitted number; the first is that nothing was done."""
    nothing = Processing()
    for start in (nothing, *(replace(nothing, base=b) for b in BASES)):
        yield start
        yield replace(start, kept=Kept("list"))
    yield replace(nothing, logits=True)
    for shift in SHIFTS:
        yield replace(nothing, shift=shift)
        yield replace(nothing, shift=shift, kept=Kept("list"))


def _fits(problem: Problem) -> Iterator[Processing]:
    """Yield the hypotheses with fitted numbers."""
    nothing = Processing()
    yield from _heated(problem, replace(nothing, logits=True))
    for shift in (0, *SHIFTS):
        start = replace(nothing, shift=shift)
        yield from _kept(problem, start)
        for way in (*_heated(problem, start), *_sloped(problem, start)):
            yield way
            yield replace(way, kept=Kept("list"))
            if not shift:
                yield from _kept(problem, way)
    yield from _penalised(problem)
    yield from _biased(problem)


# --- one number by least squares


def _minimise(loss: Callable[[float], float], grid: np.ndarray) -> float:
    """Return about where a function of one number is least: the best of a grid, then sections."""
    values = [loss(float(x)) for x in grid]
    best = int(np.argmin(values))
    a, b = float(grid[max(0, best - 1)]), float(grid[min(len(grid) - 1, best + 1)])
    return golden_section(loss, a, b, SECTIONS)


def _fitted(
    problem: Problem, start: Processing, name: str, grid: np.ndarray, *others: str
) -> Processing:
    """Return a hypothesis with one number sought on a grid, then all of them by least squares.

    name    of the number that is sought: a field, or bias, the last one's
    others  numbers of the hypothesis that are near their best already
    """
    some = problem.some()
    coarse = some[:: max(1, len(some) // FEW)]
    x = _minimise(lambda x: problem.misfit(_with(start, name, x), coarse), grid)
    return _polished(problem, _with(start, name, x), (name, *others))


def _with(way: Processing, name: str, x: float) -> Processing:
    """Return a hypothesis with another value of one of its numbers."""
    if name == "bias":
        return replace(way, bias=(*way.bias[:-1], (way.bias[-1][0], float(x))))
    return replace(way, **{name: float(x)})  # type: ignore[arg-type]


def _number(way: Processing, name: str) -> float:
    """Return one of the numbers of a hypothesis."""
    return way.bias[-1][1] if name == "bias" else float(getattr(way, name))


def _polished(problem: Problem, way: Processing, names: Sequence[str]) -> Processing:
    """Return a hypothesis after Gauss and Newton's steps, with its numbers' standard errors."""
    errors, least = np.full(len(names), np.inf), problem.misfit(way)
    for _ in range(STEPS):
        steps, errors = _step(problem, way, names)
        moved = way
        for name, step in zip(names, steps, strict=True):
            moved = _with(moved, name, _number(way, name) + step)
        if moved.temperature <= 0 or moved.repetition <= 0:
            break
        left = problem.misfit(moved)
        if not left < least:
            break
        way, least = moved, left
    return replace(way, errors=tuple(zip(names, errors.tolist(), strict=True)))


def _step(problem: Problem, way: Processing, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return by how much numbers should change by least squares, and their standard errors."""
    rest, rows = problem.errors(way, problem.some())
    if not len(rows):
        return np.zeros(len(names)), np.full(len(names), np.inf)
    finite = problem.listed.finite[rows]
    weight = np.broadcast_to(1 / problem.level[rows][:, None], rest.shape)[finite]
    slopes = []
    for name in names:
        x = _number(way, name)
        small = 1e-5 * max(abs(x), 1e-2)
        other = problem.errors(_with(way, name, x + small), rows)[0]
        slopes.append(((rest - other) / small)[finite] * weight)
    g, r = np.array(slopes), rest[finite] * weight
    inverse = np.linalg.pinv(g @ g.T)
    left = float((r * r).sum()) / max(1, len(r) - len(names))
    return inverse @ (g @ r), np.sqrt(np.maximum(np.diag(inverse), 0) * left)


# --- temperature


def _heated(problem: Problem, start: Processing) -> Iterator[Processing]:
    """Yield the temperature that fits best, every row normalised over all tokens."""
    way = _fitted(problem, start, "temperature", TEMPERATURES)
    if abs(way.temperature - 1) > EQUAL:
        yield way


def _sloped(problem: Problem, start: Processing) -> Iterator[Processing]:
    """Yield the temperature that differences within the rows show, whatever their constants."""
    listed, rows = problem.listed, problem.some()
    rows = rows[start.judged(listed, len(problem.full))[rows]]
    finite = listed.finite[rows]
    both = finite.sum(axis=1) > 1
    if not both.any():
        return
    x = start.look(problem.full, listed, rows)[both]
    finite = finite[both]
    n = finite.sum(axis=1, keepdims=True)
    y = np.where(finite, listed.values[rows][both], 0)
    x, y = (np.where(finite, v - v.sum(axis=1, keepdims=True) / n, 0) for v in (x, y))
    slope = float((x * y).sum() / max((x * x).sum(), 1e-300))
    if slope > 0 and abs(1 / slope - 1) > EQUAL:
        left = ((y - slope * x) ** 2).sum() / max(1, int(finite.sum()) - len(x) - 1)
        error = float(np.sqrt(left / max((x * x).sum(), 1e-300)) / slope**2)
        yield replace(start, temperature=1 / slope, errors=(("temperature", error),))


# --- what rows are normalised over


def _kept(problem: Problem, start: Processing) -> Iterator[Processing]:
    """Yield a top-k, a top-p and a min-p whose normalisers are nearest to the rows' constants."""
    for last in (False, True) if start.temperature != 1 else (False,):
        sums = _row_sums(problem, start, last)
        if sums is None:
            continue
        total, ordered, wanted = sums
        # sums of e^y over the likeliest tokens of each row, over the whole: [n, D]
        share = np.cumsum(total, axis=1)
        off = np.abs(np.log(share) - wanted[:, None])
        k = int(np.argmin((off**2).sum(axis=0))) + 1
        yield replace(start, kept=Kept("top-k", k, last))
        taken = off.argmin(axis=1)  # tokens that each row keeps, less one
        every = np.arange(len(taken))
        mass = np.cumsum(ordered, axis=1)
        low = np.where(taken > 0, mass[every, taken - 1], 0)
        yield from _inside(start, "top-p", low, mass[every, taken], last)
        ratio = ordered / ordered[:, :1]
        after = np.minimum(taken + 1, ratio.shape[1] - 1)
        yield from _inside(start, "min-p", ratio[every, after], ratio[every, taken], last)


def _row_sums(
    problem: Problem, start: Processing, last: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return probabilities of the likeliest tokens of each row, and the log-sums that are wanted.

    Returns those of the heated row [n, D], of the row that a rule is applied to [n, D], and the
    logarithm of what the kept ones sum to [n]. None where no row was normalised over less than all.
    """
    listed, rows = problem.listed, problem.some()
    error, rows = problem.errors(start, rows)
    finite = listed.finite[rows]
    constant = np.array(
        [np.median(e[f]) if f.any() else 0 for e, f in zip(error, finite, strict=True)]
    )
    if not len(rows) or constant.max() <= 3 * _scatter(error, finite) or constant.min() < -0.5:
        return None
    depth = min(DEEPEST, problem.full.shape[1])
    total: list[np.ndarray] = []
    ordered: list[np.ndarray] = []
    for row in rows.tolist():
        z = problem.full[listed.rows[row] + start.shift].astype(np.float64)
        y = z / start.temperature
        order = np.argsort(-z, kind="stable")[:depth]
        for values, into in ((y, total), (z if last else y, ordered)):
            p = np.exp(values - values.max())
            into.append(p[order] / p.sum())
    return np.array(total), np.array(ordered), -np.maximum(constant, 0)


def _scatter(error: np.ndarray, finite: np.ndarray) -> float:
    """Return the RMS of errors about the middle of their rows."""
    some = finite.sum(axis=1) > 1
    if not some.any():
        return 0.0
    middle = np.array([np.median(e[f]) for e, f in zip(error[some], finite[some], strict=True)])
    rest = (error[some] - middle[:, None])[finite[some]]
    return float(np.sqrt((rest**2).mean()))


def _inside(
    start: Processing, rule: str, low: np.ndarray, high: np.ndarray, last: bool
) -> Iterator[Processing]:
    """Yield a threshold that lies between what most rows keep and what they drop.

    A round one is taken where there is one.
    """
    a, b = float(np.quantile(low, 0.9)), float(np.quantile(high, 0.1))
    if low.max() < high.min():
        a, b = float(low.max()), float(high.min())
    if not 0 <= a < b:
        return
    digits = next((d for d in range(1, 5) if np.ceil(a * 10**d + 1e-9) <= b * 10**d), None)
    number = (a + b) / 2 if digits is None else float(np.ceil(a * 10**digits + 1e-9) / 10**digits)
    if 0 < number < 1:
        yield replace(start, kept=Kept(rule, number, last))  # type: ignore[arg-type]


# --- single tokens


def _penalised(problem: Problem) -> Iterator[Processing]:
    """Yield penalties of tokens that came before, one of them or two."""
    listed, rows = problem.listed, problem.some()
    for scope in SCOPES:
        seen, times = (x[rows] for x in listed.counts(scope))
        again = (listed.ids[rows][:, :, None] == np.where(times > 0, seen, -2)[:, None]).any(axis=2)
        if not (again & listed.finite[rows]).any():
            continue
        start = Processing(scope=scope)
        free = np.concatenate((-np.geomspace(4, 0.05, 8), np.geomspace(0.05, 4, 8)))
        grids = {"presence": free, "frequency": free, "repetition": np.geomspace(0.5, 3, 16)}
        for name, grid in grids.items():
            one = _fitted(problem, start, name, grid)
            yield one
            yield _fitted(problem, one, "temperature", TEMPERATURES, name)
            if name == "presence":
                yield _fitted(problem, one, "frequency", free, name)


def _biased(problem: Problem) -> Iterator[Processing]:
    """Yield biases of tokens whose entries are off their rows, and a token that was forbidden."""
    listed = problem.listed
    way = Processing()
    for _ in range(BIASED):
        error, rows = problem.errors(way, problem.some())
        suspect = _most_off(problem, error, rows)
        if suspect is None:
            break
        own = dict(way.bias)
        if suspect in own:
            break
        grid = np.concatenate((-np.geomspace(30, 0.1, 14), np.geomspace(0.1, 30, 14)))
        way = _fitted(problem, replace(way, bias=(*way.bias, (suspect, 0.0))), "bias", grid)
        yield way
    error, rows = problem.errors(Processing(), problem.some())
    if not len(rows):
        return
    finite = listed.finite[rows]
    constant = np.array([np.median(e[f]) for e, f in zip(error, finite, strict=True)])
    worst = int(constant.argmax())
    if constant[worst] <= 3 * _scatter(error, finite):
        return
    z = problem.full[listed.rows[rows[worst]]].astype(np.float64)
    p = np.exp(z - z.max())
    p /= p.sum()
    p[listed.ids[rows[worst]][finite[worst]]] = -1
    near = np.argsort(np.abs(p - (1 - np.exp(-constant[worst]))))[:BANNED]
    yield from (Processing(bias=((int(i), -np.inf),)) for i in near)


def _most_off(problem: Problem, error: np.ndarray, rows: np.ndarray) -> int | None:
    """Return the listed token whose entries are furthest from the middle of their rows."""
    listed = problem.listed
    off: dict[int, list[float]] = {}
    for e, row in zip(error, rows.tolist(), strict=True):
        f = listed.finite[row]
        if f.sum() > 2:
            middle = np.median(e[f])
            for i, x in zip(listed.ids[row][f].tolist(), (e[f] - middle).tolist(), strict=True):
                off.setdefault(i, []).append(x)
    score = {i: abs(float(np.sum(x))) for i, x in off.items()}
    return max(score, key=lambda i: score[i], default=None)
