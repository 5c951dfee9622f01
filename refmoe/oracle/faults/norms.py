"""Faults of the norms: their eps, their gain, what they divide by and what they read."""

from collections.abc import Callable

import numpy as np

from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.norm import rms_norm
from refmoe.model.points import kind
from refmoe.oracle.faults.base import LATENT, MAIN, Changes, Family, Here, Models, written
from refmoe.oracle.faults.common import WITH_Q_LORA

# --- what several of these faults use


def _norm_inputs(here: Here) -> tuple[np.ndarray, Matrix, float]:
    """Return input, gain and eps of the norm whose result this point is."""
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


def with_rule(
    rule: Callable[[np.ndarray, np.ndarray, float], np.ndarray],
    ends: tuple[str, ...] = MAIN + LATENT,
) -> Changes:
    """Compute rule(x, gain, eps) in place of the norms whose names have these ends."""

    def change(_: np.ndarray, here: Here) -> np.ndarray:
        x, gain, eps = _norm_inputs(here)
        return rule(x, dequantize(gain, x.dtype), eps)

    return dict.fromkeys(ends, change)


def skip_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """Return x itself."""
    return x


NORMS = Family("norms")


def other_eps(eps: float) -> float:
    """Return 1e-5 for 1e-6, and 1e-6 for anything else."""
    return 1e-5 if eps == 1e-6 else 1e-6


NORMS += written(
    "norm-eps",
    "the norms have another eps than the config's, 1e-5 for 1e-6 or the reverse",
    with_rule(lambda x, gain, eps: rms_norm(x, gain, other_eps(eps)), MAIN),
    "ml-explore/mlx-lm#67",
)


def norm_with_other_latent_eps(_: np.ndarray, here: Here) -> np.ndarray:
    """Compute the latent norm with 1e-6 in place of the config's eps, or the reverse."""
    x, gain, eps = _norm_inputs(here)
    config = here.cfg.rms_norm_eps
    return rms_norm(x, gain, 1e-6 if eps == config else config)


NORMS += written(
    "norm-eps-latent",
    "q_a_layernorm and kv_a_layernorm have the config's eps for 1e-6, or the reverse",
    dict.fromkeys(LATENT, norm_with_other_latent_eps),
    "huggingface/transformers#44261 vllm-project/vllm#35515 sgl-project/sglang#16029 "
    "PaddlePaddle/FastDeploy#2797 pytorch/torchtitan#4395",
    where=Models("`rms_norm_eps` other than 1e-6", lambda cfg: cfg.rms_norm_eps != 1e-6),
)

NORMS += written(
    "norm-eps-zero",
    "the norms have no eps",
    with_rule(lambda x, gain, eps: rms_norm(x, gain, 0.0)),
)

NORMS += written(
    "norm-gain-missing",
    "the norms have no gain",
    with_rule(lambda x, gain, eps: rms_norm(x, np.ones_like(gain), eps)),
)

NORMS += written(
    "norm-gain-plus-one",
    "1 is added to the gain of the norms",
    with_rule(lambda x, gain, eps: rms_norm(x, 1 + gain, eps)),
)


def norm_by_sum(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """Divide by the root of the sum of squares, not of their mean."""
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + eps) * gain


NORMS += written(
    "norm-sum",
    "the norms divide by the sum of squares, not by their mean",
    with_rule(norm_by_sum),
    "tenstorrent/tt-xla#5209",
)


def layer_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """Subtract the mean before the norm, as LayerNorm does."""
    return rms_norm(x - x.mean(axis=-1, keepdims=True), gain, eps)


NORMS += written(
    "norm-centred", "the norms take off the mean, as LayerNorm does", with_rule(layer_norm)
)

NORMS += written(
    "norm-q-skipped",
    "q_a_layernorm is skipped",
    with_rule(skip_norm, LATENT[:1]),
    where=WITH_Q_LORA,
)

NORMS += written("norm-kv-skipped", "kv_a_layernorm is skipped", with_rule(skip_norm, LATENT[1:]))


def norm_over_latent_and_key(_: np.ndarray, here: Here) -> np.ndarray:
    """Divide the latent by the RMS of latent and key together."""
    x, gain, eps = _norm_inputs(here)
    both = here["self_attn.kv_a_proj_with_mqa"]  # [T, C+R]
    mean = (both * both).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean + eps) * dequantize(gain, x.dtype)


NORMS += written(
    "norm-kv-with-key",
    "kv_a_layernorm takes its mean over latent and key",
    {LATENT[1]: norm_over_latent_and_key},
)

NORMS += written("norm-final-skipped", "the final norm is skipped", with_rule(skip_norm, MAIN[2:]))


def norm_of_layer_input(_: np.ndarray, here: Here) -> np.ndarray:
    """Norm the layer's input instead of the residual stream after attention."""
    return rms_norm(here.x, here.w.post_attention_layernorm, here.cfg.rms_norm_eps)


NORMS += written(
    "norm-of-input",
    "the MLP reads the layer's input without attention",
    {MAIN[1]: norm_of_layer_input},
)
