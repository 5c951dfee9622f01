"""The constants of the model that an engine may have at any value, so that they are solved for.

One table: how each is named, where it shows, what it is in a config, a decoder with another value
of it, and the values that other models have. oracle/constants.py finds the value; an engine with
one of them wrong at a value that no list holds is then named, with that value.

To add a constant, add an entry to `CONSTANTS`. A value is that of the *config*, as far as a config
has it: the answer says what the engine seems to have read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import numpy as np

from refmoe.config import Config
from refmoe.engines import CONVENTIONS, Conventions
from refmoe.model.decoder import Decoder
from refmoe.model.rope import cos_sin, softmax_scale
from refmoe.oracle.faults.attention import attend_to
from refmoe.oracle.faults.base import (
    ALL,
    LATENT,
    MAIN,
    PROBS,
    ROTATED,
    ROUTED,
    SCORES,
    WEIGHTS,
    Changes,
    Fault,
    Here,
    K,
    Models,
    Planted,
    Q,
)
from refmoe.oracle.faults.common import gamma
from refmoe.oracle.faults.positions import (
    WITH_YARN,
    rotate_as,
    with_yarn,
    yarn_factor,
)
from refmoe.weights.synthetic.members import MEMBERS, published

Value = Callable[[Config, Conventions], float]


@dataclass(frozen=True)
class Constant:
    """One constant: where it shows, and the decoder of an engine that has another value of it."""

    name: str  # the cause's id is constant-NAME
    title: str  # of the quantity, in a sentence
    points: tuple[str, ...]  # ends of the names of points at which it shows first
    value: Value  # the right one
    alter: Callable[[Decoder, float], Decoder]
    low: float  # the least value that is sought
    high: float
    scale: Literal["log", "linear", "offset", "window"]  # on which it is sought
    where: Models = ALL
    others: Mapping[str, float] = field(
        default_factory=dict, hash=False
    )  # models outside this family
    faults: tuple[str, ...] = ()  # of the dictionary that are this constant at one value
    factor: bool = False  # its ratio to the right one is what counts

    @property
    def id(self) -> str:
        return f"constant-{self.name}"

    def at(self, value: float) -> Fault:
        """Return the fault of an engine that has this value."""
        return Fault(
            self.id,
            f"{self.title} is wrong",
            (),
            self.points,
            lambda d, layer: self.alter(d, value),
        )


def shows(constant: Constant, cfg: Config, kinds: list[str]) -> bool:
    """Tell whether a model has this constant, and shows it at one of these kinds of points."""
    return constant.where(cfg) and any(k.endswith(constant.points) for k in kinds)


# --- decoders with another value


def configured(change: Callable[[Config, float], Config]) -> Callable[[Decoder, float], Decoder]:
    """Return the alteration that computes under change(config, value)."""
    return lambda decoder, value: replace(decoder, cfg=change(decoder.cfg, value))


def watched(changes: Callable[[Config, float], Changes]) -> Callable[[Decoder, float], Decoder]:
    """Return the alteration that changes points' values, in the decoder's own form of attention."""

    def alter(decoder: Decoder, value: float) -> Decoder:
        watch = Planted(decoder, changes(decoder.cfg, value), {}, None)
        return decoder.using(decoder.nx.watching(watch))

    return alter


def with_latent_eps(decoder: Decoder, eps: float) -> Decoder:
    """Return the decoder whose two norms inside attention have this eps."""
    sides = replace(decoder.nx.conventions, latent_norm_eps=eps)
    return decoder.using(replace(decoder.nx, conventions=sides))


def with_main_eps(decoder: Decoder, eps: float) -> Decoder:
    """Return the decoder whose norms of the residual stream have this eps, the others their own."""
    kept = latent_eps(decoder.cfg, decoder.nx.conventions)
    cfg = replace(decoder.cfg, rms_norm_eps=eps)
    return with_latent_eps(replace(decoder, cfg=cfg), kept)


def with_every_eps(decoder: Decoder, eps: float) -> Decoder:
    """Return the decoder all of whose norms have this eps."""
    return with_latent_eps(with_main_eps(decoder, eps), eps)


def latent_eps(cfg: Config, sides: Conventions) -> float:
    """Return the eps of the two norms inside attention."""
    return sides.latent_norm_eps or cfg.rms_norm_eps


def yarn(name: str, *names: str) -> Callable[[Config, float], Config]:
    """Return the change of a config that gives these settings of YaRN one value."""

    def change(cfg: Config, value: float) -> Config:
        return with_yarn(**{n: lambda _: value for n in (name, *names)})(cfg)

    return change


def setting(name: str) -> Value:
    """Return the function that reads one of YaRN's settings; NaN without YaRN."""
    return lambda cfg, sides: float(getattr(cfg.rope_scaling, name, np.nan))


