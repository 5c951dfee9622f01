"""Golden truth: what is needed to judge an engine end to end where the model is not at hand.

`make` runs the model once in its own numerics (float64, if the truth is to be one) and once for
each precision profile with the noise of noise.py, a dozen emulated runs as one batch; it keeps one
safetensors file that `check_truth` takes in the model's place. T tokens, L layers, M of them
mixtures, K experts a token, P points (below):

    name                 type  shape          bytes a token; K2: D 7168, L 61, M 60, K 8, P 309
    model.norm           F32   [T, D]         what lm_head multiplies                     28,672
    layers#sketch        F32   [T, L, 65]     of each layer's output (trace.sketch)       15,860
    self_attn#sketch     F32   [T, L, 8]      the first 8 of its 65 numbers                1,952
    mlp#sketch           F32   [T, L, 8]                                                   1,952
    gate#experts         I16   [T, M, K+4]    the chosen, best first, and the next four    1,440
    gate#scores          F32   [T, M, K+4]    s + b of these, so the margin also           2,880
    gate#weights         F32   [T, M, K]      of the chosen                                1,920
    gate#groups          F32   [T, M]         margin of groups, where the config has any       -
    lm_head#ids          I32   [T, 64]        the likeliest next tokens, and their           256
    lm_head#logprobs     F32   [T, 64]        log-probabilities                              256
    lm_head#logsumexp    F64   [T]            of the logits: logit = log-probability + this    8
    PROFILE#same, #all   U8    [T, P]         levels of noise, five profiles               3,090
    PROFILE#scores       U8    [T, M]         level of the noise of s + b                    300
    PROFILE#spread       F16   [P, 2, 2, 2]   same or all; log R, log M; mean, deviation       -
                                                                                          58,586
    and for the file: spreads 24,720, tokens and provenance in the header some 10,000

Points, in this order: of each layer `self_attn`, in a mixture `gate#experts` and `gate#weights`,
`mlp`, and the layer; `model.norm`; log-probabilities of the 1, 4, 16 and 64 likeliest; logsumexp.
A level u is 2^((u-230)/7), which keeps it to 5 %; 0 is none. Errors are relative in RMS of each
row, but those of log-probabilities and logsumexp in nats, and of a choice the share of the experts
lost, √(share² + 1/4K²), so that no choice is without noise. No date is written: the same model and
tokens give the same bytes. The one key of the metadata, `refmoe.truth`, is JSON: version, producer,
numerics, conventions, config.json and its sha256, shards, tokens, profiles.

Nothing can be fed back here, so errors accumulate from the tokens on, and a choice that flips
changes what comes after, however healthy the engine: its own row from that layer's mlp on, and
later rows from the next attention on. Two envelopes are therefore kept. *Same* is sampled on rows
that no flip of the emulated run has reached, and judges rows that no flip of the engine has
reached; the others are left out and counted. *All* is sampled on every row, flips included, and
judges every row where the dump does not show its choices, where fewer than an eighth of the rows
are untouched, and where its envelope is less than half as wide; rows that a near tie may change
but that fewer than 3 emulated runs did are left out of it. A flip in an untouched row is judged by
the scores here against their noise; beyond the four refused experts that are kept a score is taken
as the last of them. In any row the share of experts lost is judged as a number.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import log, prod
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

import refmoe
from refmoe.config import Config, Fp8Scheme, Int4Scheme
from refmoe.engines import CONVENTIONS, Conventions
from refmoe.files import InputError
from refmoe.model.cache import LatentCache
from refmoe.model.decoder import (
    Decoder,
    add_mlp,
    attend,
    check_tokens,
    embed,
    mix,
    mlp_input,
    policy,
)
from refmoe.model.experts import Lent, MoeWeights, in_order, with_shared
from refmoe.model.matrix import dequantize
from refmoe.model.mla import Segment
from refmoe.model.numerics import POLICIES
from refmoe.model.router import GateWeights, Routing, limit_groups, route, sigmoid
from refmoe.oracle.adapters import adapt
from refmoe.oracle.compare import ALPHA, LEAST_SPREAD, RUNS, SLACK, WIDE, Point, Report
from refmoe.oracle.graph import kind
from refmoe.oracle.noise import PROFILES, UNIT, Profile, emulated, profile_of, rms
from refmoe.oracle.readers import Dump, fit
from refmoe.oracle.replay import TOP
from refmoe.oracle.trace import DIRECTIONS, sketch, write
from refmoe.run.model import Model
from refmoe.weights.checkpoint import DTYPES, read_header

VERSION = 1
KEPT = ("float32", "float16", "bfloat16", "fp8-block", "llama.cpp-q8")  # finer first
KEY = "refmoe.truth"  # of the metadata: one, for the library writes several in no fixed order
WIDTH, SMALL = 1 + DIRECTIONS, 8  # of a sketch
REFUSED = 4  # experts kept beyond those chosen
LADDER = (1, 4, 16, 64, 256, 1024)  # likeliest tokens judged together
LOGITS, TOTAL = "lm_head", "lm_head#logsumexp"
BLOCK = 1 << 27  # logits at once: 1 GB
FEWEST = 1 / 8  # of the rows, for an envelope or a verdict
SAMPLED = 3  # runs that took another way, for rows that may take one to be judged
TIE, NEAR = 7.0, 4.0  # deviations of a difference of two scores: explained; to be expected
UNSURE = 1.5  # a deviation known from a dozen draws may be this much larger (95 %)

Values = dict[str, np.ndarray]  # point → what a truth keeps of it [T, ...]
Masks = dict[str, np.ndarray | None]  # point → rows that a flip has reached [T]; None: unknown


# --- layout -------------------------------------------------------------------------------------


def mixtures(cfg: Config) -> list[int]:
    return [i for i in range(cfg.num_hidden_layers) if cfg.is_moe(i)]


def ladder(top: int) -> list[int]:
    return [*(n for n in LADDER if n < top), top]


def points(cfg: Config, top: int) -> list[str]:
    """What is judged, in the order it is computed in."""
    out = []
    for i in range(cfg.num_hidden_layers):
        at = f"model.layers.{i}"
        gate = [f"{at}.mlp.gate#experts", f"{at}.mlp.gate#weights"] if cfg.is_moe(i) else []
        out += [f"{at}.self_attn", *gate, f"{at}.mlp", at]
    return [*out, "model.norm", *(f"{LOGITS}#top{n}" for n in ladder(top)), TOTAL]


def layout(
    cfg: Config, T: int, top: int = 64, profiles: Sequence[str] = KEPT
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the file: type as safetensors spells it, and shape."""
    L, M, P = cfg.num_hidden_layers, len(mixtures(cfg)), len(points(cfg, top))
    K = cfg.num_experts_per_tok
    seen = min(K + REFUSED, cfg.n_routed_experts)
    out: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.norm": ("F32", (T, cfg.hidden_size)),
        "layers#sketch": ("F32", (T, L, WIDTH)),
        "self_attn#sketch": ("F32", (T, L, SMALL)),
        "mlp#sketch": ("F32", (T, L, SMALL)),
        "gate#experts": ("I16", (T, M, seen)),
        "gate#scores": ("F32", (T, M, seen)),
        "gate#weights": ("F32", (T, M, K)),
        "lm_head#ids": ("I32", (T, top)),
        "lm_head#logprobs": ("F32", (T, top)),
        "lm_head#logsumexp": ("F64", (T,)),
    }
    if cfg.n_group != cfg.topk_group:
        out["gate#groups"] = ("F32", (T, M))
    for name in profiles:
        out |= {f"{name}#{rows}": ("U8", (T, P)) for rows in ("same", "all")}
        out[f"{name}#scores"] = ("U8", (T, M))
        out[f"{name}#spread"] = ("F16", (P, 2, 2, 2))
    return out


