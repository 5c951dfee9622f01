"""Solve for a constant of the model at the first wrong point: its value, and how well it is known.

    u    = ln v or v                              v: the constant
    r(u) = (theirs - ours(u)) / noise             of every number; ours(u): replayed with v
    u'   = u + J·r / J·J,  J = ∂ ours/∂u / noise  Gauss and Newton, J from the last two replays
    σ²   = max(1 / J·J, Σ_rows (J·r)² / (J·J)²) + Σ_rows (J·s)² / (J·J)²

s is an error of two unit roundoffs that all numbers of a row share, as of a norm's mean, and the
second form holds where the errors of a row go together, as those of one angle do.

The first replays lie on a coarse grid over the values that the constant can have. Of an angle,
which turns with the position, the misfit has many minima over a long prompt and one over a short:
the search begins with the first rows and doubles them. An offset of positions is read from the
phases of the pairs, the window of a mask from the first row that is wrong.

A constant explains the engine where what it leaves is within the envelope at this point and at all
others of the layer, is at most a quarter of the error, and the value is not the right one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import exp, inf, isfinite, log
from typing import NamedTuple

import numpy as np

from refmoe.model.decoder import Decoder
from refmoe.model.points import kind, parse
from refmoe.model.rope import inv_freq
from refmoe.oracle.faults.base import Fault
from refmoe.oracle.faults.constants import CONSTANTS, SINKS, Constant, known_values, shows
from refmoe.oracle.judge import Judgement, Solved
from refmoe.oracle.noise import UNIT, rms
from refmoe.oracle.replay import Replay
from refmoe.oracle.statistics import row_levels

Replayed = Callable[[Fault], Replay]  # the layer, on the engine's own inputs

LEFT = 0.25  # of the squared error, at most, or the constant does not explain it
SURE = 6.0  # deviations that the value must be from the right one
GRID = 9  # coarse values, over the whole range
STEPS = 12  # of Gauss and Newton
FIRST_ROWS = 32  # that a search for an angle begins with
SHORT = (
    *range(-6, 11),
    12,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
)  # offsets of queries that are tried where no phases are seen
SINKS_TRIED = (0, 1, 2, 4, 8, 16, 32, 64, 128)
FLOOR = 8.0  # unit roundoffs: no constant is known better than what is computed from it
SAME = 3.0  # deviations within which a value is another model's


@dataclass(frozen=True)
class Found:
    """A constant with the value that leaves least of the error at the failing point."""

    constant: Constant
    fault: Fault  # an engine with this value
    solved: Solved
    text: str  # a sentence for a verdict
    fitted: str  # value, deviation, expected
    spread: float  # σ² over that of independent errors, at least 1


def solve_constants(
    case: Judgement, point: str, kinds: list[str], replayed: Replayed, only: str | None = None
) -> Iterator[Found]:
    """Yield the constants that may explain the first wrong point, each with its value.

    kinds     of the points that are judged with it, itself among them
    replayed  computes the layer as an engine with this fault, on the engine's own inputs
    only      the constants that this fault of the dictionary is a value of; None: all
    What is left at the other points of the layer is for the caller to judge.
    """
    if point not in case.rows or point.endswith("#experts"):
        return
    for constant in CONSTANTS:
        if shows(constant, case.decoder.cfg, kinds) and (only is None or only in constant.faults):
            found = _Search(case, point, constant, replayed).run()
            if found is not None:
                yield found


def noise_of(case: Judgement, point: str) -> np.ndarray:
    """Return the noise of every number of each row of a point, [T, 1]."""
    level = row_levels((case.rows[point].noise ** 2).mean(axis=0))
    size = rms(case.exact.ours[point])
    return (level * np.where(size > 0, size, 1))[:, None]


def related(id: str) -> tuple[str, ...]:
    """Return the names of the constants that this fault of the dictionary is a value of."""
    return tuple(c.name for c in CONSTANTS if id in c.faults)


class _Reached(Exception):
    """The failing point has been computed, and nothing else is wanted."""


def _until(fault: Fault, point: str) -> Fault:
    """Return the fault in a decoder that computes no further than this point."""

    def alter(decoder: Decoder, layer: int | None) -> Decoder:
        inside = decoder.nx.watch
        assert inside is not None

        def watch(path: str, x: np.ndarray) -> np.ndarray:
            x = inside(path, x)
            if path == point:
                assert isinstance(inside, Replay)
                raise _Reached(inside.ours.get(point))
            return x

        return fault.alter(decoder.using(decoder.nx.watching(watch)), layer)

    return replace(fault, alter=alter)


class _Fit(NamedTuple):
    """The best value, or its place on the scale, and what it leaves."""

    value: float
    sigma: float | None  # None: no neighbour of a whole number fits
    left: np.ndarray
    spread: float = 1.0  # σ² over that of independent errors


class _Search:
    """One constant, at one point: replays and their misfits."""

    def __init__(self, case: Judgement, point: str, constant: Constant, replayed: Replayed):
        self.case, self.point, self.constant, self.replayed = case, point, constant, replayed
        self.theirs = case.exact.theirs[point].reshape(len(case.exact.theirs[point]), -1)
        self.at = case.exact.positions(point)
        self.noise = noise_of(case, point)
        self.shared = 2 * UNIT[case.profile.sums] * self.theirs / self.noise
        self.right = constant.value(case.decoder.cfg, case.decoder.nx.conventions)
        self.error = self.residual(case.exact.ours[point].reshape(self.theirs.shape))
        self.log = constant.scale == "log"
        through = (point, *case.report.judged_with(point))
        # end to end, many things look like a constant at some value: only others' values count
        self.wide = len({parse(p).layer for p in through}) > 2

    # --- replays

    def residual(self, ours: np.ndarray) -> np.ndarray:
        """Return what a hypothesis leaves of every number, in units of its noise."""
        out: np.ndarray = (self.theirs - ours) / self.noise
        return out

    def ours(self, value: float) -> np.ndarray | None:
        """Return the point as an engine with this value has it; None where it is not finite."""
        fault = _until(self.constant.at(value), self.point)
        x = None
        try:
            x = self.replayed(fault).ours.get(self.point)
        except _Reached as reached:
            x = reached.args[0]
        if x is None or x.size != self.theirs.size or not np.isfinite(x).all():
            return None
        return x.reshape(self.theirs.shape)

    def left(self, value: float) -> np.ndarray | None:
        """Return the residual at a value."""
        ours = self.ours(value)
        return None if ours is None else self.residual(ours)

    # --- the value

    def run(self) -> Found | None:
        """Return the constant with its best value; None where that does not explain the point."""
        if not isfinite(float((self.error**2).sum())):
            return None
        if self.wide and self.constant.scale in ("offset", "window"):
            return None
        match self.constant.scale:
            case "log" | "linear":
                best = self.continuous()
            case "offset":
                best = self.among(self.offsets())
            case "window":
                best = self.among(self.windows())
        if best is None:
            return None
        value, sigma, left, _ = best
        sure = sigma is None or abs(value - self.right) > SURE * sigma
        if (left**2).sum() > LEFT * (self.error**2).sum() or not sure or value == self.right:
            return None
        found = self.found(best)
        return None if self.wide and not found.solved.whose else found

    def continuous(self) -> _Fit | None:
        """Return the fit of a constant that can have any value; None where none explains."""
        for rows, u in self.starts():
            fit = self.refined(rows, u)
            if fit is not None and (fit.left**2).sum() <= LEFT * (self.error**2).sum():
                value = self.value(fit.value)
                sigma = (fit.sigma or 0) * (value if self.log else 1)
                return fit._replace(value=value, sigma=sigma)
        return None

    def refined(self, rows: int, u: float) -> _Fit | None:
        """Return the best u near this one, over so many first positions, then twice as many, …"""
        while True:
            chosen = self.at < rows
            fit = self.newton(u, chosen)
            if fit is None or rows > self.at.max():
                return fit
            shown = (self.error[chosen] ** 2).sum()
            if shown > 4 * self.error[chosen].size and (fit.left[chosen] ** 2).sum() > shown / 2:
                return None
            rows, u = 2 * rows, fit.value

    def starts(self) -> list[tuple[int, float]]:
        """Return how many first positions to begin with, and the coarse value that is best there.

        These are the fewest that show the constant, and those of which a value explains most.
        """
        c = self.constant
        low, high = (log(c.low), log(c.high)) if c.scale == "log" else (c.low, c.high)
        grid = [self.u(self.right)] if self.right > 0 or c.scale == "linear" else []
        if self.wide:
            grid = sorted({self.u(v) for v in self.known().values()})
        else:
            grid += np.linspace(low, high, GRID).tolist()
        last = int(self.at.max())
        counts = [FIRST_ROWS]
        while counts[-1] <= last:
            counts.append(2 * counts[-1])
        total = {n: float((self.error[self.at < n] ** 2).sum()) for n in counts}
        size = {n: int((self.at < n).sum()) * self.error.shape[1] for n in counts}
        shown = [n for n in counts if total[n] > 4 * size[n]] or counts[-1:]
        best = dict.fromkeys(shown, (inf, 0.0))  # count → the least share that is left, and u
        for u in grid:
            left = self.left(self.value(u))
            if left is not None:
                for n in shown:
                    share = float((left[self.at < n] ** 2).sum()) / max(total[n], 1e-300)
                    best[n] = min(best[n], (share, u))
        if min(best.values())[0] > (LEFT if self.wide else 1e300):
            return []
        least = min(shown, key=lambda n: best[n])
        return [(n, best[n][1]) for n in dict.fromkeys((shown[0], least))]

    def newton(self, u: float, chosen: np.ndarray) -> _Fit | None:
        """Return the best u near this one over some rows, and what it leaves of all."""
        h = 1e-3 if self.log else 1e-3 * max(1.0, abs(u))
        left = self.left(self.value(u))
        other = self.left(self.value(u + h))
        if left is None or other is None:
            return None
        slope = (left - other) / h
        for _ in range(STEPS):
            J, r = slope[chosen], left[chosen]
            weight = float((J * J).sum())
            if weight <= 0 or not isfinite(weight):
                return None
            by_row = float(((J * r).sum(axis=1) ** 2).sum()) / weight**2
            shared = float(((J * self.shared[chosen]).sum(axis=1) ** 2).sum()) / weight**2
            floor = FLOOR * UNIT[self.case.profile.angles] * max(1.0, 0 if self.log else abs(u))
            sigma = (max(1 / weight, by_row) + shared + floor**2) ** 0.5
            fit = _Fit(u, sigma, left, sigma**2 * weight)
            step = float((J * r).sum()) / weight
            if abs(step) < 0.05 * sigma or abs(step) < 1e-9 * max(1.0, abs(u)):
                return fit
            now, moved = float((r * r).sum()), None
            for shorter in (1.0, 0.5, 0.2, 0.05):
                new = self.within(u + shorter * step)
                moved = self.left(self.value(new)) if new != u else None
                if moved is not None and float((moved[chosen] ** 2).sum()) < now:
                    break
            else:
                return fit
            slope, u, left = (left - moved) / (new - u), new, moved
        return fit._replace(value=u, left=left)

    def u(self, value: float) -> float:
        """Return the scale on which a value is sought."""
        return log(value) if self.log else value

    def value(self, u: float) -> float:
        """Return the value at a place of the scale."""
        return exp(u) if self.log else u

    def within(self, u: float) -> float:
        """Return the nearest place within the range of the constant."""
        return min(max(u, self.u(self.constant.low)), self.u(self.constant.high))

    # --- whole numbers

    def among(self, values: list[float]) -> _Fit | None:
        """Return the best of these whole numbers, and how far its neighbours are from as good."""
        best: tuple[float, float, np.ndarray] | None = None
        for value in values:
            left = self.left(value)
            total = inf if left is None else float((left**2).sum())
            if left is not None and (best is None or total < best[0]):
                best = total, value, left
                if total < 2 * left.size:
                    break
        if best is None:
            return None
        total, value, left = best
        gain = inf
        for near in (value - 1, value + 1):
            if near != self.right and self.constant.low <= near:
                other = self.left(near)
                if other is not None:
                    gain = min(gain, float((other**2).sum()) - total)
        sigma = None if gain > SURE**2 else 1 / max(gain, 1e-6) ** 0.5
        return _Fit(value, sigma, left)

    def offsets(self) -> list[float]:
        """Return the offsets of positions that are worth a replay, the likeliest first."""
        # scores depend on distances: keys further on are queries further back
        back = -1 if self.constant.name == "offset-keys" else 1
        short = [float(back * o) for o in SHORT if o and self.constant.name != "offset"]
        ours, theirs = self.case.exact.ours[self.point], self.case.exact.theirs[self.point]
        width = self.case.decoder.cfg.qk_rope_head_dim
        if not kind(self.point).endswith(self.constant.points) or ours.shape[-1] != width:
            return short
        turned = (theirs[..., 0::2] + 1j * theirs[..., 1::2]) * np.conj(
            ours[..., 0::2] + 1j * ours[..., 1::2]
        )
        pairs = turned.reshape(-1, width // 2).sum(axis=0)  # Σ |z|² e^(i·offset·freq) of each pair
        nx = self.case.decoder.nx
        freq = inv_freq(self.case.decoder.cfg, nx.conventions.yarn_betas)
        block, low = np.arange(8192), int(self.constant.low)
        turn = np.exp(-1j * np.outer(block, freq))
        starts = range(low, int(self.constant.high), len(block))
        alike = np.concatenate([(turn @ (pairs * np.exp(-1j * o * freq))).real for o in starts])
        offsets = low + np.arange(len(alike))
        alike[offsets == 0] = -inf
        return offsets[np.argsort(-alike)[:2]].astype(float).tolist()

    def windows(self) -> list[float]:
        """Return the windows that the first wrong row allows, with the first positions or not."""
        rows = self.case.rows[self.point]
        wrong = rows.error > 8 * row_levels((rows.noise**2).mean(axis=0))
        if not wrong.any():
            return []
        first = int(self.at[np.argmax(wrong)])
        # the first that is hidden may matter little: then the window is shorter than it seems
        seen = [n for n in (first, first - 1, first - 2) if n > 0]
        return [float(n - s + s * SINKS) for s in SINKS_TRIED for n in seen if n > s]

    # --- the answer

    def found(self, fit: _Fit) -> Found:
        """Return the constant at this value, and what is said of it."""
        c, right, value, sigma = self.constant, self.right, fit.value, fit.sigma
        if c.scale == "window":
            first, last = divmod(int(value), SINKS)
            kept = f"and the first {first} " if first else ""
            text = f"a token sees the last {last} {kept}positions, expected all"
            unsure = "" if sigma is None else f" ± {max(1, round(sigma))}"
            fitted = f"positions seen {last}{unsure}{f' and the first {first}' if first else ''}"
            solved = Solved(c.name, float(last), sigma or 0.0, None, ())
            return Found(c, c.at(value), solved, text, f"{fitted}, expected all", 1.0)
        spread = sigma or 0.0
        near = {m: v for m, v in self.known().items() if abs(v - value) <= max(SAME * spread, 1e-9)}
        whose = tuple(near) if spread < 0.1 * abs(value) else ()
        shown = near[whose[0]] if whose else plain(value, spread)
        most = "at most " if c.scale == "log" and spread > 0.5 * value else ""
        top = f"{value + 2 * spread:.2g}" if most else f"{shown:.10g}"
        about = "about " if spread > 1e-6 * abs(value) and not (whose or most) else ""
        text = f"{c.title} is {most or about}{top}, expected {right:.6g}"
        fitted = c.title.removeprefix("the ").rstrip(",")
        fitted += f" {most}{top}" if most else f" {measured(value, sigma)}"
        fitted += f", expected {right:.6g}"
        if c.factor:
            fitted += f" ({value / right:.5g} times)"
        if whose:
            others = f", as {' and '.join(whose[:2])}{' and others' if whose[2:] else ''} "
            text += f"{others}{'has' if len(whose) == 1 else 'have'} it"
            fitted += f"; {whose[0]} has {near[whose[0]]:.6g}"
        solved = Solved(c.name, value, spread, right, whose)
        return Found(c, c.at(value), solved, text, fitted, fit.spread)

    def known(self) -> dict[str, float]:
        """Return the values that other models have, but for those that are this one's."""
        values = known_values(self.constant).items()
        return {m: v for m, v in values if isfinite(v) and abs(v - self.right) > 1e-9 * abs(v)}


def plain(value: float, spread: float) -> float:
    """Return the number of fewest digits that is within two deviations of a value."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if abs(short - value) <= max(2 * spread, 1e-7 * abs(value)):
            return short
    return value


def measured(value: float, sigma: float | None) -> str:
    """Return a value with its deviation, both to the first digit of the latter."""
    if not sigma:
        return f"{value:.10g}"
    first = int(np.floor(np.log10(sigma)))  # power of ten of the deviation's first digit
    if 1e-3 <= abs(value) < 1e7:
        return f"{round(value, -first):.{max(0, -first)}f} ± {round(sigma, -first):.10g}"
    digits = max(0, int(np.floor(np.log10(max(abs(value), 1e-300)))) - first)
    return f"{value:.{digits}e} ± {sigma:.0e}"
