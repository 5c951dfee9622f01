"""Faults of the router: which experts are chosen, in which groups, and with what weights."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.model import matrix
from refmoe.model.matrix import dequantize
from refmoe.model.mla import softmax
from refmoe.model.numerics import Numerics
from refmoe.model.router import GateWeights, Routing, limit_groups, route, sigmoid
from refmoe.oracle.faults.base import (
    CHOICE,
    EXPERT,
    ROUTED,
    WEIGHTS,
    Change,
    Changes,
    Family,
    Fault,
    Fitted,
    Here,
    Models,
    changed,
    written,
)
from refmoe.oracle.faults.common import (
    WITH_GROUPS,
    WITH_LARGE_GROUPS,
    WITH_NORM_TOPK,
    Reroute,
    gamma,
    mixture,
    moe_of,
    plain,
    rerouted,
    shared,
)

# --- what several of these faults use

Scores = Callable[[np.ndarray, np.ndarray], np.ndarray]  # logits [T, E], bias [E] → [T, E]


def biased_scores(z: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the scores that choose in a healthy router, sigmoid(z) + b."""
    return sigmoid(z) + b


def _logits_bias(here: Here) -> tuple[np.ndarray, np.ndarray]:
    """Return the router's logits [T, E] and bias [E]."""
    z = here["mlp.gate"]
    return z, dequantize(moe_of(here.w).gate.e_score_correction_bias, z.dtype)


def choose(
    scores: Scores = biased_scores,
    limit: Callable[[np.ndarray, Here], np.ndarray] = lambda s, here: limit_groups(
        s, here.cfg, here.nx
    )[0],
) -> Changes:
    """Choose the experts by other scores, or by other limits to groups."""

    def change(top: np.ndarray, here: Here) -> np.ndarray:
        score = limit(scores(*_logits_bias(here)), here)
        return np.argsort(-score, axis=-1, kind="stable")[:, : top.shape[1]]

    return {CHOICE: change}


