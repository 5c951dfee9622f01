"""Find the positions of a dump's rows by what the rows hold.

A server that took a prefix from its cache computes the last rows only; a batch is padded at either
end; a scheduler puts chunks of several prompts into one array, overlapping or in turns. Each row is
compared with what the network computes at every position:

    d[r, p] = mean over tensors of (1 - cos(row r, our row at p)), in units of its median

and the rows are aligned by dynamic programming: to go on to the next position is free, a jump costs
`JUMP`, a row that belongs nowhere (padding) costs `NOWHERE`. A fault of the engine adds to all
positions alike, so that rows are found in a wrong engine too.
"""

from collections.abc import Sequence

import numpy as np

JUMP = 0.2  # of a median distance
NOWHERE = 0.7
PLACED = 0.5  # mean distance above which rows are not placed: they fit here no better than there
NONE = -1  # the position of a row that belongs nowhere


def distances(theirs: Sequence[np.ndarray], ours: Sequence[np.ndarray]) -> np.ndarray:
    """Return d [n, P] of n rows and P positions; each pair of arrays is [n, ...] and [P, ...]."""
    total = np.zeros((len(theirs[0]), len(ours[0])))
    for a, b in zip(theirs, ours, strict=True):
        x, y = _unit_rows(a), _unit_rows(b)
        d = 1 - x @ y.T
        middle = np.median(d)
        total += d / middle if middle > 0 else 1.0
    return total / len(theirs)


def _unit_rows(x: np.ndarray) -> np.ndarray:
    """Return rows of length one; rows of zeros, or not finite, stay or become zeros."""
    flat = x.reshape(len(x), -1).astype(np.float64)
    flat = np.where(np.isfinite(flat).all(axis=1, keepdims=True), flat, 0)
    length = np.sqrt((flat * flat).sum(axis=1, keepdims=True))
    return np.divide(flat, length, out=np.zeros_like(flat), where=length > 0)


def align(d: np.ndarray, starts: Sequence[int] = (0,)) -> np.ndarray | None:
    """Return the position of each row [n], NONE for padding; None where the rows fit nowhere.

    d       distances [n, P] of the rows to the positions of all prompts, one after the other
    starts  positions at which a prompt begins: there a first row costs no jump
    """
    n, P = d.shape
    begins = np.full(P, JUMP)
    begins[list(starts)] = 0
    begins[[s - 1 for s in (*starts[1:], P)]] = 0  # a last row alone is as usual as a first
    cost = np.append(d[0] + begins, NOWHERE)
    came = np.zeros((n, P + 1), int)
    came[0] = NONE
    for r in range(1, n):
        cheapest = int(np.argmin(cost))
        leap = cost[cheapest] + JUMP
        step = np.append(np.inf, cost[: P - 1])
        step[list(starts)] = np.inf  # a prompt does not go on from the one before
        into = np.minimum(step, leap)
        came[r, :P] = np.where(step <= leap, np.arange(P) - 1, cheapest)
        stay, leave = cost[P], leap
        came[r, P] = P if stay <= leave else cheapest
        cost = np.append(d[r] + into, NOWHERE + min(stay, leave))
    out = np.empty(n, int)
    at = int(np.argmin(cost))
    for r in range(n - 1, -1, -1):
        out[r], at = at, int(came[r, at])
    out[out == P] = NONE
    placed = np.flatnonzero(out >= 0)
    if not len(placed) or d[placed, out[placed]].mean() > PLACED:
        return None
    return out


def visits(positions: np.ndarray) -> list[np.ndarray]:
    """Split rows [n] into sets that have every position once, in its order: a list of row numbers.

    The second time that a position comes, as in chunks that overlap, is of the second set.
    """
    seen: dict[int, int] = {}
    sets: list[list[int]] = []
    for row, p in enumerate(positions.tolist()):
        if p == NONE:
            continue
        time = seen.get(p, 0)
        seen[p] = time + 1
        if time == len(sets):
            sets.append([])
        sets[time].append(row)
    return [np.array(sorted(rows, key=lambda r: positions[r])) for rows in sets]


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers in few letters: `0 to 3, 7`."""
    runs: list[list[int]] = []
    for i in numbers:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)
