"""Faults of positions and the softmax scale."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.model.rope import cos_sin, rotate, softmax_scale
from refmoe.oracle.faults.base import Change, Changes, Fault, Fitted, Here, scaled, written

# ------------------------------------------------------------------ rotation and softmax scale

Q, K, ROTATED = "#q_pe", "#k_pe", ("#q_pe", "#k_pe")
SCORES, PROBS, CONTEXT = "#scores", "#probs", "#context"


def _query(here: Here) -> np.ndarray:
    """[T, H, N+R], before rotation."""
    name = "q_b_proj" if here.w.self_attn.q_proj is None else "q_proj"
    q = here[f"self_attn.{name}"]
    return q.reshape(len(q), here.cfg.num_attention_heads, -1)


def unrotated(_: np.ndarray, here: Here) -> np.ndarray:
    if here.path.endswith(Q):
        return _query(here)[..., here.cfg.qk_nope_head_dim :]
    return here["self_attn.kv_a_proj_with_mqa"][:, here.cfg.kv_lora_rank :]


def turn(
    change: Callable[[Config], Config] = lambda cfg: cfg,
    betas: Callable[[Config], tuple[float, float] | None] = lambda cfg: None,
    stretch: Callable[[Config], float] = lambda cfg: 1.0,
    shift: int = 0,
    by: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] = rotate,
) -> Change:
    """Rotated anew: under another config, betas, positions, or by another rule."""

    def rotation(x: np.ndarray, here: Here) -> np.ndarray:
        nx = here.nx
        sides = replace(nx.conventions, yarn_betas=betas(here.cfg) or nx.conventions.yarn_betas)
        positions = np.arange(len(x)) * stretch(here.cfg) + shift
        cos, sin = cos_sin(positions, change(here.cfg), replace(nx, conventions=sides))
        if here.path.endswith(Q):
            cos, sin = cos[:, None], sin[:, None]
        return by(unrotated(x, here), cos, sin)

    return rotation


def rotate_halves(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def rotate_unpermuted(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """An engine that brings pairs into halves, rotates, and has forgotten the former: as pairs."""
    a, b = np.split(rotate_halves(x, cos, sin), 2, axis=-1)
    return np.stack((a, b), axis=-1).reshape(x.shape)


def rotate_back(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    return rotate(x, cos, -sin)


def rotate_some(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """The first half of the channels, with the frequencies they have."""
    half = x.shape[-1] // 4 * 2
    turned = rotate(x[..., :half], cos[..., : half // 2], sin[..., : half // 2])
    return np.concatenate((turned, x[..., half:]), axis=-1)


def yarn(**changes: Callable[[Config], float]) -> Callable[[Config], Config]:
    def change(cfg: Config) -> Config:
        if cfg.rope_scaling is None:
            return cfg
        new: dict[str, Any] = {name: value(cfg) for name, value in changes.items()}
        return replace(cfg, rope_scaling=replace(cfg.rope_scaling, **new))

    return change


def yarn_factor(cfg: Config) -> float:
    return cfg.rope_scaling.factor if cfg.rope_scaling else 1.0


def other_factor(cfg: Config) -> float:
    return 32.0 if yarn_factor(cfg) == 64 else 64.0


def other_betas(cfg: Config) -> tuple[float, float]:
    return (1.0, 1.0) if cfg.rope_scaling and cfg.rope_scaling.beta_fast == 32 else (32.0, 1.0)


def without_yarn(cfg: Config) -> Config:
    return replace(cfg, rope_scaling=None)


def settings(change: Callable[[Config], Config]) -> Changes:
    """Rotation and softmax scale as another config has them."""

    def rescale(x: np.ndarray, here: Here) -> np.ndarray:
        return x * (softmax_scale(change(here.cfg)) / softmax_scale(here.cfg))

    return {**dict.fromkeys(ROTATED, turn(change)), SCORES: rescale}


def mscale(cfg: Config) -> float:
    return math.sqrt(softmax_scale(cfg) * math.sqrt(cfg.qk_head_dim))


def scale(
    id: str, text: str, value: Callable[[Config], float], references: str = "", **more: Any
) -> Fault:
    """Scores are multiplied by another number than `softmax_scale`."""

    def factor(cfg: Config) -> float:
        return value(cfg) / softmax_scale(cfg)

    return scaled(id, text, SCORES, "factor on the scores", factor, references, **more)


# ------------------------------------------------------------------ the dictionary


def has_yarn(cfg: Config) -> bool:
    return cfg.rope_scaling is not None


def has_mscale(cfg: Config) -> bool:
    return mscale(cfg) != 1


POSITIONS = (
    written(
        "rope-halves",
        "channels are rotated in halves, not in pairs",
        dict.fromkeys(ROTATED, turn(by=rotate_halves)),
        "vllm-project/vllm#28968 vllm-project/vllm#34353 vllm-project/vllm-ascend#4641 "
        "ml-explore/mlx-lm#1431 ModelTC/lightllm#672 huggingface/optimum-intel#1877",
    ),
    written(
        "rope-halves-q",
        "channels of the queries are rotated in halves, those of the keys in pairs",
        {Q: turn(by=rotate_halves)},
        "vllm-project/vllm#28968",
    ),
    written(
        "rope-halves-k",
        "channels of the keys are rotated in halves, those of the queries in pairs",
        {K: turn(by=rotate_halves)},
    ),
    written(
        "rope-unpermuted-q",
        "queries are rotated in halves, but only the keys were brought into halves for it",
        {Q: turn(by=rotate_unpermuted)},
        "huggingface/optimum-intel#1877",
    ),
    written(
        "rope-unpermuted-k",
        "keys are rotated in halves, but only the queries were brought into halves for it",
        {K: turn(by=rotate_unpermuted)},
    ),
    written(
        "rope-missing",
        "nothing is rotated",
        dict.fromkeys(ROTATED, unrotated),
        "vllm-project/vllm#27373",
    ),
    written("rope-missing-k", "the keys are not rotated", {K: unrotated}),
    written(
        "rope-partial",
        "only half of the channels are rotated",
        dict.fromkeys(ROTATED, turn(by=rotate_some)),
        "vllm-project/vllm#41185",
    ),
    written(
        "rope-reversed", "rotation goes the other way", dict.fromkeys(ROTATED, turn(by=rotate_back))
    ),
    written("rope-q-late", "queries stand one position too far", {Q: turn(shift=1)}),
    written("rope-k-late", "keys stand one position too far", {K: turn(shift=1)}),
    written(
        "rope-from-one",
        "positions begin at 1; harmless, as scores depend on distance",
        dict.fromkeys(ROTATED, turn(shift=1)),
    ),
    written(
        "rope-theta",
        "rope_theta is another model's, 10000 or 50000",
        settings(lambda cfg: replace(cfg, rope_theta=50000.0 if cfg.rope_theta == 1e4 else 1e4)),
        points=ROTATED,
    ),
    written(
        "yarn-off",
        "YaRN is off: neither its frequencies nor its softmax scale",
        settings(without_yarn),
        "red-hat-data-services/vllm-cpu@efe1b6e07 AI-Hypercomputer/maxtext@f1498e186",
        where=has_yarn,
    ),
    written(
        "yarn-frequencies",
        "YaRN's frequencies are not used, its softmax scale is",
        dict.fromkeys(ROTATED, turn(without_yarn)),
        where=has_yarn,
    ),
    written(
        "yarn-factor",
        "YaRN's factor is another model's, 32 or 64",
        settings(yarn(factor=other_factor)),
        "huggingface/transformers#40320 huggingface/transformers#37139",
        where=has_yarn,
    ),
    written(
        "yarn-betas",
        "YaRN's betas are another model's, 32/1 or 1/1",
        dict.fromkeys(ROTATED, turn(betas=other_betas)),
        "ggml-org/llama.cpp#18013",
        where=has_yarn,
    ),
    written(
        "yarn-original",
        "YaRN takes max_position_embeddings for the original length",
        settings(yarn(original_max_position_embeddings=lambda cfg: cfg.max_position_embeddings)),
        points=ROTATED,
        where=has_yarn,
    ),
    written(
        "yarn-linear",
        "all frequencies are divided by YaRN's factor",
        dict.fromkeys(ROTATED, turn(without_yarn, stretch=lambda cfg: 1 / yarn_factor(cfg))),
        where=has_yarn,
    ),
    written(
        "yarn-mscale-rotation",
        "mscale multiplies cos and sin",
        dict.fromkeys(ROTATED, lambda x, here: x * mscale(here.cfg)),
        "kekzl/imp#880",
        fitted=Fitted("factor on the rotated channels", mscale),
        where=has_mscale,
    ),
    scale(
        "scale-mscale-missing",
        "the softmax scale lacks mscale²",
        lambda cfg: cfg.qk_head_dim**-0.5,
        "huggingface/transformers#47435 huggingface/optimum-intel#1877 "
        "onnxruntime/mobius#548 sgl-project/sglang#3785 ml-explore/mlx-lm#768",
        where=has_mscale,
    ),
    scale(
        "scale-mscale-once",
        "the softmax scale has mscale, not its square",
        lambda cfg: mscale(cfg) * cfg.qk_head_dim**-0.5,
        "ggml-org/llama.cpp#17945 ggml-org/llama.cpp#18006 ggml-org/llama.cpp#14896",
        where=has_mscale,
    ),
    scale(
        "scale-mscale-twice",
        "mscale² is applied twice",
        lambda cfg: mscale(cfg) ** 4 * cfg.qk_head_dim**-0.5,
        "ggml-org/llama.cpp#17945",
        where=has_mscale,
    ),
    scale(
        "scale-nope",
        "the softmax scale counts the channels without rotation only",
        lambda cfg: mscale(cfg) ** 2 * cfg.qk_nope_head_dim**-0.5,
    ),
    scale(
        "scale-latent",
        "the softmax scale is that of latent and key, without mscale²",
        lambda cfg: (cfg.kv_lora_rank + cfg.qk_rope_head_dim) ** -0.5,
        "vllm-project/vllm#41569",
    ),
    scale(
        "scale-hidden",
        "the softmax scale takes hidden_size / num_attention_heads for the size of a head",
        lambda cfg: mscale(cfg) ** 2 * (cfg.hidden_size / cfg.num_attention_heads) ** -0.5,
    ),
    scale(
        "scale-inverse",
        "scores are divided by the softmax scale",
        lambda cfg: 1 / softmax_scale(cfg),
        "AI-Hypercomputer/maxtext@f1498e186",
    ),
)
