"""Router: which K of the E experts see each token, and how much each one counts.

    s    = sigmoid(x gateᵀ)                    affinity of token and expert             [T, E]
    top  = the K largest of s + b              b balances the load: it chooses ...      [T, K]
    g    = γ · s[top] / (Σ s[top] + 1e-20)     ... but it never weighs                  [T, K]

With n_group > 1 (DeepSeek-V3) experts stand in groups; a group counts as the sum of its two best
s + b, and only experts of the topk_group best groups are eligible.

Sources: DeepSeek-V3 (arXiv:2412.19437), eqs. 12-16 and §2.1.2; deepseek-ai/DeepSeek-V3
inference/model.py (`Gate`) for groups, masked with -inf; γ is `routed_scaling_factor`, in
config.json and not in the paper; 1e-20 as in Moonshot's modelling file. Checkpoint:
`mlp.gate.weight` [E, D], `mlp.gate.e_score_correction_bias` [E], float32. Equal scores go to the
lower index. K2: E = 384, K = 8, γ = 2.827, one group.
"""

from typing import NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.model.matrix import Matrix, array_module, dequantize
from refmoe.model.numerics import Numerics


class GateWeights(NamedTuple):
    """The router's matrix, and the bias that balances the load."""

    weight: Matrix  # [E, D]
    e_score_correction_bias: Matrix  # [E]


class Routing(NamedTuple):
    """The experts of each row, and how near another choice was."""

    experts: np.ndarray  # [T, K] best first
    weights: np.ndarray  # [T, K] Σ = γ where norm_topk_prob
    margin: np.ndarray  # [T] s + b of the last expert taken minus the first refused; inf: none was
    group_margin: np.ndarray  # [T] the same of groups; inf where all groups are taken


def route(x: np.ndarray, w: GateWeights, cfg: Config, nx: Numerics) -> Routing:
    """Choose experts for x [T, D], and weigh them.

    Scores are float32 at least, whatever the activations are: two experts can differ by less
    than a bf16 step, and a flipped choice is a different network. The margins say how near a
    flip was, so that a wrong router can be told from a tie inside the noise. They are of this
    router's own choice; the weights are taken for the choice that comes back from the watcher.
    """
    K = cfg.num_experts_per_tok
    wide = np.promote_types(x.dtype, np.float32)
    logits = nx.gate(x if x.dtype == wide else x.astype(wide), w.weight)  # [T, E]
    if nx.conventions.router_logits == "activations" and nx.round is not None:
        logits = nx.round(logits)
    xp = array_module(logits)  # which need not be where x is
    s = sigmoid(nx.tap("gate", logits))  # [T, E]
    score = s + dequantize(w.e_score_correction_bias, wide)

    score, group_margin = limit_groups(score, cfg, nx)
    ranked = xp.argsort(-score, axis=-1, kind="stable")  # [T, E]
    best = xp.take_along_axis(score, ranked[:, : K + 1], axis=-1)  # [T, K+1]
    top = nx.tap("gate#experts", ranked[:, :K])  # [T, K]

    g = xp.take_along_axis(s, top, axis=-1)
    if cfg.norm_topk_prob:
        g = g / _normaliser(g.sum(axis=-1, keepdims=True), nx)
    scale = wide.type(cfg.routed_scaling_factor)
    on_sum = nx.conventions.routed_scale == "sum"  # a sum is linear: only what is shown differs
    g = nx.tap("gate#weights", g) * scale if on_sum else nx.tap("gate#weights", g * scale)
    return Routing(top, g, _gap(best, K), group_margin)


def limit_groups(score: np.ndarray, cfg: Config, nx: Numerics) -> tuple[np.ndarray, np.ndarray]:
    """Return scores [T, E] with those of refused groups masked, and the group margin [T]."""
    xp = array_module(score)
    T, G, M = len(score), cfg.n_group, cfg.topk_group
    if M == G:
        return score, xp.full(T, np.inf)
    grouped = score.reshape(T, G, -1)  # [T, G, E/G]
    two_best = -xp.sort(-grouped, axis=-1)[..., :2].sum(axis=-1)  # [T, G]
    ranked = xp.argsort(-two_best, axis=-1, kind="stable")
    best = xp.take_along_axis(two_best, ranked[:, : M + 1], axis=-1)
    refused = xp.ones((T, G), bool)
    xp.put_along_axis(refused, ranked[:, :M], False, axis=-1)
    masked = xp.where(refused[..., None], nx.conventions.masked_groups, grouped)
    return masked.reshape(score.shape), _gap(best, M)


def _gap(best: np.ndarray, taken: int) -> np.ndarray:
    """Return the last taken minus the first refused of sorted scores; inf if none is refused."""
    if best.shape[1] == taken:
        return array_module(best).full(len(best), np.inf)
    return best[:, taken - 1] - best[:, taken]


def _normaliser(total: np.ndarray, nx: Numerics) -> np.ndarray:
    """Return what the chosen scores are divided by, their sum made safe by some convention."""
    match nx.conventions.normaliser:
        case "sum":
            return total
        case "max(sum, 2^-14)":
            return array_module(total).maximum(total, 2.0**-14)
        case _:
            return total + 1e-20


def sigmoid(z: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + e^-z) without overflow: e is only ever raised to a negative power."""
    xp = array_module(z)
    e = xp.exp(-xp.abs(z))
    return xp.where(z >= 0, 1 / (1 + e), e / (1 + e))
