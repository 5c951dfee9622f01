"""Random networks straight from arrays, error bounds, and the measured noise envelope."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.model import matrix
from refmoe.model.decoder import Decoder, LayerWeights, policy
from refmoe.model.experts import ExpertsFrom, MlpWeights, MoeWeights
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.mla import AttentionWeights
from refmoe.model.numerics import Numerics
from refmoe.model.router import GateWeights

SHAPE: dict[str, Any] = {
    "model_type": "kimi_k2",
    "vocab_size": 61,
    "hidden_size": 23,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "q_lora_rank": 17,
    "kv_lora_rank": 19,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "intermediate_size": 29,
    "moe_intermediate_size": 13,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 2.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 128,
}


def config(**changes: Any) -> Config:
    return Config.from_dict({**SHAPE, **changes})


def network(seed: int, nx: Numerics | None = None, **changes: Any) -> Decoder:
    """A decoder of random float64 weights."""
    cfg, rng = config(**changes), np.random.default_rng(seed)
    D, H, C, F = (
        cfg.hidden_size,
        cfg.num_attention_heads,
        cfg.kv_lora_rank,
        cfg.moe_intermediate_size,
    )
    N, R, V, A = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.q_lora_rank

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape) / np.sqrt(shape[-1])

    def gain(size: int) -> np.ndarray:
        return 1 + 0.2 * rng.standard_normal(size)

    def mlp(width: int) -> MlpWeights:
        return MlpWeights(draw(width, D), draw(width, D), draw(D, width))

    layers, experts = [], {}
    for i in range(cfg.num_hidden_layers):
        attention = AttentionWeights(
            q_proj=draw(H * (N + R), D) if A is None else None,
            q_a_proj=None if A is None else draw(A, D),
            q_a_layernorm=None if A is None else gain(A),
            q_b_proj=None if A is None else draw(H * (N + R), A),
            kv_a_proj_with_mqa=draw(C + R, D),
            kv_a_layernorm=gain(C),
            kv_b_proj=draw(H * (N + V), C),
            o_proj=draw(D, H * V),
        )
        block: MlpWeights | MoeWeights = mlp(cfg.intermediate_size)
        if cfg.is_moe(i):
            gate = GateWeights(
                draw(cfg.n_routed_experts, D), 0.1 * rng.standard_normal(cfg.n_routed_experts)
            )
            block = MoeWeights(
                gate, mlp(F * cfg.n_shared_experts) if cfg.n_shared_experts else None
            )
            experts |= {(i, e): mlp(F) for e in range(cfg.n_routed_experts)}
        layers.append(LayerWeights(gain(D), attention, gain(D), block))
    return Decoder(
        cfg,
        nx or policy("float64"),
        rng.standard_normal((cfg.vocab_size, D)),
        layers,
        [ExpertsFrom(partial(lambda i, e: experts[i, e], i)) for i in range(cfg.num_hidden_layers)],
        gain(D),
        draw(cfg.vocab_size, D),
    )


def gamma(n: int, dtype: type = np.float64) -> float:
    """Higham: the relative error of any order of n operations (Accuracy and Stability, §3.1)."""
    u = float(np.finfo(dtype).eps) / 2
    return n * u / (1 - n * u)


def disturbed(decoder: Decoder, seed: int, S: int) -> Decoder:
    """The decoder with every operation wrong by as much as its rounding may be, at random.

    A product of inner length I errs by at most γ(I)·|x||W|ᵀ, in whatever order it is summed; every
    point by γ of the longest sum behind it. The spread of such runs is the noise envelope.
    """
    rng = np.random.default_rng(seed)
    dtype = decoder.nx.dtype

    def linear(x: np.ndarray, m: Matrix) -> np.ndarray:
        size = np.abs(x) @ np.abs(dequantize(m, x.dtype)).T
        error = rng.uniform(-1, 1, size.shape) * gamma(m.shape[1] + 1, dtype)
        return (matrix.linear(x, m) + error * size).astype(x.dtype)

    def rounding(x: np.ndarray) -> np.ndarray:
        error = gamma(S + decoder.cfg.kv_lora_rank + decoder.cfg.hidden_size, dtype)
        return (x * (1 + rng.uniform(-1, 1, x.shape) * error)).astype(x.dtype)

    return decoder.using(replace(decoder.nx, linear=linear, round=rounding))


def envelope(decoder: Decoder, tokens: Sequence[int], runs: int = 6) -> float:
    """By how much two correct runs may differ in a logit: twice the widest disturbed one."""
    exact = decoder.logits(tokens)
    spread = [
        np.abs(disturbed(decoder, s, len(tokens)).logits(tokens) - exact) for s in range(runs)
    ]
    return 2 * float(np.max(spread))


def row_by_row(nx: Numerics) -> Numerics:
    """The same mathematics with each row multiplied alone: a row's bits cannot depend on others."""

    def linear(x: np.ndarray, m: Matrix) -> np.ndarray:
        w = dequantize(m, x.dtype).T
        return np.concatenate([row[None] @ w for row in x]) if len(x) else x @ w

    return replace(nx, linear=linear)
