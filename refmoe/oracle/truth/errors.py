"""Measure errors against a truth, and tell which rows a different choice can have changed."""

from collections.abc import Mapping, Sequence

import numpy as np

from refmoe.config import Config
from refmoe.oracle.noise import rms
from refmoe.oracle.truth.layout import LOGITS, TOTAL, Masks, Values, judged_points


def errors(ours: Values, theirs: Values, rungs: Sequence[int]) -> dict[str, np.ndarray]:
    """Return for each point the errors of its rows [T], NaN where nothing can be said.

    `rungs`: the numbers of likeliest tokens to judge together.
    """
    out = {}
    for path, x in theirs.items():
        mine = ours[path]
        if path.endswith("#experts"):
            share = lost(mine[:, : x.shape[1]], x).mean(axis=1)
            out[path] = np.hypot(share, 0.5 / x.shape[1])
        elif path.endswith("#weights"):
            chosen = path.removesuffix("weights") + "experts"
            if chosen in theirs:
                out[path] = _weights(ours[chosen][:, : x.shape[1]], mine, theirs[chosen], x)
        elif path == LOGITS:
            for n in rungs:
                out[f"{path}#top{n}"] = rms_of_known(x[:, :n] - mine[:, :n])
        elif path == TOTAL:
            out[path] = np.abs(x - mine)[:, 0]
        elif not path.endswith("#scores"):
            own = rms(mine)
            out[path] = rms(x - mine) / np.where(own > 0, own, 1)
    return out


def lost(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return which of our experts they did not choose, [T, K]."""
    out: np.ndarray = (ours[:, :, None] != theirs[:, None, :]).all(axis=2)
    return out


def _weights(a: np.ndarray, x: np.ndarray, b: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the errors of the weights [T], in any order of experts; NaN where these differ."""
    x, y = (np.take_along_axis(w, e.argsort(axis=1), axis=1) for e, w in ((a, x), (b, y)))
    return np.where(lost(a, b).any(axis=1), np.nan, rms(y - x) / rms(x))


def rms_of_known(x: np.ndarray) -> np.ndarray:
    """Return the RMS of each row over what is a number; NaN where nothing is."""
    known = ~np.isnan(x)
    count = known.sum(axis=1)
    square = np.where(known, x * x, 0).sum(axis=1) / np.maximum(count, 1)
    return np.where(count > 0, np.sqrt(square), np.nan)


def reached(
    differs: Mapping[int, np.ndarray], cfg: Config, top: int, T: int, onwards: bool = True
) -> Masks:
    """Return for each point the rows that a different choice can have changed.

    differs  the rows with other choices, by layer; a layer that is missing may have any
    onwards  False: only a row's own choices, and not what attention brings from earlier rows
    """
    touched: np.ndarray | None = np.zeros(T, bool)
    out: Masks = {}
    for i in range(cfg.num_hidden_layers):
        at = f"model.layers.{i}"
        if onwards and touched is not None:
            touched = np.logical_or.accumulate(touched)  # attention looks back
        out |= {f"{at}.self_attn": touched}
        if cfg.is_moe(i):
            gate = f"{at}.mlp.gate"
            out |= {f"{gate}#experts": touched, f"{gate}#weights": touched}
            own = differs.get(i)
            touched = None if touched is None or own is None else touched | own
        out |= {f"{at}.mlp": touched, at: touched}
    return out | dict.fromkeys(judged_points(cfg, top)[len(out) :], touched)


def differences(ours: Values, theirs: Values) -> dict[int, np.ndarray]:
    """Return for each layer with choices the rows whose experts are not ours."""
    return {
        int(path.split(".")[2]): np.any(lost(ours[path][:, : x.shape[1]], x), axis=1)
        for path, x in theirs.items()
        if path.endswith("gate#experts")
    }
