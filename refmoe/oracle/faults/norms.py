"""Faults of the norms."""

from collections.abc import Callable

import numpy as np

from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.norm import rms_norm
from refmoe.model.points import kind
from refmoe.oracle.faults.base import LATENT, MAIN, Changes, Here, has_low_rank_queries, written

# ------------------------------------------------------------------ norms


def _norm_inputs(here: Here) -> tuple[np.ndarray, Matrix, float]:
    """Input, gain and eps of the norm whose result is here."""
    cfg, eps = here.cfg, here.cfg.rms_norm_eps
    latent = here.nx.conventions.latent_norm_eps or eps
    match kind(here.path).rpartition(".")[2]:
        case "norm":
            return here.x, here.decoder.norm, eps
        case "input_layernorm":
            return here.x, here.w.input_layernorm, eps
        case "post_attention_layernorm":
            return here["#attn_residual"], here.w.post_attention_layernorm, eps
        case "q_a_layernorm":
            gain = here.w.self_attn.q_a_layernorm
            assert gain is not None
            return here["self_attn.q_a_proj"], gain, latent
        case _:
            x = here["self_attn.kv_a_proj_with_mqa"][:, : cfg.kv_lora_rank]
            return x, here.w.self_attn.kv_a_layernorm, latent


def normed(
    rule: Callable[[np.ndarray, np.ndarray, float], np.ndarray],
    ends: tuple[str, ...] = MAIN + LATENT,
) -> Changes:
    """rule(x, gain, eps) in place of the norms with these ends."""

    def change(_: np.ndarray, here: Here) -> np.ndarray:
        x, gain, eps = _norm_inputs(here)
        return rule(x, dequantize(gain, x.dtype), eps)

    return dict.fromkeys(ends, change)


def unnormed(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return x


def divided_by_sum(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + eps) * gain


def layer_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return rms_norm(x - x.mean(axis=-1, keepdims=True), gain, eps)


def other_eps(eps: float) -> float:
    return 1e-5 if eps == 1e-6 else 1e-6


def latent_eps(_: np.ndarray, here: Here) -> np.ndarray:
    x, gain, eps = _norm_inputs(here)
    config = here.cfg.rms_norm_eps
    return rms_norm(x, gain, 1e-6 if eps == config else config)


def over_latent_and_key(_: np.ndarray, here: Here) -> np.ndarray:
    x, gain, eps = _norm_inputs(here)
    both = here["self_attn.kv_a_proj_with_mqa"]  # [T, C+R]
    mean = (both * both).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean + eps) * dequantize(gain, x.dtype)


def of_the_layers_input(_: np.ndarray, here: Here) -> np.ndarray:
    return rms_norm(here.x, here.w.post_attention_layernorm, here.cfg.rms_norm_eps)


NORMS = (
    written(
        "norm-eps",
        "the norms have another eps than the config's, 1e-5 for 1e-6 or the reverse",
        normed(lambda x, gain, eps: rms_norm(x, gain, other_eps(eps)), MAIN),
        "ml-explore/mlx-lm#67",
    ),
    written(
        "norm-eps-latent",
        "q_a_layernorm and kv_a_layernorm have the config's eps for 1e-6, or the reverse",
        dict.fromkeys(LATENT, latent_eps),
        "huggingface/transformers#44261 vllm-project/vllm#35515 sgl-project/sglang#16029 "
        "PaddlePaddle/FastDeploy#2797 pytorch/torchtitan#4395",
        where=lambda cfg: cfg.rms_norm_eps != 1e-6,
    ),
    written(
        "norm-eps-zero",
        "the norms have no eps",
        normed(lambda x, gain, eps: rms_norm(x, gain, 0.0)),
    ),
    written(
        "norm-gain-missing",
        "the norms have no gain",
        normed(lambda x, gain, eps: rms_norm(x, np.ones_like(gain), eps)),
    ),
    written(
        "norm-gain-plus-one",
        "1 is added to the gain of the norms",
        normed(lambda x, gain, eps: rms_norm(x, 1 + gain, eps)),
    ),
    written(
        "norm-sum",
        "the norms divide by the sum of squares, not by their mean",
        normed(divided_by_sum),
        "tenstorrent/tt-xla#5209",
    ),
    written("norm-centred", "the norms take off the mean, as LayerNorm does", normed(layer_norm)),
    written(
        "norm-q-skipped",
        "q_a_layernorm is skipped",
        normed(unnormed, LATENT[:1]),
        where=has_low_rank_queries,
    ),
    written("norm-kv-skipped", "kv_a_layernorm is skipped", normed(unnormed, LATENT[1:])),
    written(
        "norm-kv-with-key",
        "kv_a_layernorm takes its mean over latent and key",
        {LATENT[1]: over_latent_and_key},
    ),
    written("norm-final-skipped", "the final norm is skipped", normed(unnormed, MAIN[2:])),
    written(
        "norm-of-input",
        "the MLP reads the layer's input without attention",
        {MAIN[1]: of_the_layers_input},
    ),
)
