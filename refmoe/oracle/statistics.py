"""Test whether errors exceed what rounding explains."""

from dataclasses import dataclass
from math import log
from statistics import NormalDist

import numpy as np

from refmoe.model.points import kind
from refmoe.oracle.noise import Envelope, rms
from refmoe.oracle.replay import Replay

RUNS = 12
ALPHA = 1e-3
SLACK = 2.0  # of the noise: four times as many roundings as the profile knows
LEAST_SPREAD = 0.05  # of log R: no spread is known better than this from a dozen runs
WIDE = 0.5  # noise that is half the signal decides nothing


@dataclass(frozen=True)
class Point:
    name: str
    rel_error: float  # RMS over rows
    envelope: float  # the largest rel_error that is explained
    multiple: float  # of what is explained; above 1 is outside
    through: tuple[str, ...]  # points that the dump lacks and that are judged with it


class Rows:
    """Relative errors of one point: the engine's [T], and each emulated run's [runs, T]."""

    def __init__(self, ours: np.ndarray, theirs: np.ndarray, noise: np.ndarray):
        size = rms(ours)
        self.error = rms(theirs - ours) / np.where(size > 0, size, 1)
        self.noise = noise
        self.explained = np.ones(2)  # the largest R and M that are; `_holm` knows

    def multiple(self) -> float:
        """Of what is explained; above 1 is outside."""
        return float((np.exp(self.ratios(self.error, self.noise)) / self.explained).max())

    def against(self, ours: np.ndarray, theirs: np.ndarray) -> float:
        """The same for another hypothesis of what the engine should have computed here."""
        other = Rows(ours, theirs, self.noise)
        size = np.maximum(rms(ours), rms(theirs))  # a hypothesis of nothing explains nothing
        other.error = rms(theirs - ours) / np.where(size > 0, size, 1)
        other.explained = self.explained
        return other.multiple()

    def ratios(self, error: np.ndarray, noise: np.ndarray) -> tuple[float, float]:
        """log R and log M of an error against the noise of these runs."""
        ratio = error / row_levels((noise**2).mean(axis=0))
        return log(np.sqrt((ratio**2).mean()) + 1e-12), log(ratio.max() + 1e-12)


def row_levels(squares: np.ndarray) -> np.ndarray:
    """Noise of each row from its mean square [..., T], of one that vanished by chance a floor."""
    floor = np.sqrt(squares.mean(axis=-1, keepdims=True)) / 10 + 1e-30
    return np.maximum(np.sqrt(squares), floor)


def _rows(exact: Replay, noise: Envelope, judged: list[str]) -> dict[str, Rows]:
    """Where the engine chose other experts than float64 does, their rows have the kind's noise."""
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
        out[path] = Rows(ours, exact.theirs[path], known)
    return out


Spread = dict[str, tuple[np.ndarray, np.ndarray]]  # kind → mean and deviation of (log R, log M)


def _spread(rows: dict[str, Rows]) -> Spread:
    """How log R and log M of one emulated run lie against the others, pooled over layers."""
    drawn: dict[str, list[np.ndarray]] = {}
    for path, r in rows.items():
        drawn.setdefault(kind(path), []).append(_each_against_others(r.noise))
    out = {}
    for name, values in drawn.items():
        x = np.concatenate(values)
        out[name] = (x.mean(axis=0), np.maximum(x.std(axis=0, ddof=1), LEAST_SPREAD))
    return out


def _each_against_others(noise: np.ndarray) -> np.ndarray:
    """`Rows.ratios` of each run [runs, T] against all but itself: [runs, 2]."""
    runs = len(noise)
    others = (1 - np.eye(runs)) @ noise**2 / (runs - 1)  # mean squares of the others [runs, T]
    ratio = noise / row_levels(others)
    return np.log(np.stack((rms(ratio), ratio.max(axis=-1)), axis=-1) + 1e-12)


def _holm(
    rows: dict[str, Rows], spread: Spread, lacking: dict[str, tuple[str, ...]], alpha: float
) -> tuple[list[str], dict[str, Point]]:
    """The points outside, and every point with its share of what is explained."""
    normal = NormalDist()
    chance = {}
    for path, r in rows.items():
        mean, deviation = spread[kind(path)]
        z = (np.array(r.ratios(r.error, r.noise)) - log(SLACK) - mean) / deviation
        chance[path] = min(1.0, 2 * normal.cdf(-float(z.max())))  # two statistics a point
    outside = []
    ranked = sorted(chance, key=lambda p: chance[p])
    for i, path in enumerate(ranked):
        if chance[path] > alpha / (len(ranked) - i):
            break
        outside.append(path)
    reach = -normal.inv_cdf(alpha / (2 * max(1, len(rows))))
    points = {}
    for path, r in rows.items():
        mean, deviation = spread[kind(path)]
        r.explained = np.exp(mean + log(SLACK) + reach * deviation)
        level = float(np.sqrt((r.noise**2).mean()))
        error = float(np.sqrt((r.error**2).mean()))
        envelope = level * float(r.explained[0])
        points[path] = Point(path, error, envelope, r.multiple(), lacking[path])
    return outside, points
