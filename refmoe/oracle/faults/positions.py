"""Faults of positions: rotation of queries and keys, YaRN, and the softmax scale."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.model.rope import cos_sin, rotate, softmax_scale
from refmoe.oracle.faults.base import (
    ROTATED,
    SCORES,
    Change,
    Changes,
    Family,
    Fault,
    Fitted,
    Here,
    K,
    Models,
    Q,
    scaled,
    written,
)
from refmoe.oracle.faults.common import unrotated

# --- what several of these faults use


def rotate_as(
    change: Callable[[Config], Config] = lambda cfg: cfg,
    betas: Callable[[Config], tuple[float, float] | None] = lambda cfg: None,
    stretch: Callable[[Config], float] = lambda cfg: 1.0,
    shift: int = 0,
    positions: Callable[[np.ndarray], np.ndarray] = lambda x: np.arange(len(x)),
    by: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] = rotate,
) -> Change:
    """Rotate anew: under another config, other betas or positions, or by another rule.

    `change` of the config, `betas` in its place, the `positions` of rows times `stretch` plus
    `shift`, `by` a function of channels, cosines and sines.
    """

    def rotation(x: np.ndarray, here: Here) -> np.ndarray:
        nx = here.nx
        sides = replace(nx.conventions, yarn_betas=betas(here.cfg) or nx.conventions.yarn_betas)
        at = positions(x) * stretch(here.cfg) + shift
        cos, sin = cos_sin(at, change(here.cfg), replace(nx, conventions=sides))
        if here.path.endswith(Q):
            cos, sin = cos[:, None], sin[:, None]
        return by(unrotated(x, here), cos, sin)

    return rotation


def rotate_halves(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate channel i together with channel i + R/2, not with its neighbour."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def rotate_halves_of_pairs(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate in halves channels that were never brought from pairs into halves."""
    a, b = np.split(rotate_halves(x, cos, sin), 2, axis=-1)
    return np.stack((a, b), axis=-1).reshape(x.shape)


def with_yarn(**changes: Callable[[Config], float]) -> Callable[[Config], Config]:
    """Return a change of a config that gives its YaRN settings these values."""

    def change(cfg: Config) -> Config:
        if cfg.rope_scaling is None:
            return cfg
        new: dict[str, Any] = {name: value(cfg) for name, value in changes.items()}
        return replace(cfg, rope_scaling=replace(cfg.rope_scaling, **new))

    return change


def yarn_factor(cfg: Config) -> float:
    """Return YaRN's factor; 1 without YaRN."""
    return cfg.rope_scaling.factor if cfg.rope_scaling else 1.0


def without_yarn(cfg: Config) -> Config:
    """Return the config without YaRN."""
    return replace(cfg, rope_scaling=None)


def with_config(change: Callable[[Config], Config]) -> Changes:
    """Rotate and scale scores as another config says."""

    def rescale(x: np.ndarray, here: Here) -> np.ndarray:
        return x * (softmax_scale(change(here.cfg)) / softmax_scale(here.cfg))

    return {**dict.fromkeys(ROTATED, rotate_as(change)), SCORES: rescale}


def mscale(cfg: Config) -> float:
    """Return the factor mscale whose square the softmax scale has."""
    return math.sqrt(softmax_scale(cfg) * math.sqrt(cfg.qk_head_dim))


def softmax_scale_of(
    id: str, text: str, value: Callable[[Config], float], references: str = "", **more: Any
) -> Fault:
    """Return a fault that multiplies scores by value(config) instead of `softmax_scale`."""

    def factor(cfg: Config) -> float:
        return value(cfg) / softmax_scale(cfg)

    return scaled(id, text, SCORES, "factor on the scores", factor, references, **more)


WITH_YARN = Models("YaRN", lambda cfg: cfg.rope_scaling is not None)
WITH_MSCALE = Models("YaRN with an mscale other than 1", lambda cfg: mscale(cfg) != 1)

POSITIONS = Family("positions and the softmax scale")

POSITIONS += written(
    "rope-halves",
    "channels are rotated in halves, not in pairs",
    dict.fromkeys(ROTATED, rotate_as(by=rotate_halves)),
    "vllm-project/vllm#28968 vllm-project/vllm#34353 vllm-project/vllm-ascend#4641 "
    "ml-explore/mlx-lm#1431 ModelTC/lightllm#672 huggingface/optimum-intel#1877",
)

POSITIONS += written(
    "rope-halves-q",
    "channels of the queries are rotated in halves, those of the keys in pairs",
    {Q: rotate_as(by=rotate_halves)},
    "vllm-project/vllm#28968",
)

POSITIONS += written(
    "rope-halves-k",
    "channels of the keys are rotated in halves, those of the queries in pairs",
    {K: rotate_as(by=rotate_halves)},
)

POSITIONS += written(
    "rope-unpermuted-q",
    "queries are rotated in halves, but only the keys were brought into halves for it",
    {Q: rotate_as(by=rotate_halves_of_pairs)},
    "huggingface/optimum-intel#1877",
)

POSITIONS += written(
    "rope-unpermuted-k",
    "keys are rotated in halves, but only the queries were brought into halves for it",
    {K: rotate_as(by=rotate_halves_of_pairs)},
)

POSITIONS += written(
    "rope-missing",
    "nothing is rotated",
    dict.fromkeys(ROTATED, unrotated),
    "vllm-project/vllm#27373",
)

POSITIONS += written("rope-missing-k", "the keys are not rotated", {K: unrotated})


