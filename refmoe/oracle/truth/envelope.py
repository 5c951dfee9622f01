"""Sample the envelopes that a truth file carries."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from refmoe.config import Config
from refmoe.engines import Profile
from refmoe.model.decoder import (
    Decoder,
)
from refmoe.model.points import kind
from refmoe.oracle.noise import emulated
from refmoe.oracle.statistics import LEAST_SPREAD, log_statistics
from refmoe.oracle.truth.errors import differences, errors, reached, rms_of_known
from refmoe.oracle.truth.forward import Pass, Seen
from refmoe.oracle.truth.layout import (
    FEWEST,
    LOGITS,
    NEAR,
    SAMPLED,
    UNSURE,
    Values,
    encode,
    judged_points,
    ladder,
    mixtures,
)


def emulation(
    decoder: Decoder,
    profile: Profile,
    tokens: Sequence[int],
    truth: Seen,
    runs: int,
) -> Pass:
    """Return the emulated runs of a profile as one pass of that many times the rows."""
    seen = Seen(decoder, truth.top, truth.tick, truth)
    noisy = emulated(decoder, profile, len(tokens), np.random.default_rng(0), seen)
    inner = noisy.nx.watch
    assert inner is not None

    def watch(path: str, x: np.ndarray) -> np.ndarray:
        path = path.partition("@")[0]
        if path.endswith(("#q_pe", "#k_pe")):  # positions begin anew in each run
            return np.concatenate([inner(path, part) for part in np.split(x, runs)])
        return inner(path, x)

    nx = replace(noisy.nx, watch=watch, stop_at_nonfinite=False)
    return Pass(noisy.using(nx), [list(tokens)] * runs, seen)


def each_run(seen: Seen, runs: int) -> list[Values]:
    """Return what is kept of each of these runs."""
    every = {n: x.reshape(runs, len(x) // runs, *x.shape[1:]) for n, x in seen.values().items()}
    return [{name: x[run] for name, x in every.items()} for run in range(runs)]


def sample(profile: Profile, each: Sequence[Values], truth: Values, cfg: Config) -> Values:
    """Return levels and spreads of one profile from its emulated runs, as the file has them."""
    T, top = truth[LOGITS].shape
    names = judged_points(cfg, top)
    drawn = [errors(truth, run, ladder(top)) for run in each]
    e = np.array([[d[p] for p in names] for d in drawn])  # [runs, P, T]
    differs = [differences(truth, run) for run in each]

    def mask(differs: Mapping[int, np.ndarray], onwards: bool = True) -> np.ndarray:
        masks = reached(differs, cfg, top, T, onwards)
        return np.array([masks[p] for p in names], bool)  # [P, T]

    touched = np.array([mask(d) for d in differs])
    layers, gates = mixtures(cfg), [f"model.layers.{i}.mlp.gate" for i in mixtures(cfg)]
    before = touched[:, [names.index(g + "#experts") for g in gates]]  # [runs, M, T]
    s = np.array([[_scores(truth, run, g) for g in gates] for run in each]).reshape(before.shape)
    noise = levels(np.where(before, np.nan, s), least=1.0)  # [M, T]
    near = {
        i: ~(_margin(truth, gate, cfg) > tie(noise[m], NEAR))
        for m, (i, gate) in enumerate(zip(layers, gates, strict=True))
    }
    untried = np.zeros(touched.shape[1:], bool)
    for onwards in (True, False):
        tried = np.sum([mask(d, onwards) for d in differs], axis=0)
        untried |= mask(near, onwards) & (tried < SAMPLED)
    same, everything = np.where(touched, np.nan, e), np.where(untried, np.nan, e)
    return {
        f"{profile.name}#same": encode(levels(same)).T,
        f"{profile.name}#all": encode(np.where(untried, np.nan, levels(everything))).T,
        f"{profile.name}#scores": encode(noise).T,
        f"{profile.name}#spread": np.stack([spread(same, names), spread(everything, names)], 1),
    }


def _scores(truth: Values, run: Values, gate: str) -> np.ndarray:
    """Return the RMS over the kept experts of a score's error [T]; masked groups have none."""
    a, b = truth[gate + "#scores"], run[gate + "#scores"]
    both = np.isfinite(a) & np.isfinite(b)
    return rms_of_known(np.where(both, np.where(both, b, 0) - np.where(both, a, 0), np.nan))


def _margin(truth: Values, gate: str, cfg: Config) -> np.ndarray:
    """Return the margin of experts, or half of that of groups if it is less.

    A group's score is the sum of two experts' scores.
    """
    score, K = truth[gate + "#scores"], cfg.num_experts_per_tok
    own = score[:, K - 1] - score[:, K] if score.shape[1] > K else np.full(len(score), np.inf)
    return np.minimum(own, truth[gate + "#groups"] / 2)


def tie(noise: np.ndarray, deviations: float) -> np.ndarray:
    """Return the largest difference of scores that so many deviations explain; NaN: no noise."""
    return deviations * np.sqrt(2) * noise + 4 * 2.0**-24


def levels(e: np.ndarray, least: float = 0.1) -> np.ndarray:
    """Return the RMS over runs [P, T] of errors [runs, P, T], NaN where left out.

    It is no less than `least` times that of the whole point. A row without samples has that of the
    point, a point without samples NaN.
    """
    known = ~np.isnan(e)
    count, total = known.sum(axis=0), np.where(known, e * e, 0).sum(axis=0)
    rows = count.sum(axis=-1, keepdims=True)
    pooled = total.sum(axis=-1, keepdims=True) / np.maximum(rows, 1)
    own = np.where(count > 0, total / np.maximum(count, 1), pooled)
    level = np.sqrt(np.maximum(own, least**2 * pooled)) + 1e-30
    return np.where(rows > 0, level, np.nan)


def spread(e: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return how log R and log M of one run lie against the others: [P, 2, 2], NaN: too few runs.

    The axes are log R or log M, and mean or deviation.

    A point's own deviation is known from a dozen draws; it is taken at its upper bound, and as no
    less than the median of its kind.
    """
    runs, P, T = e.shape
    drawn = np.full((runs, P, 2), np.nan)
    for run in range(runs):
        ratio = e[run] / levels(np.delete(e, run, axis=0))  # [P, T]
        for p in range(P):
            known = ratio[p][np.isfinite(ratio[p])]
            if len(known) >= FEWEST * T:
                drawn[run, p] = log_statistics(known)
    out = np.full((P, 2, 2), np.nan)
    enough = np.isfinite(drawn[:, :, 0]).sum(axis=0) >= max(2, 2 * runs / 3)
    for p in np.flatnonzero(enough).tolist():
        own = drawn[np.isfinite(drawn[:, p, 0]), p]
        out[p] = np.stack([own.mean(axis=0), UNSURE * own.std(axis=0, ddof=1)], axis=1)
    kinds = np.array([kind(name) for name in names])
    for each in set(kinds[enough]):
        of_kind = enough & (kinds == each)
        least = np.maximum(np.median(out[of_kind, :, 1], axis=0) / UNSURE, LEAST_SPREAD)
        out[of_kind, :, 1] = np.maximum(out[of_kind, :, 1], least)
    return out