def shifted(*ends: str) -> Callable[[Config, float], Changes]:
    """Return the changes that rotate these as if they stood so many positions further on."""
    return lambda cfg, offset: dict.fromkeys(ends, rotate_as(shift=int(offset)))


def scaled_scores(cfg: Config, scale: float) -> Changes:
    """Return the changes that multiply q·k by this scale."""
    return {SCORES: lambda s, here: s * (scale / softmax_scale(cfg))}


def see_the_last(window: int, first: int = 0) -> Callable[[int], np.ndarray]:
    """Return the mask of a token that sees the last `window` positions, and the `first` ones."""

    def visible(T: int) -> np.ndarray:
        seen = ~np.tri(T, k=-window, dtype=bool)
        seen[:, :first] = True
        return np.tri(T, dtype=bool) & seen

    return visible


def _one(cfg: Config) -> float:
    return 1.0


def _frequencies(cfg: Config, factor: float) -> Changes:
    """Return the changes that rotate by the frequencies of another factor of YaRN alone."""
    turn = rotate_as(with_yarn(factor=lambda _: factor, mscale=_one, mscale_all_dim=_one))

    def change(x: np.ndarray, here: Here) -> np.ndarray:
        gain, _ = cos_sin(np.zeros(1), here.cfg, here.nx)  # of cos and sin, which stays
        return turn(x, here) * gain[0, 0]

    return dict.fromkeys(ROTATED, change)


EPS = (1e-10, 1.0)
THETAS = {  # config.json of meta-llama/Meta-Llama-3-8B, moonshotai/Kimi-VL-A3B, Qwen/Qwen2.5-7B
    "Llama 3": 500_000.0,
    "Kimi-VL-A3B": 800_000.0,
    "Qwen2.5": 1_000_000.0,
}
FACTORED = Models("YaRN with a factor above 1", lambda cfg: yarn_factor(cfg) > 1)
MSCALES = {"DeepSeek-V2": 0.707}  # config.json of deepseek-ai/DeepSeek-V2 and -V2-Lite
SCALINGS = {"DeepSeek-V2": 16.0, "DeepSeek-V2-Lite": 1.0}