def weigh(scores: Scores, total: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Changes:
    """Weigh the chosen experts by other scores, divided by total(chosen [T, K], all [T, E])."""

    def change(g: np.ndarray, here: Here) -> np.ndarray:
        s = scores(*_logits_bias(here))
        chosen = np.take_along_axis(s, here[CHOICE], axis=-1)
        on_sum = here.nx.conventions.routed_scale == "sum"
        return chosen / total(chosen, s) * (1 if on_sum else here.cfg.routed_scaling_factor)

    return {WEIGHTS: change}


def rescaled(
    id: str, text: str, factor: Callable[[Config], float], references: str, **more: Any
) -> Fault:
    """Return a fault that multiplies the routed experts by a constant.

    It shows in the weights, or in their sum: wherever the engine applies γ.
    """

    def times(side: str) -> Change:
        def change(x: np.ndarray, here: Here) -> np.ndarray:
            return x * factor(here.cfg) if here.nx.conventions.routed_scale == side else x

        return change

    changes = {WEIGHTS: times("weights"), ROUTED: times("sum")}
    fitted = Fitted("factor on the routed weights", factor)
    return written(id, text, changes, references, fitted=fitted, **more)


def _sum(chosen: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Return the sum of the chosen scores [T, 1]."""
    return chosen.sum(axis=-1, keepdims=True)


def _softmax(z: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Return softmax(z) over all experts."""
    return softmax(z)


def limit_as(**changes: Any) -> Callable[[np.ndarray, Here], np.ndarray]:
    """Limit scores to groups as a config with these values would."""

    def limit(score: np.ndarray, here: Here) -> np.ndarray:
        cfg = replace(here.cfg, **changes)
        return limit_groups(score, cfg, here.nx)[0]

    return limit


def route_to_more(more: int) -> Reroute:
    """Route each token to so many more experts than the config says."""

    def change(
        x: np.ndarray, routing: Routing, gate: GateWeights, cfg: Config, nx: Numerics
    ) -> Routing:
        return route(x, gate, replace(cfg, num_experts_per_tok=cfg.num_experts_per_tok + more), nx)

    return change


ROUTER = Family("router")

ROUTER += rescaled(
    "scaling-dropped",
    "routed_scaling_factor is not applied",
    lambda cfg: 1 / gamma(cfg),
    "sgl-project/sglang#8040 sgl-project/sglang#12738 sgl-project/sglang#8333 "
    "sgl-project/sglang#8688 sgl-project/sglang#8511 sgl-project/sglang-jax#1282 "
    "vllm-project/vllm#43769",
)

ROUTER += rescaled(
    "scaling-twice",
    "routed_scaling_factor is applied twice",
    gamma,
    "vllm-project/vllm#24119 vllm-project/vllm#24132 vllm-project/vllm#45037 "
    "sgl-project/sglang#35152",
)

ROUTER += shared(
    "scaling-on-shared", "routed_scaling_factor is applied to the shared experts too", gamma
)

ROUTER += written(
    "scaling-on-sum",
    "routed_scaling_factor is applied again to the sum of routed and shared experts",
    {".mlp": mixture(lambda x, here: x * gamma(here.cfg))},
    fitted=Fitted("factor on the mixture", gamma),
)

ROUTER += written(
    "weights-biased",
    "the scores with the router's bias, which only choose, weigh the experts",
    weigh(biased_scores, _sum),
    "vllm-project/vllm#12002 huggingface/transformers#41647 ModelTC/lightllm#744 "
    "ml-explore/mlx-lm#67",
)

ROUTER += written(
    "weights-unnormalised",
    "the weights of the chosen experts are not divided by their sum",
    weigh(lambda z, b: sigmoid(z), lambda chosen, s: np.ones(1)),
    "EricLBuehler/mistral.rs#1173",
    where=WITH_NORM_TOPK,
)

ROUTER += written(
    "weights-over-all",
    "weights are divided by the sum over all experts, not over the chosen",
    weigh(lambda z, b: sigmoid(z), lambda chosen, s: s.sum(axis=-1, keepdims=True)),
)

ROUTER += rescaled(
    "normalised-after-scaling",
    "weights are divided by their sum again after the scaling",
    lambda cfg: 1 / gamma(cfg),
    "",
    where=WITH_NORM_TOPK,
)

ROUTER += written(
    "weights-softmax",
    "softmax takes the place of sigmoid in the weights",
    weigh(_softmax, _sum),
    "ggml-org/llama.cpp#18980",
    where=WITH_NORM_TOPK,
)

ROUTER += written(
    "weights-squared", "each expert's weight is applied twice", {WEIGHTS: lambda g, here: g * g}
)

ROUTER += written(
    "weights-reversed",
    "weights are paired with the chosen experts in another order",
    {WEIGHTS: lambda g, here: g[:, ::-1]},
    "huggingface/transformers#43288",
)

ROUTER += written(
    "weights-uniform",
    "the chosen experts weigh the same",
    {WEIGHTS: lambda g, here: np.broadcast_to(g.mean(axis=-1, keepdims=True), g.shape)},
)

ROUTER += written(
    "softmax-router",
    "softmax and a plain top-k without bias take the place of the sigmoid router",
    {**choose(lambda z, b: z), **weigh(_softmax, _sum)},
    "ggml-org/llama.cpp#18980 NVIDIA/TensorRT-Model-Connect#662",
    where=WITH_NORM_TOPK,
)

ROUTER += written(
    "choice-softmax",
    "softmax takes the place of sigmoid in the choice",
    choose(lambda z, b: softmax(z) + b),
)

ROUTER += written(
    "bias-ignored",
    "the router's bias is missing",
    choose(lambda z, b: z),
    "NVIDIA-NeMo/Megatron-Bridge#4657",
)

ROUTER += written(
    "bias-subtracted",
    "the router's bias has the wrong sign",
    choose(lambda z, b: sigmoid(z) - b),
)

ROUTER += written(
    "bias-before-sigmoid",
    "the router's bias is added to the logits",
    choose(lambda z, b: z + b),
)


def scores_with_bf16_bias(z: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return sigmoid(z) + b with b rounded to bf16."""
    return sigmoid(z) + matrix.round_bf16(b)


ROUTER += written(
    "bias-bf16",
    "the router's bias is rounded to bf16",
    choose(scores_with_bf16_bias),
    "huggingface/transformers#42580 vllm-project/vllm#23640 vllm-project/vllm#36725 "
    "sgl-project/sglang#31213 sgl-project/sglang#37133 tenstorrent/tt-metal#47914 "
    "NVIDIA/TensorRT-LLM#17061",
)


def limit_by_best_expert(score: np.ndarray, here: Here) -> np.ndarray:
    """Keep the groups with the best single expert; others score -inf."""
    T, G, M = len(score), here.cfg.n_group, here.cfg.topk_group
    grouped = score.reshape(T, G, -1)
    best = np.argsort(-grouped.max(axis=-1), axis=-1, kind="stable")[:, :M]
    taken = (best[..., None] == np.arange(G)).any(axis=1)  # [T, G]
    return np.where(taken[..., None], grouped, -np.inf).reshape(score.shape)


ROUTER += written(
    "groups-maximum",
    "a group counts as its best expert, not as the sum of its two best",
    choose(limit=limit_by_best_expert),
    "vllm-project/vllm#13474 ModelTC/lightllm#744",
    where=WITH_GROUPS,
)


def mask_with_zero(score: np.ndarray, here: Here) -> np.ndarray:
    """Limit scores to groups; experts of refused ones score 0."""
    sides = replace(here.nx.conventions, masked_groups=0.0)
    return limit_groups(score, here.cfg, replace(here.nx, conventions=sides))[0]


ROUTER += written(
    "groups-masked-zero",
    "experts of refused groups score 0, and beat those with a negative score",
    choose(limit=mask_with_zero),
    "huggingface/transformers#45441 sgl-project/sglang#3705 vllm-project/vllm#13474 "
    "deepseek-ai/DeepSeek-V3@1398800",
    where=WITH_GROUPS,
)

ROUTER += written(
    "groups-ignored",
    "experts are chosen from all groups",
    choose(limit=limit_as(n_group=1, topk_group=1)),
    "ggml-org/llama.cpp#16063",
    where=WITH_GROUPS,
)


def limit_with_twice_the_groups(score: np.ndarray, here: Here) -> np.ndarray:
    """Limit scores as if n_group were twice what it is."""
    return limit_as(n_group=2 * here.cfg.n_group)(score, here)


ROUTER += written(
    "groups-doubled",
    "there are twice as many groups as n_group",
    choose(limit=limit_with_twice_the_groups),
    where=WITH_LARGE_GROUPS,
)


def limit_strided(score: np.ndarray, here: Here) -> np.ndarray:
    """Limit scores to groups in which expert e is in group e mod G."""
    T, G = len(score), here.cfg.n_group
    limited = limit_as()(score.reshape(T, -1, G).swapaxes(1, 2).reshape(T, -1), here)
    return limited.reshape(T, G, -1).swapaxes(1, 2).reshape(T, -1)


ROUTER += written(
    "groups-strided",
    "a group is every n_group-th expert, not neighbouring ones",
    choose(limit=limit_strided),
    "EricLBuehler/mistral.rs#1278",
    where=WITH_GROUPS,
)

ROUTER += written(
    "choice-of-token-before",
    "each token goes to the experts that the token before it chose",
    {CHOICE: lambda top, here: np.roll(top, 1, axis=0)},
)

ROUTER += changed(
    "top-k-too-few",
    "one expert a token too few",
    "",
    (*EXPERT, ROUTED),
    rerouted(route_to_more(-1)),
)

ROUTER += changed(
    "top-k-too-many",
    "one expert a token too many",
    "",
    (*EXPERT, ROUTED),
    rerouted(route_to_more(1)),
    where=Models(
        "more experts in the allowed groups than are chosen",
        lambda cfg: cfg.num_experts_per_tok < cfg.n_routed_experts // cfg.n_group * cfg.topk_group,
    ),
)


def route_within_capacity(
    x: np.ndarray, routing: Routing, gate: GateWeights, cfg: Config, nx: Numerics
) -> Routing:
    """Let each expert take its fair share of the rows, the first that come, and drop the others."""
    flat = routing.experts.reshape(-1)
    mine = flat[:, None] == np.arange(cfg.n_routed_experts)  # [TK, E]
    place = (mine.cumsum(axis=0) - 1)[np.arange(len(flat)), flat]
    kept = place < math.ceil(len(flat) / cfg.n_routed_experts)
    return routing._replace(weights=routing.weights * kept.reshape(routing.weights.shape))


ROUTER += changed(
    "capacity",
    "an expert drops the tokens beyond its fair share",
    "",
    (ROUTED,),
    rerouted(route_within_capacity),
)


def gate_of_residual(_: np.ndarray, here: Here) -> np.ndarray:
    """Return the router's logits of the residual stream before its norm."""
    return here["#attn_residual"] @ plain(here.decoder, moe_of(here.w).gate.weight).T


ROUTER += written(
    "gate-unnormed",
    "the router reads the residual stream before its norm",
    {"mlp.gate": gate_of_residual},
)


def gate_of_random_weights(_: np.ndarray, here: Here) -> np.ndarray:
    """Return the router's logits under random weights of the usual size."""
    rng = np.random.default_rng(here.layer)
    w = 0.02 * rng.standard_normal((here.cfg.n_routed_experts, here.cfg.hidden_size))
    return here["post_attention_layernorm"] @ w.T


ROUTER += written(
    "gate-random",
    "the router's gate was never loaded",
    {"mlp.gate": gate_of_random_weights},
    "vllm-project/vllm#36190",
    predicts=False,
    strength=None,
)