def rotate_first_half(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate the first half of the channels, with the frequencies they have."""
    half = x.shape[-1] // 4 * 2
    turned = rotate(x[..., :half], cos[..., : half // 2], sin[..., : half // 2])
    return np.concatenate((turned, x[..., half:]), axis=-1)


POSITIONS += written(
    "rope-partial",
    "only half of the channels are rotated",
    dict.fromkeys(ROTATED, rotate_as(by=rotate_first_half)),
    "vllm-project/vllm#41185",
)


def rotate_back(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate by the negative angle."""
    return rotate(x, cos, -sin)


POSITIONS += written(
    "rope-reversed",
    "rotation goes the other way",
    dict.fromkeys(ROTATED, rotate_as(by=rotate_back)),
)

POSITIONS += written("rope-q-late", "queries stand one position too far", {Q: rotate_as(shift=1)})

POSITIONS += written("rope-k-late", "keys stand one position too far", {K: rotate_as(shift=1)})

POSITIONS += written(
    "rope-from-one",
    "positions begin at 1; harmless, as scores depend on distance",
    dict.fromkeys(ROTATED, rotate_as(shift=1)),
)

POSITIONS += written(
    "rope-theta",
    "rope_theta is another model's, 10000 or 50000",
    with_config(lambda cfg: replace(cfg, rope_theta=50000.0 if cfg.rope_theta == 1e4 else 1e4)),
    points=ROTATED,
)

POSITIONS += written(
    "yarn-off",
    "YaRN is off: neither its frequencies nor its softmax scale",
    with_config(without_yarn),
    "red-hat-data-services/vllm-cpu@efe1b6e07 AI-Hypercomputer/maxtext@f1498e186",
    where=WITH_YARN,
)

POSITIONS += written(
    "yarn-frequencies",
    "YaRN's frequencies are not used, its softmax scale is",
    dict.fromkeys(ROTATED, rotate_as(without_yarn)),
    where=WITH_YARN,
)


def other_factor(cfg: Config) -> float:
    """Return another model's YaRN factor: 32 for 64, else 64."""
    return 32.0 if yarn_factor(cfg) == 64 else 64.0


POSITIONS += written(
    "yarn-factor",
    "YaRN's factor is another model's, 32 or 64",
    with_config(with_yarn(factor=other_factor)),
    "huggingface/transformers#40320 huggingface/transformers#37139",
    where=WITH_YARN,
)


def other_betas(cfg: Config) -> tuple[float, float]:
    """Return another model's YaRN betas: 1/1 for 32/1, else 32/1."""
    return (1.0, 1.0) if cfg.rope_scaling and cfg.rope_scaling.beta_fast == 32 else (32.0, 1.0)


POSITIONS += written(
    "yarn-betas",
    "YaRN's betas are another model's, 32/1 or 1/1",
    dict.fromkeys(ROTATED, rotate_as(betas=other_betas)),
    "ggml-org/llama.cpp#18013",
    where=WITH_YARN,
)

POSITIONS += written(
    "yarn-original",
    "YaRN takes max_position_embeddings for the original length",
    with_config(
        with_yarn(original_max_position_embeddings=lambda cfg: cfg.max_position_embeddings)
    ),
    points=ROTATED,
    where=WITH_YARN,
)

POSITIONS += written(
    "yarn-linear",
    "all frequencies are divided by YaRN's factor",
    dict.fromkeys(ROTATED, rotate_as(without_yarn, stretch=lambda cfg: 1 / yarn_factor(cfg))),
    where=WITH_YARN,
)

POSITIONS += written(
    "yarn-mscale-rotation",
    "mscale multiplies cos and sin",
    dict.fromkeys(ROTATED, lambda x, here: x * mscale(here.cfg)),
    "kekzl/imp#880",
    fitted=Fitted("factor on the rotated channels", mscale),
    where=WITH_MSCALE,
)

POSITIONS += softmax_scale_of(
    "scale-mscale-missing",
    "the softmax scale lacks mscale²",
    lambda cfg: cfg.qk_head_dim**-0.5,
    "huggingface/transformers#47435 huggingface/optimum-intel#1877 "
    "onnxruntime/mobius#548 sgl-project/sglang#3785 ml-explore/mlx-lm#768",
    where=WITH_MSCALE,
)

POSITIONS += softmax_scale_of(
    "scale-mscale-once",
    "the softmax scale has mscale, not its square",
    lambda cfg: mscale(cfg) * cfg.qk_head_dim**-0.5,
    "ggml-org/llama.cpp#17945 ggml-org/llama.cpp#18006 ggml-org/llama.cpp#14896",
    where=WITH_MSCALE,
)

POSITIONS += softmax_scale_of(
    "scale-mscale-twice",
    "mscale² is applied twice",
    lambda cfg: mscale(cfg) ** 4 * cfg.qk_head_dim**-0.5,
    "ggml-org/llama.cpp#17945",
    where=WITH_MSCALE,
)

POSITIONS += softmax_scale_of(
    "scale-nope",
    "the softmax scale counts the channels without rotation only",
    lambda cfg: mscale(cfg) ** 2 * cfg.qk_nope_head_dim**-0.5,
)

POSITIONS += softmax_scale_of(
    "scale-latent",
    "the softmax scale is that of latent and key, without mscale²",
    lambda cfg: (cfg.kv_lora_rank + cfg.qk_rope_head_dim) ** -0.5,
    "vllm-project/vllm#41569",
)

POSITIONS += softmax_scale_of(
    "scale-hidden",
    "the softmax scale takes hidden_size / num_attention_heads for the size of a head",
    lambda cfg: mscale(cfg) ** 2 * (cfg.hidden_size / cfg.num_attention_heads) ** -0.5,
)

POSITIONS += softmax_scale_of(
    "scale-inverse",
    "scores are divided by the softmax scale",
    lambda cfg: 1 / softmax_scale(cfg),
    "AI-Hypercomputer/maxtext@f1498e186",
)