CONSTANTS = (
    Constant(
        "theta",
        "rope_theta",
        ROTATED,
        lambda cfg, sides: cfg.rope_theta,
        configured(lambda cfg, theta: replace(cfg, rope_theta=theta)),
        100.0,
        1e9,
        "log",
        others=THETAS,
        faults=("rope-theta",),
    ),
    Constant(
        "yarn-factor",
        "YaRN's factor",
        (*ROTATED, SCORES),
        lambda cfg, sides: yarn_factor(cfg),
        configured(yarn("factor")),
        1.0,
        4096.0,
        "log",
        WITH_YARN,
        faults=("yarn-factor", "yarn-off"),
    ),
    Constant(
        "yarn-factor-rotation",
        "YaRN's factor in the rotation alone",
        ROTATED,
        lambda cfg, sides: yarn_factor(cfg),
        watched(_frequencies),
        1.0,
        4096.0,
        "log",
        WITH_YARN,
        faults=("yarn-frequencies",),
    ),
    Constant(
        "softmax-scale",
        "the softmax scale",
        (SCORES,),
        lambda cfg, sides: softmax_scale(cfg),
        watched(scaled_scores),
        1e-4,
        1e4,
        "log",
        faults=(
            "scale-mscale-missing",
            "scale-mscale-once",
            "scale-mscale-twice",
            "scale-nope",
            "scale-latent",
            "scale-hidden",
            "scale-inverse",
        ),
        factor=True,
    ),
    Constant(
        "mscale",
        "YaRN's mscale (with mscale_all_dim)",
        (SCORES,),
        setting("mscale_all_dim"),
        configured(yarn("mscale", "mscale_all_dim")),
        0.0,
        12.0,
        "linear",
        FACTORED,
        MSCALES,
    ),
    Constant(
        "mscale-all-dim",
        "YaRN's mscale_all_dim",
        (*ROTATED, SCORES),
        setting("mscale_all_dim"),
        configured(yarn("mscale_all_dim")),
        0.0,
        12.0,
        "linear",
        FACTORED,
        MSCALES,
    ),
    Constant(
        "mscale-alone",
        "YaRN's mscale",
        ROTATED,
        setting("mscale"),
        configured(yarn("mscale")),
        0.0,
        12.0,
        "linear",
        FACTORED,
        MSCALES,
    ),
    Constant(
        "routed-scaling",
        "routed_scaling_factor",
        (WEIGHTS, ROUTED),
        lambda cfg, sides: gamma(cfg),
        configured(lambda cfg, factor: replace(cfg, routed_scaling_factor=factor)),
        0.01,
        100.0,
        "log",
        others=SCALINGS,
        faults=("scaling-dropped", "scaling-twice", "normalised-after-scaling"),
    ),
    Constant(
        "eps",
        "rms_norm_eps",
        MAIN,
        lambda cfg, sides: cfg.rms_norm_eps,
        with_main_eps,
        *EPS,
        "log",
        faults=("norm-eps", "norm-eps-zero"),
    ),
    Constant(
        "eps-latent",
        "the eps of q_a_layernorm and kv_a_layernorm",
        LATENT,
        latent_eps,
        with_latent_eps,
        *EPS,
        "log",
        faults=("norm-eps-latent", "norm-eps-zero"),
    ),
    Constant(
        "eps-every",
        "the eps of every norm",
        MAIN + LATENT,
        lambda cfg, sides: cfg.rms_norm_eps,
        with_every_eps,
        *EPS,
        "log",
        faults=("norm-eps-zero",),
    ),
    Constant(
        "offset",
        "the first position",
        ROTATED,
        lambda cfg, sides: 0.0,
        watched(shifted(Q, K)),
        -131072,
        131072,
        "offset",
        faults=("rope-from-one",),
    ),
    Constant(
        "offset-queries",
        "the first position of the queries alone",
        (Q,),
        lambda cfg, sides: 0.0,
        watched(shifted(Q)),
        -131072,
        131072,
        "offset",
        faults=("rope-q-late",),
    ),
    Constant(
        "offset-keys",
        "the first position of the keys alone",
        (K,),
        lambda cfg, sides: 0.0,
        watched(shifted(K)),
        -131072,
        131072,
        "offset",
        faults=("rope-k-late",),
    ),
    Constant(
        "window",
        "the number of positions that a token sees",
        (PROBS,),
        lambda cfg, sides: np.inf,
        watched(lambda cfg, window: attend_to(see_the_last(*_window(window)))),
        1,
        131072,
        "window",
        faults=("mask-window", "mask-first"),
    ),
)

SINKS = 1 << 20  # a window of W positions and the first S is the value W + S·SINKS


def _window(value: float) -> tuple[int, int]:
    """Return how many of the last, and of the first, positions a token sees."""
    first, last = divmod(int(value), SINKS)
    return last, first


@cache
def known_values(constant: Constant) -> dict[str, float]:
    """Return the values that published models have, by the model's name."""
    names = {"k2": "K2", "deepseek": "DeepSeek", "v3": "V3"}
    out = {}
    for member in MEMBERS:
        shown = "-".join(names.get(p, p.capitalize()) for p in member.split("-"))
        cfg = Config.from_dict(published(member))
        out[shown] = constant.value(cfg, CONVENTIONS["refmoe"])
    return {**out, **constant.others}