def size(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of the tensors."""
    return sum(np.dtype(DTYPES[dtype]).itemsize * prod(shape) for dtype, shape in layout.values())


def encode(level: np.ndarray) -> np.ndarray:
    """Levels as bytes; what is not a number is 0."""
    known = np.isfinite(level)
    with np.errstate(divide="ignore"):
        steps = 230 + 7 * np.log2(np.where(known, level, 1))
    return np.where(known, np.clip(np.rint(steps), 1, 255), 0).astype(np.uint8)


def decode(steps: np.ndarray) -> np.ndarray:
    return np.where(steps > 0, 2.0 ** ((steps.astype(np.float64) - 230) / 7), np.nan)


# --- what is kept of one forward pass -----------------------------------------------------------


ENDS = (".self_attn", ".mlp", ".mlp.gate", ".gate#experts", ".gate#weights")


class Seen:
    """A watcher that keeps of each point what a truth keeps of it.

    With `truth`, an exact pass that is ahead by a layer, scores and log-probabilities are of its
    experts and tokens, and the rows may be those of several runs.
    """

    def __init__(
        self, decoder: Decoder, top: int, tick: Callable[[], None], truth: "Seen | None" = None
    ):
        self.decoder, self.cfg, self.top = decoder, decoder.cfg, top
        self.tick, self.truth = tick, truth
        self.gate: GateWeights | None = None  # of the layer at work
        self.rows = 0  # of the head so far
        self.parts: dict[str, list[np.ndarray]] = {}

    def value(self, name: str) -> np.ndarray:
        return np.concatenate(self.parts[name])

    def values(self) -> Values:
        return {name: self.value(name) for name in self.parts}

    def wants(self, path: str) -> bool:
        if not path.startswith("model.layers."):
            return path in (LOGITS, "model.norm")
        return path.endswith(ENDS) or (path.count(".") == 2 and "#" not in path)

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        if self.wants(path):
            for name, kept in self.kept(path, x):
                self.parts.setdefault(name, []).append(kept)
            if path.count(".") == 2:
                self.tick()
        return x

    def kept(self, path: str, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        if path == LOGITS:
            yield from self.logits(x)
        elif path.endswith(".gate"):
            yield from self.scores(path, x)
        elif path.startswith("model.layers.") and "gate#" not in path:
            yield path, sketch(path, x)[:, : width(path)]
        elif self.truth is not None or not path.endswith("#experts"):
            yield path, x.copy()

    def scores(self, path: str, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        assert self.gate is not None
        score = sigmoid(x) + dequantize(self.gate.e_score_correction_bias, x.dtype)
        score, groups = limit_groups(score, self.cfg, self.decoder.nx)
        if self.truth is not None:
            ids = self.truth.value(path + "#experts")
            ids = np.tile(ids, (len(x) // len(ids), 1))
        else:
            seen = min(self.cfg.num_experts_per_tok + REFUSED, score.shape[1])
            ids = np.argsort(-score, axis=-1, kind="stable")[:, :seen]
            yield path + "#experts", ids
            yield path + "#groups", groups
        yield path + "#scores", np.take_along_axis(score, ids, axis=-1)

    def logits(self, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        if self.truth is not None:
            known = self.truth.value("lm_head#ids")
            ids = known[np.arange(self.rows, self.rows + len(x)) % len(known)]
            self.rows += len(x)
        else:
            ids = np.stack([np.argsort(-row, kind="stable")[: self.top] for row in x])
            yield "lm_head#ids", ids
        x = x.astype(np.float64)
        total = logsumexp(x)
        yield LOGITS, np.take_along_axis(x, ids, axis=-1) - total
        yield TOTAL, total


def width(path: str) -> int:
    """Of the sketch that is kept."""
    return SMALL if path.endswith((".self_attn", ".mlp")) else WIDTH


def logsumexp(x: np.ndarray) -> np.ndarray:
    """x [T, Z] → [T, 1]."""
    most = x.max(axis=-1, keepdims=True)
    out: np.ndarray = np.log(np.exp(x - most).sum(axis=-1, keepdims=True)) + most
    return out


class Pass(NamedTuple):
    """A forward pass: how it computes, of what, and what is kept of it."""

    decoder: Decoder
    prompts: Sequence[Sequence[int]]
    seen: Seen


def forward(passes: Sequence[Pass]) -> None:
    """All of them at once, layer by layer; the logits in blocks of rows.

    Every weight is asked for once for all passes, and of a layer's experts those that some pass
    chose. Each pass does what it would alone, in that order, whatever the others do.
    """
    first = passes[0].decoder
    with np.errstate(over="ignore", invalid="ignore"):  # points name what is not finite
        rows = [_embedded(p) for p in passes]
        for i in range(first.cfg.num_hidden_layers):
            rows = _layer(i, passes, rows)
        step = max(1, BLOCK // first.cfg.vocab_size)
        for p, x in zip(passes, rows, strict=True):
            for start in range(0, len(x), step):
                p.decoder.head(x[start : start + step])


def _embedded(p: Pass) -> np.ndarray:
    ids = np.concatenate([np.asarray(tokens, np.intp) for tokens in p.prompts])
    return embed(ids, p.decoder.embed_tokens, p.decoder.nx)


def _layer(i: int, passes: Sequence[Pass], rows: list[np.ndarray]) -> list[np.ndarray]:
    """Layer i of all passes: x [T, D] of each → x' [T, D]."""
    first = passes[0].decoder
    cfg, w, experts = first.cfg, first.layers[i], first.experts_of(i)
    scopes = [p.decoder.nx.within(f"model.layers.{i}.") for p in passes]
    h, inputs, choices = [], [], []
    for p, x, nx in zip(passes, rows, scopes, strict=True):
        h.append(attend(x, w, list(_segments(p)), cfg, nx))
        if isinstance(w.mlp, MoeWeights):
            p.seen.gate = w.mlp.gate
            inputs.append(mlp_input(h[-1], w, cfg, nx))
            choices.append(route(inputs[-1], w.mlp.gate, cfg, nx.within("mlp.")))
    if not isinstance(w.mlp, MoeWeights):
        return [mix(x, w, experts, cfg, nx) for x, nx in zip(h, scopes, strict=True)]
    sums = [np.zeros_like(x) for x in inputs]
    chosen = np.unique(np.concatenate([c.experts.reshape(-1) for c in choices])).tolist()
    nothing = np.zeros((0, cfg.hidden_size), inputs[0].dtype)  # to guess other layers' by
    for e, matrices in in_order(experts, chosen, nothing):
        for x, choice, y, nx in zip(inputs, choices, sums, scopes, strict=True):
            own, slots = np.nonzero(choice.experts == e)
            if len(own):
                weights = choice.weights[own, slots][:, None]
                one = Routing(np.full_like(weights, e, np.intp), weights, *choice[2:])
                y[own] += nx.experts(x[own], one, Lent({e: matrices}), nx.within("mlp."))
    out = []
    for x, inside, y, nx in zip(h, inputs, sums, scopes, strict=True):
        out.append(add_mlp(x, with_shared(inside, y, w.mlp, nx.within("mlp.")), nx))
    return out


def _segments(p: Pass) -> Iterator[Segment]:
    """The prompts' rows, and a memory that is this layer's alone."""
    start, nx = 0, p.decoder.nx
    for tokens in p.prompts:
        rows = slice(start, start + len(tokens))
        yield Segment(rows, LatentCache(p.decoder.cfg, nx.dtype, nx.cache == "bf16"))
        start = rows.stop


# --- errors, and what flips have reached --------------------------------------------------------


def errors(ours: Values, theirs: Values, rungs: Sequence[int]) -> dict[str, np.ndarray]:
    """point → [T], NaN where nothing can be said. `rungs` are those to judge of the ladder."""
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
                out[f"{path}#top{n}"] = _known_rms(x[:, :n] - mine[:, :n])
        elif path == TOTAL:
            out[path] = np.abs(x - mine)[:, 0]
        elif not path.endswith("#scores"):
            own = rms(mine)
            out[path] = rms(x - mine) / np.where(own > 0, own, 1)
    return out


def lost(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """[T, K]: which of our experts they did not choose."""
    out: np.ndarray = (ours[:, :, None] != theirs[:, None, :]).all(axis=2)
    return out


def _weights(a: np.ndarray, x: np.ndarray, b: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights of the same experts, whatever their order."""
    x, y = (np.take_along_axis(w, e.argsort(axis=1), axis=1) for e, w in ((a, x), (b, y)))
    return np.where(lost(a, b).any(axis=1), np.nan, rms(y - x) / rms(x))


def _known_rms(x: np.ndarray) -> np.ndarray:
    """Of each row, over what is a number."""
    known = ~np.isnan(x)
    count = known.sum(axis=1)
    square = np.where(known, x * x, 0).sum(axis=1) / np.maximum(count, 1)
    return np.where(count > 0, np.sqrt(square), np.nan)


def reached(
    differs: Mapping[int, np.ndarray], cfg: Config, top: int, T: int, onwards: bool = True
) -> Masks:
    """Rows that a different choice can have changed; `differs` has it by layer, where known.

    `onwards` False: their own choices alone, and not what attention brings from earlier rows.
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
    return out | dict.fromkeys(points(cfg, top)[len(out) :], touched)


def differences(ours: Values, theirs: Values) -> dict[int, np.ndarray]:
    """Layer → rows whose experts are not ours."""
    return {
        int(path.split(".")[2]): np.any(lost(ours[path][:, : x.shape[1]], x), axis=1)
        for path, x in theirs.items()
        if path.endswith("gate#experts")
    }


# --- envelopes ----------------------------------------------------------------------------------


def emulation(
    decoder: Decoder,
    profile: Profile,
    tokens: Sequence[int],
    truth: Seen,
    runs: int,
) -> Pass:
    """The emulated runs of a profile, one pass of that many times the rows."""
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
    """What is kept of each of them."""
    every = {n: x.reshape(runs, len(x) // runs, *x.shape[1:]) for n, x in seen.values().items()}
    return [{name: x[run] for name, x in every.items()} for run in range(runs)]


def sample(profile: Profile, each: Sequence[Values], truth: Values, cfg: Config) -> Values:
    """The levels and spreads of one profile from its emulated runs, as the file has them."""
    T, top = truth[LOGITS].shape
    names = points(cfg, top)
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
        i: ~(_margin(truth, gate, cfg) > _tie(noise[m], NEAR))
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
    """RMS over the kept experts of a score's error [T]; masked groups have none."""
    a, b = truth[gate + "#scores"], run[gate + "#scores"]
    both = np.isfinite(a) & np.isfinite(b)
    return _known_rms(np.where(both, np.where(both, b, 0) - np.where(both, a, 0), np.nan))


def _margin(truth: Values, gate: str, cfg: Config) -> np.ndarray:
    """Of experts, or half of that of groups, whose scores are sums of two, if it is less."""
    score, K = truth[gate + "#scores"], cfg.num_experts_per_tok
    own = score[:, K - 1] - score[:, K] if score.shape[1] > K else np.full(len(score), np.inf)
    return np.minimum(own, truth[gate + "#groups"] / 2)


def _tie(noise: np.ndarray, deviations: float) -> np.ndarray:
    """Differences of scores within this are explained; NaN where no noise was sampled."""
    return deviations * np.sqrt(2) * noise + 4 * 2.0**-24


def levels(e: np.ndarray, least: float = 0.1) -> np.ndarray:
    """e [runs, P, T], NaN where left out → RMS over runs [P, T], no less than `least` of a row's.

    A row without samples has that of the point, a point without samples NaN.
    """
    known = ~np.isnan(e)
    count, total = known.sum(axis=0), np.where(known, e * e, 0).sum(axis=0)
    rows = count.sum(axis=-1, keepdims=True)
    pooled = total.sum(axis=-1, keepdims=True) / np.maximum(rows, 1)
    own = np.where(count > 0, total / np.maximum(count, 1), pooled)
    level = np.sqrt(np.maximum(own, least**2 * pooled)) + 1e-30
    return np.where(rows > 0, level, np.nan)


def spread(e: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """How log R and log M of one run lie against the others: [P, 2, 2], NaN where too few say.

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
                drawn[run, p] = statistics(known)
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


def statistics(ratio: np.ndarray) -> tuple[float, float]:
    """log R and log M of the rows' errors over their levels."""
    return log(np.sqrt((ratio**2).mean()) + 1e-12), log(ratio.max() + 1e-12)


# --- make ---------------------------------------------------------------------------------------


def make(
    model: Model,
    tokens: Sequence[int],
    out: str | Path,
    *,
    top: int = 64,
    profiles: Sequence[str] = KEPT,
    runs: int = RUNS,
    hash_shards: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the truth of these tokens, in the model's numerics and conventions.

    profiles     whose noise to sample: a forward pass of `runs` times the rows for each; all at
                 once, so that each weight is read once, with 4·8·D bytes for each of these rows
    hash_shards  also the sha256 of every shard; K2's are 594 GB
    progress     is told layers done, and of how many
    """
    cfg, out = model.cfg, Path(out)
    check_tokens(tokens, 0, cfg)
    unknown = [name for name in profiles if name not in PROFILES]
    if unknown:
        raise InputError(f"profile {unknown[0]!r}; known: {', '.join(PROFILES)}")
    if runs < 4 or top < 1 or cfg.n_routed_experts > 1 << 15:
        raise InputError(
            f"{runs} runs, top {top}, {cfg.n_routed_experts} experts; "
            "expected at least 4, at least 1, at most 32768"
        )
    done, todo, top = 0, cfg.num_hidden_layers * (1 + len(profiles)), min(top, cfg.vocab_size)

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, todo)

    exact = Seen(model.decoder, top, tick)
    passes = [Pass(model.decoder.using(model.nx.watching(exact)), [tokens], exact)]
    decoder = model.decoder.using(policy("float64", model.nx.conventions))
    for name in profiles:
        passes.append(emulation(decoder, PROFILES[name], tokens, exact, runs))
    forward(passes)
    truth = exact.values()
    whole = _columns(truth, cfg)
    for name, emulated_ in zip(profiles, passes[1:], strict=True):
        whole |= sample(PROFILES[name], each_run(emulated_.seen, runs), truth, cfg)
    wanted = layout(cfg, len(tokens), top, profiles)
    arrays = {n: whole[n].astype(DTYPES[d]).reshape(s) for n, (d, s) in wanted.items()}
    facts = _facts(model, hash_shards) | {
        "tokens": [int(t) for t in tokens],
        "top": top,
        "runs": runs,
        "profiles": [asdict(PROFILES[name]) for name in profiles],
    }
    write(out, arrays, {KEY: json.dumps(facts, sort_keys=True)})
    return out


COLUMNS = {  # tensor of the file → the point of each layer
    "layers#sketch": "",
    "self_attn#sketch": ".self_attn",
    "mlp#sketch": ".mlp",
    "gate#experts": ".mlp.gate#experts",
    "gate#scores": ".mlp.gate#scores",
    "gate#weights": ".mlp.gate#weights",
    "gate#groups": ".mlp.gate#groups",
}


def _columns(values: Values, cfg: Config) -> Values:
    """Points → tensors of the file."""
    out = {"model.norm": values["model.norm"], "lm_head#ids": values["lm_head#ids"]}
    out |= {"lm_head#logprobs": values[LOGITS], "lm_head#logsumexp": values[TOTAL]}
    for name, end in COLUMNS.items():
        layers = mixtures(cfg) if "gate" in name else range(cfg.num_hidden_layers)
        parts = [values[f"model.layers.{i}{end}"] for i in layers]
        out[name] = np.stack(parts, axis=1) if parts else np.zeros(0)
    return out


def _facts(model: Model, hash_shards: bool) -> dict[str, Any]:
    """Where a truth comes from."""
    config = (model.checkpoint.path / "config.json").read_text("utf-8")
    shards: list[dict[str, Any]] = []
    for file in sorted({t.file for t in model.checkpoint.tensors.values()}):
        shards.append({"name": file.name, "size": file.stat().st_size})
        if hash_shards:
            with file.open("rb") as raw:
                shards[-1]["sha256"] = hashlib.file_digest(raw, "sha256").hexdigest()
    return {
        "version": VERSION,
        "producer": "refmoe golden make",
        "refmoe": refmoe.__version__,
        "numpy": np.__version__,
        "numerics": model.nx.name,
        "conventions": asdict(model.nx.conventions),
        "config": config,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "shards": shards,
    }


# --- read ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    path: Path
    cfg: Config
    tokens: list[int]
    numerics: str
    conventions: Conventions
    profiles: dict[str, Profile]
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]  # all that the file says of itself

    @property
    def top(self) -> int:
        return int(self.arrays["lm_head#ids"].shape[1])

    @property
    def margin(self) -> np.ndarray:
        """[T, M]: score of the last expert taken minus the first refused; inf: none was."""
        score, K = self.arrays["gate#scores"].astype(np.float64), self.cfg.num_experts_per_tok
        if score.shape[2] == K:
            return np.full(score.shape[:2], np.inf)
        out: np.ndarray = score[:, :, K - 1] - score[:, :, K]
        return out

    def values(self, T: int) -> Values:
        """The points of the first T tokens."""
        a = {name: x[:T] for name, x in self.arrays.items()}
        out = {"model.norm": a["model.norm"], "lm_head#ids": a["lm_head#ids"]}
        out |= {LOGITS: a["lm_head#logprobs"], TOTAL: a["lm_head#logsumexp"][:, None]}
        for name, end in COLUMNS.items():
            layers = mixtures(self.cfg) if "gate" in name else range(self.cfg.num_hidden_layers)
            x = a.get(name, np.full((T, len(layers)), np.inf))  # groups, where there are none
            out |= {f"model.layers.{i}{end}": x[:, m] for m, i in enumerate(layers)}
        return {n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in out.items()}


def read_truth(path: str | Path) -> Truth:
    """Read what `make` wrote; `InputError` says what is wrong with the file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    stored = read_header(path)
    raw = path.read_bytes()
    try:
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        facts = json.loads(header["__metadata__"][KEY])
        version = facts["version"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError(f"{path}: no truth of refmoe's; golden make writes one") from None
    if version != VERSION:
        raise InputError(f"{path} is version {version}, this refmoe reads {VERSION}; make it anew")
    try:
        cfg, tokens, conventions, profiles = _understood(facts)
        check_tokens(tokens, 0, cfg)
        sketches = stored.get("layers#sketch")
        rows = (len(tokens), cfg.num_hidden_layers, WIDTH)
        if sketches is None or sketches.shape != rows:  # before anything is as long as it claims
            raise InputError(f"layers#sketch is missing, or not {list(rows)}")
        wanted = layout(cfg, len(tokens), facts["top"], list(profiles))
        found = {name: (t.dtype, t.shape) for name, t in stored.items()}
        if found != wanted:
            odd = min(n for n in found | wanted if found.get(n) != wanted.get(n))
            raise InputError(f"{odd} is {found.get(odd)}, expected {wanted.get(odd)}")
        arrays = {}
        for name, t in stored.items():
            x = np.frombuffer(raw[t.start : t.start + t.nbytes], DTYPES[t.dtype])
            arrays[name] = x.reshape(t.shape)
        _sound(arrays, cfg)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise InputError(f"{path}: what it says of itself makes no sense ({e!r})") from None
    return Truth(path, cfg, tokens, facts["numerics"], conventions, profiles, arrays, facts)


def _understood(
    facts: dict[str, Any],
) -> tuple[Config, list[int], Conventions, dict[str, Profile]]:
    if hashlib.sha256(facts["config"].encode()).hexdigest() != facts["config_sha256"]:
        raise InputError("its config.json has not the sha256 beside it")
    cfg = Config.from_dict(json.loads(facts["config"]))
    tokens, top = facts["tokens"], facts["top"]
    if not isinstance(tokens, list) or not all(type(t) is int for t in tokens):
        raise InputError("tokens are no list of integers")
    if type(top) is not int or not 0 < top <= cfg.vocab_size:
        raise InputError(f"top = {top!r}, expected 1 to {cfg.vocab_size}")
    if facts["numerics"] not in POLICIES:
        raise InputError(f"numerics {facts['numerics']!r}; known: {', '.join(POLICIES)}")
    tuples = {k: tuple(v) for k, v in facts["conventions"].items() if isinstance(v, list)}
    profiles = [Profile(**p) for p in facts["profiles"]]
    for p in profiles:
        types = {p.storage, p.sums, p.logits, p.weights, p.angles, p.cache or p.storage}
        if not types <= set(UNIT) or not isinstance(p.name, str):
            raise InputError(f"profile {p.name!r} has types {sorted(types)}; known: {list(UNIT)}")
    conventions = Conventions(**facts["conventions"] | tuples)
    if not isinstance(conventions.name, str):
        raise InputError(f"conventions named {conventions.name!r}")
    sides(conventions, cfg)
    return cfg, tokens, conventions, {p.name: p for p in profiles}


def _sound(arrays: Mapping[str, np.ndarray], cfg: Config) -> None:
    """Numbers where numbers must be, indices inside, levels with spreads."""
    for name, x in arrays.items():
        least = {"gate#scores": -np.inf, "gate#groups": np.inf}.get(name)  # refused; none was
        bad = ~np.isfinite(x) if x.dtype.kind == "f" else np.zeros(1, bool)
        if name.endswith("#spread"):
            bad = np.isinf(x) | (x[..., 1] < 0)[..., None]
        elif least is not None:
            bad &= x != least
        elif name == "lm_head#logprobs":
            bad |= x > 1e-3
        if bad.any():
            raise InputError(f"{name} has {int(bad.sum())} values that cannot be")
    for name, end in (("gate#experts", cfg.n_routed_experts), ("lm_head#ids", cfg.vocab_size)):
        x = np.sort(arrays[name], axis=-1)
        if x.size and (x.min() < 0 or x.max() >= end or (np.diff(x, axis=-1) == 0).any()):
            raise InputError(f"{name} has indices outside 0 to {end - 1}, or one twice")


# --- check --------------------------------------------------------------------------------------


def check_truth(
    truth: Truth,
    dump: Dump,
    *,
    engine: str | None = None,
    profile: str | None = None,
    alpha: float = ALPHA,
) -> Report:
    """Judge a dump of the same tokens, or of the first of them, end to end and without the model.

    engine   whose conventions it is to be held to; those of the truth, unless given
    profile  its precision; without one, that of the values in the dump
    """
    engine = truth.conventions.name if engine is None else engine
    kept = _profile(truth, dump, _same_sides(truth, engine), profile)
    return _Check(truth, dump, engine, kept, alpha).report()


def _same_sides(truth: Truth, engine: str) -> str:
    """The engine, if its conventions make the same network of this config."""
    if engine == truth.conventions.name:
        return engine if engine in CONVENTIONS else "refmoe"
    if engine not in CONVENTIONS:
        raise InputError(f"engine {engine!r}; known: {', '.join(CONVENTIONS)}")
    theirs, ours = sides(CONVENTIONS[engine], truth.cfg), sides(truth.conventions, truth.cfg)
    if theirs != ours:
        names = ", ".join(n for n in theirs if theirs[n] != ours[n])
        raise InputError(
            f"{truth.path} was made under conventions {truth.conventions.name}; {engine}'s have "
            f"another {names}; make a truth under --conventions {engine}"
        )
    return engine


def sides(conventions: Conventions, cfg: Config) -> dict[str, Any]:
    """What of the conventions makes a difference to float64 and this config."""
    scheme = {Int4Scheme: "int4", Fp8Scheme: "fp8"}.get(type(cfg.quantization))
    yarn = cfg.rope_scaling
    betas = conventions.yarn_betas or (yarn and (yarn.beta_fast, yarn.beta_slow))
    return {
        "latent_norm_eps": conventions.latent_norm_eps or cfg.rms_norm_eps,
        "rounded_products": scheme in conventions.rounded_products,
        "masked_groups": conventions.masked_groups if cfg.n_group != cfg.topk_group else None,
        "routed_scale": conventions.routed_scale,
        "yarn_betas": betas if yarn else None,
    }


def _profile(truth: Truth, dump: Dump, engine: str, name: str | None) -> Profile:
    """The first profile of the truth that is nowhere finer than the one asked for."""
    if name is not None and name not in PROFILES:
        raise InputError(f"profile {name!r}; known: {', '.join(PROFILES)}")
    wanted = PROFILES[name] if name else profile_of(dump.rounded, engine)
    for p in truth.profiles.values():
        types = [(getattr(p, f), getattr(wanted, f)) for f in TYPES]
        types.append((p.cache or p.storage, wanted.cache or wanted.storage))
        if wanted.activations in (None, p.activations) and all(
            UNIT[a] >= UNIT[b] for a, b in types
        ):
            if UNIT[p.storage] < UNIT[truth.numerics]:
                break
            return p
    raise InputError(
        f"{truth.path} keeps the noise of {', '.join(truth.profiles) or 'no profile'} in numerics "
        f"{truth.numerics}; none serves for {wanted.name}"
    )


TYPES = [f.name for f in fields(Profile) if f.name not in ("name", "cache", "activations")]


class _Row(NamedTuple):
    """One point before Holm: errors and levels of the rows judged, and which envelope."""

    error: np.ndarray
    level: np.ndarray
    mean: np.ndarray  # of log R, log M
    deviation: np.ndarray
    same: bool

    @property
    def reach(self) -> float:
        """What is explained of R, five deviations up."""
        return float(log(rms(self.level[None])[0]) + self.mean[0] + 5 * self.deviation[0])


class _Check:
    def __init__(self, truth: Truth, dump: Dump, engine: str, profile: Profile, alpha: float):
        self.truth, self.engine, self.profile, self.alpha = truth, engine, profile, alpha
        self.cfg, self.top = truth.cfg, truth.top
        self.dump = replace(dump, arrays=adapt(dump.arrays, truth.cfg))
        self.T = len(truth.tokens) if dump.tokens is None else len(dump.tokens)
        if dump.tokens is not None and list(dump.tokens) != truth.tokens[: self.T]:
            raise InputError(
                f"{dump.path} is of other tokens than {truth.path}; "
                "expected the same, or the first of them"
            )
        self.ours = truth.values(self.T)
        self.names = points(self.cfg, self.top)
        self.misfits: dict[str, str] = {}
        self.suspects: dict[str, str] = {}
        self.rungs = [self.top]
        self.theirs = self.read()

    # --- what the dump has

    def read(self) -> Values:
        out: Values = {}
        for path in self.names:
            x = self.point(path) if not path.startswith(LOGITS) else None
            if x is not None:
                out[path] = x
        out |= self.logits() if self.dump.top is None else self.top_logprobs()
        for path in [p for p, x in out.items() if not p.startswith(LOGITS)]:
            if not np.isfinite(out[path]).all():
                self.suspects[path] = "not finite"
                del out[path]
        return out

    def point(self, path: str) -> np.ndarray | None:
        """Their values as a truth keeps them, or None."""
        sketched, raw = self.dump.arrays.get(path + "#sketch"), self.dump.arrays.get(path)
        mine = self.ours[path]
        K = self.cfg.num_experts_per_tok
        if "gate#" not in path and path != "model.norm" and sketched is not None:
            if sketched.shape == (self.T, WIDTH):
                return sketched[:, : mine.shape[1]].astype(np.float64)
            self.misfits[path] = f"its sketch is {list(sketched.shape)} for {self.T} tokens"
        if raw is None or sketched is not None:
            return None
        if path in self.dump.partial:
            self.misfits[path] = "known in part; a truth has no more than a sketch of it"
            return None
        shape = (self.T, K if "gate#" in path else self.cfg.hidden_size)
        x = fit(path, raw, shape, self.truth.conventions)
        if x is None:
            self.misfits[path] = f"it is {list(raw.shape)}, this point is {list(shape)}"
        elif path.endswith("#experts"):
            inside = (x >= 0) & (x < self.cfg.n_routed_experts) & (x % 1 == 0)
            if not inside.all():
                row = int(np.argwhere(~inside)[0][0])
                self.suspects[path] = f"token {row} chose {x[row].tolist()}, no expert's index"
                return None
            x = x.astype(np.int64)
        elif "gate#" in path or path == "model.norm":
            x = x.astype(np.float64)
        elif np.isfinite(x).all():
            x = sketch(path, x)[:, : mine.shape[1]]
        return x

    def logits(self) -> Values:
        raw = self.dump.arrays.get(LOGITS)
        if raw is None:
            return {}
        shape = (self.T, self.cfg.vocab_size)
        x = fit(LOGITS, raw, shape, self.truth.conventions)
        if x is None or LOGITS in self.dump.partial:
            self.misfits[LOGITS] = f"it is {list(raw.shape)}, or in part; needed: {list(shape)}"
            return {}
        if not np.isfinite(x).all():
            self.suspects[f"{LOGITS}#top{self.top}"] = "not finite"
            return {}
        x = x.astype(np.float64)
        total = logsumexp(x)
        at = self.ours["lm_head#ids"].astype(np.intp)
        return {LOGITS: np.take_along_axis(x, at, axis=-1) - total, TOTAL: total}

    def top_logprobs(self) -> Values:
        """At the truth's ids. One that is not listed is no likelier than the last but one listed:
        servers list the k likeliest and sometimes the token that followed."""
        assert self.dump.top is not None
        ids, values = self.dump.top
        if len(ids) != self.T or ids.max(initial=-1) >= self.cfg.vocab_size:
            self.misfits[TOP] = f"of {len(ids)} positions for {self.T} tokens, or of other words"
            return {}
        ours, known = self.ours[LOGITS], self.ours["lm_head#ids"]
        out = np.full(ours.shape, np.nan)
        listed = (ids >= 0).sum(axis=1)
        for t in np.flatnonzero(listed):
            row = dict(zip(ids[t].tolist(), values[t].tolist(), strict=True))
            row.pop(-1, None)
            bound = sorted(row.values())[1] if len(row) > 1 else np.nan  # of one, nothing
            unlisted = np.minimum(ours[t], bound)
            out[t] = [row.get(i, unlisted[k]) for k, i in enumerate(known[t].tolist())]
        if not listed.any():
            return {}
        usual = int(np.median(listed[listed > 0]))
        self.rungs = [max(n for n in ladder(self.top) if n <= max(1, usual))]
        return {LOGITS: out}

    # --- verdict

    def report(self) -> Report:
        touched = reached(differences(self.ours, self.theirs), self.cfg, self.top, self.T)
        router = self.router(touched)
        rows = self.rows(touched)
        outside, judged = self.holm(rows)
        for path in outside:
            self.suspects.setdefault(
                path, f"{judged[path].multiple:.3g} times what rounding explains"
            )
        first = next((p for p in self.names if p in self.suspects), None)
        wide = [p for p, x in judged.items() if x.envelope > WIDE * self.signal(p)]
        if first is not None:
            verdict, reason = "fault", self.suspects[first] + self.within(first, judged)
        elif not self.theirs:
            verdict, reason = "undecidable", "nothing in the dump is kept in a truth"
        elif not judged:
            verdict, reason = "undecidable", "no row is left that a near tie may not have changed"
        elif len(wide) == len(judged):
            verdict, reason = "undecidable", "rounding alone could explain anything here"
        else:
            verdict, reason = "pass", f"{len(judged)} points within their rounding"
        ours, defaults = asdict(self.truth.conventions), asdict(CONVENTIONS["refmoe"])
        missing = [str(_said(p)) for p in self.names if self.path(p) not in self.theirs]
        return Report(
            verdict=verdict,
            point=_said(first),
            reason=f"{reason}; {self.limits(rows, touched, router)}",
            engine=self.engine,
            profile=self.profile.name,
            conventions={n: str(v) for n, v in ours.items() if v != defaults[n] and n != "name"},
            compared=len(self.theirs),
            missing=tuple(dict.fromkeys(missing)),
            unmatched=dict(self.misfits),
            points=tuple(judged.values()),
            router=router,
            alpha=self.alpha,
        )

    def signal(self, point: str) -> float:
        """What an error of this point is a part of: 1, or nats."""
        if not point.startswith(LOGITS):
            return 1.0
        return float(np.sqrt((self.ours[self.path(point)] ** 2).mean()))

    def path(self, point: str) -> str:
        return LOGITS if point.startswith(f"{LOGITS}#top") else point

    def rows(self, touched: Masks) -> dict[str, _Row]:
        """Every point that can be judged; by the other envelope if it says twice as much."""
        found = errors(self.ours, self.theirs, self.rungs)
        out = {}
        for p, path in enumerate(self.names):
            mask, error = touched[path], found.get(path)
            if error is None:
                continue
            rows = [self.row(p, error, None)]
            if mask is not None and not path.endswith("#experts"):  # judged one by one there
                rows.append(self.row(p, error, ~mask))
            usable = [r for r in rows if r is not None]
            if usable:
                out[path] = min(usable, key=lambda r: r.reach - log(2) * r.same)
        return out

    def row(self, p: int, error: np.ndarray, untouched: np.ndarray | None) -> _Row | None:
        kind = "all" if untouched is None else "same"
        level = decode(self.truth.arrays[f"{self.profile.name}#{kind}"][: self.T, p])
        rows = np.isfinite(error) & np.isfinite(level)
        if untouched is not None:
            rows &= untouched
        spreads = self.truth.arrays[f"{self.profile.name}#spread"][p, 0 if kind == "same" else 1]
        mean, deviation = spreads.astype(np.float64).T
        if not np.isfinite(spreads).all() or rows.sum() < max(1, FEWEST * self.T):
            return None
        deviation = deviation * max(1.0, np.sqrt(len(self.truth.tokens) / rows.sum()))
        return _Row(error[rows], level[rows], mean, deviation, kind == "same")

    def holm(self, rows: Mapping[str, _Row]) -> tuple[list[str], dict[str, Point]]:
        """The points outside, and every point with its share of what is explained."""
        normal, chance, judged = NormalDist(), {}, {}
        reach = -normal.inv_cdf(self.alpha / (2 * max(1, len(rows))))
        for path, r in rows.items():
            found = np.array(statistics(r.error / r.level))
            z = (found - log(SLACK) - r.mean) / r.deviation
            chance[path] = min(1.0, 2 * normal.cdf(-float(z.max())))  # two statistics a point
            explained = np.exp(r.mean + log(SLACK) + reach * r.deviation)
            error, level = (float(np.sqrt((x**2).mean())) for x in (r.error, r.level))
            multiple = float((np.exp(found) / explained).max())
            judged[path] = Point(str(_said(path)), error, level * float(explained[0]), multiple, ())
        outside = []
        for i, path in enumerate(sorted(chance, key=lambda p: chance[p])):
            if chance[path] > self.alpha / (len(chance) - i):
                break
            outside.append(path)
        return outside, judged

    def router(self, touched: Masks) -> dict[str, int]:
        """Choices as sets. In rows that a flip has reached they may be anything."""
        count = {"flips": 0, "explained": 0, "unexplained": 0, "after": 0}
        K = self.cfg.num_experts_per_tok
        noise = decode(self.truth.arrays[f"{self.profile.name}#scores"][: self.T])
        for m, i in enumerate(mixtures(self.cfg)):
            path = f"model.layers.{i}.mlp.gate#experts"
            if path not in self.theirs:
                continue
            gate, ids, theirs = path.removesuffix("#experts"), self.ours[path], self.theirs[path]
            mask = touched[path]
            for t in np.flatnonzero(lost(ids[:, :K], theirs).any(axis=1)).tolist():
                count["flips"] += 1
                if mask is None or mask[t] or np.isnan(noise[t, m]):
                    count["after"] += 1
                    continue
                scores = self.ours[gate + "#scores"][t]
                tie = float(_tie(noise[t, m], TIE))
                gap, gone, taken = _gap(ids[t].tolist(), scores, theirs[t].tolist(), K)
                if taken and min(gap, self.ours[gate + "#groups"][t] / 2) <= tie:
                    count["explained"] += 1
                    continue
                count["unexplained"] += 1
                self.suspects.setdefault(
                    path,
                    f"token {t} chose {taken} over {gone}, whose scores are at least {gap:.3g} "
                    f"better; noise explains {tie:.1g}",
                )
        return count

    # --- words

    def within(self, first: str, judged: Mapping[str, Point]) -> str:
        """Between which points the fault is."""
        before = self.names[: self.names.index(first)]
        good = [p for p in before if p in judged and judged[p].multiple <= 1]
        return f"; the last point within its rounding is {_said(good[-1])}" if good else ""

    def limits(self, rows: Mapping[str, _Row], touched: Masks, router: Mapping[str, int]) -> str:
        """What this verdict can see and what it cannot."""
        out = [
            "judged end to end against a truth, without the model: an error below the rounding "
            "of all that comes before a point is not seen, nor where in a layer a fault is"
        ]
        free = [p for p, r in rows.items() if not r.same and not p.endswith("#experts")]
        if free:
            out.append(
                f"{len(free)} of {len(rows)} points, from {_said(free[0])} on, against noise that "
                "includes flipped choices, as the dump shows too few rows of the same choices"
            )
        last = [m for p, r in rows.items() if r.same and (m := touched[p]) is not None]
        if last and last[-1].any():
            out.append(
                f"{int(last[-1].sum())} of {self.T} rows left out of the later points, "
                f"as one of {router['flips']} flipped choices has reached them"
            )
        if router["after"]:
            out.append(f"{router['after']} flips in such rows not judged one by one")
        kept = {self.path(p) for p in self.names}
        others = [n for n in self.dump.arrays if n.removesuffix("#sketch") not in kept]
        if others:
            out.append(f"{len(others)} tensors of the dump are of points that a truth lacks")
        return "; ".join(out)


def _said(point: str | None) -> str | None:
    """The name that a reader knows: log-probabilities are of the logits."""
    return LOGITS if point is not None and point.startswith(f"{LOGITS}#top") else point


def _gap(
    ids: list[int], scores: np.ndarray, theirs: list[int], K: int
) -> tuple[float, list[int], list[int]]:
    """By how much, at least, the best expert lost is better than the worst taken; and both."""
    gone = sorted(set(ids[:K]) - set(theirs))
    taken = sorted(set(theirs) - set(ids[:K]))
    known = dict(zip(ids, scores.tolist(), strict=True))
    if not taken or len(set(theirs)) < len(theirs):
        return float("inf"), gone, taken
    worst = min(known.get(e, float(scores[-1])) for e in taken)
    return max(known[e] for e in gone) - worst, gone, taken
