"""Golden truth: what is needed to judge an engine end to end where the model is not at hand.

`make` runs the model once in its own numerics (float64, if the truth is to be one) and once for
each precision profile with the noise of noise.py, a dozen emulated runs as one batch. It writes one
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

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.engines import Conventions
from refmoe.model.formats.registry import announced_formats
from refmoe.oracle.trace import DIRECTIONS
from refmoe.weights.checkpoint import DTYPES

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


def mixtures(cfg: Config) -> list[int]:
    """Return the layers that have routed experts."""
    return [i for i in range(cfg.num_hidden_layers) if cfg.is_moe(i)]


def ladder(top: int) -> list[int]:
    """Return the numbers of likeliest tokens that are judged together, `top` the last."""
    return [*(n for n in LADDER if n < top), top]


def judged_points(cfg: Config, top: int) -> list[str]:
    """Return what is judged, in the order of computation: points, and parts of the logits."""
    out = []
    for i in range(cfg.num_hidden_layers):
        at = f"model.layers.{i}"
        gate = [f"{at}.mlp.gate#experts", f"{at}.mlp.gate#weights"] if cfg.is_moe(i) else []
        out += [f"{at}.self_attn", *gate, f"{at}.mlp", at]
    return [*out, "model.norm", *(f"{LOGITS}#top{n}" for n in ladder(top)), TOTAL]


def layout(
    cfg: Config, T: int, top: int = 64, profiles: Sequence[str] = KEPT
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return for every tensor of the file its type, as safetensors spells it, and its shape."""
    L, M, P = cfg.num_hidden_layers, len(mixtures(cfg)), len(judged_points(cfg, top))
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
    """Return the bytes of these tensors."""
    return sum(np.dtype(DTYPES[dtype]).itemsize * prod(shape) for dtype, shape in layout.values())


def encode(level: np.ndarray) -> np.ndarray:
    """Return levels as bytes, to 5 %; what is not a number is 0."""
    known = np.isfinite(level)
    with np.errstate(divide="ignore"):
        steps = 230 + 7 * np.log2(np.where(known, level, 1))
    return np.where(known, np.clip(np.rint(steps), 1, 255), 0).astype(np.uint8)


def decode(steps: np.ndarray) -> np.ndarray:
    """Return the levels that `encode` kept, NaN for none."""
    return np.where(steps > 0, 2.0 ** ((steps.astype(np.float64) - 230) / 7), np.nan)


COLUMNS = {  # tensor of the file → the point of each layer
    "layers#sketch": "",
    "self_attn#sketch": ".self_attn",
    "mlp#sketch": ".mlp",
    "gate#experts": ".mlp.gate#experts",
    "gate#scores": ".mlp.gate#scores",
    "gate#weights": ".mlp.gate#weights",
    "gate#groups": ".mlp.gate#groups",
}


def network_conventions(conventions: Conventions, cfg: Config) -> dict[str, Any]:
    """Return what of the conventions makes a difference to float64 under this config."""
    stored = {a.format.name for a in announced_formats(cfg.quantization)}
    yarn = cfg.rope_scaling
    betas = conventions.yarn_betas or (yarn and (yarn.beta_fast, yarn.beta_slow))
    return {
        "latent_norm_eps": conventions.latent_norm_eps or cfg.rms_norm_eps,
        "rounded_products": not stored.isdisjoint(conventions.rounded_products),
        "masked_groups": conventions.masked_groups if cfg.n_group != cfg.topk_group else None,
        "routed_scale": conventions.routed_scale,
        "yarn_betas": betas if yarn else None,
    }
