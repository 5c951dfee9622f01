"""Decide whether errors are larger than rounding explains.

    e     = |theirs - ours| / |ours|                    RMS of each row
    R, M  = RMS and maximum over rows of e / noise      noise: RMS of e over emulated runs, each row

log R and log M of a healthy engine are spread as those of one emulated run against the others,
pooled over the layers, about a mean that allows for `SLACK` times the sampled noise. A point has
two statistics, a report many points; Holm's correction (Scandinavian Journal of Statistics 6, 1979)
keeps the chance of any false alarm in it below alpha.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from statistics import NormalDist

import numpy as np

from refmoe.model.points import kind
from refmoe.oracle.envelope import Envelope
from refmoe.oracle.noise import rms
from refmoe.oracle.replay import Replay

RUNS = 12  # emulated runs of an envelope
ALPHA = 1e-3  # chance of a false alarm in a whole report
SLACK = 2.0  # times the sampled noise is allowed: four times as many roundings as are modelled
LEAST_SPREAD = 0.05  # of log R: no spread is known better than this from a dozen runs
WIDE = 0.5  # noise that is half the signal decides nothing


@dataclass(frozen=True)
class PointResult:
    """One line of a report: how far a point is from float64, and how far rounding explains."""

    name: str
    rel_error: float  # RMS over rows
    envelope: float  # the largest rel_error that is explained
    multiple: float  # of what is explained; above 1 is outside
    through: tuple[str, ...]  # points that the dump lacks and that are judged with it


class RowErrors:
    """Relative errors of one point: the engine's [T], and each emulated run's [runs, T]."""

    def __init__(self, ours: np.ndarray, theirs: np.ndarray, noise: np.ndarray):
        size = rms(ours)
        self.error = rms(theirs - ours) / np.where(size > 0, size, 1)
        self.noise = noise
        self.explained = np.ones(2)  # the largest R and M that are explained; `judge_points` fills

    def multiple(self) -> float:
        """Return how many times the error is what is explained; above 1 is outside."""
        return float((np.exp(self.logs()) / self.explained).max())

    def multiple_of(self, ours: np.ndarray, theirs: np.ndarray) -> float:
        """Return `multiple` for another hypothesis of what the engine should have computed here."""
        other = RowErrors(ours, theirs, self.noise)
        size = np.maximum(rms(ours), rms(theirs))  # a hypothesis of nothing explains nothing
        other.error = rms(theirs - ours) / np.where(size > 0, size, 1)
        other.explained = self.explained
        return other.multiple()

    def logs(self) -> tuple[float, float]:
        """Return log R and log M of the engine's error against the noise of all runs."""
        return log_statistics(self.error / row_levels((self.noise**2).mean(axis=0)))


def log_statistics(ratio: np.ndarray) -> tuple[float, float]:
    """Return log R and log M of the rows' errors over their levels."""
    return log(np.sqrt((ratio**2).mean()) + 1e-12), log(ratio.max() + 1e-12)


def row_levels(squares: np.ndarray) -> np.ndarray:
    """Return the noise of each row from its mean square [..., T].

    A row whose noise vanished by chance has a tenth of the point's instead.
    """
    floor = np.sqrt(squares.mean(axis=-1, keepdims=True)) / 10 + 1e-30
    return np.maximum(np.sqrt(squares), floor)


def row_errors(exact: Replay, noise: Envelope, judged: list[str]) -> dict[str, RowErrors]:
    """Return the errors of these points beside their noise.

    Where the engine chose other experts than float64 does, the rows of an expert were not sampled;
    they have the noise of points of the same kind. A point without either is left out.
    """
    levels: dict[str, list[np.ndarray]] = {}
    for path, sampled in noise.noise.items():
        levels.setdefault(kind(path), []).append(np.sqrt((sampled**2).mean(axis=1)))
    out = {}
    for path in judged:
        ours, known = exact.ours[path], noise.noise.get(path)
        if known is None or known.shape[1] != len(ours):
            if kind(path) not in levels:
                continue
            level = np.sqrt(np.mean(np.square(levels[kind(path)]), axis=0))
            known = np.repeat(level[:, None], len(ours), axis=1)
        out[path] = RowErrors(ours, exact.theirs[path], known)
    return out


Spread = dict[str, tuple[np.ndarray, np.ndarray]]  # kind → mean and deviation of (log R, log M)


def pooled_spread(rows: Mapping[str, RowErrors]) -> Spread:
    """Return how log R and log M of one emulated run lie against the others, over all layers."""
    drawn: dict[str, list[np.ndarray]] = {}
    for path, r in rows.items():
        drawn.setdefault(kind(path), []).append(_each_against_others(r.noise))
    out = {}
    for name, values in drawn.items():
        x = np.concatenate(values)
        out[name] = (x.mean(axis=0), np.maximum(x.std(axis=0, ddof=1), LEAST_SPREAD))
    return out


def _each_against_others(noise: np.ndarray) -> np.ndarray:
    """Return log R and log M of each run [runs, T] against all but itself: [runs, 2]."""
    runs = len(noise)
    others = (1 - np.eye(runs)) @ noise**2 / (runs - 1)  # mean squares of the others [runs, T]
    ratio = noise / row_levels(others)
    return np.log(np.stack((rms(ratio), ratio.max(axis=-1)), axis=-1) + 1e-12)


# --- tests


def chance_of(logs: tuple[float, float], mean: np.ndarray, deviation: np.ndarray) -> float:
    """Return the chance of log R and log M as large as these in a healthy engine.

    The larger of the two counts, so that the chance of one is doubled.
    """
    z = (np.array(logs) - log(SLACK) - mean) / deviation
    return min(1.0, 2 * NormalDist().cdf(-float(z.max())))


def reach_of(alpha: float, tests: int) -> float:
    """Return how many deviations are explained in a report of so many points."""
    return -NormalDist().inv_cdf(alpha / (2 * max(1, tests)))


def explained_by(mean: np.ndarray, deviation: np.ndarray, reach: float) -> np.ndarray:
    """Return the largest R and M that rounding explains, so many deviations above the mean."""
    return np.exp(mean + log(SLACK) + reach * deviation)


def holm(chance: Mapping[str, float], alpha: float) -> list[str]:
    """Return the points that are outside by Holm's correction, the least likely first."""
    outside = []
    for i, path in enumerate(sorted(chance, key=lambda p: chance[p])):
        if chance[path] > alpha / (len(chance) - i):
            break
        outside.append(path)
    return outside


def judge_points(
    rows: Mapping[str, RowErrors], through: Mapping[str, tuple[str, ...]], alpha: float
) -> tuple[list[str], dict[str, PointResult]]:
    """Return the points outside, and for every point its error and what of it is explained.

    Fills `RowErrors.explained`. `through`: for each point, those that are judged with it.
    """
    spread = pooled_spread(rows)
    chance = {path: chance_of(r.logs(), *spread[kind(path)]) for path, r in rows.items()}
    reach = reach_of(alpha, len(rows))
    points = {}
    for path, r in rows.items():
        r.explained = explained_by(*spread[kind(path)], reach)
        level = float(np.sqrt((r.noise**2).mean()))
        error = float(np.sqrt((r.error**2).mean()))
        largest = level * float(r.explained[0])
        points[path] = PointResult(path, error, largest, r.multiple(), through[path])
    return holm(chance, alpha), points
