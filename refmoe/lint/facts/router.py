"""Read the routers: gate rows, and what rounding the bias does to the choice of experts."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from refmoe.lint.base import Findings, Place
from refmoe.lint.matrices import label_of, values_of
from refmoe.model.decoder import policy
from refmoe.model.router import limit_groups, sigmoid
from refmoe.weights.checkpoint import Checkpoint

DRAWS = 2048  # tokens drawn to see what a rounded bias does to the choice


@dataclass(frozen=True)
class Gate:
    """The router matrix of one layer."""

    places: ClassVar[tuple[Place, ...]] = ("folder", "gguf")
    tensor: str
    rows: np.ndarray  # [E, D] float64


@dataclass(frozen=True)
class RouterBias:
    """The e_score_correction_bias of one layer."""

    places: ClassVar[tuple[Place, ...]] = ("folder", "gguf")
    tensor: str
    layer: int
    dtype: str
    values: np.ndarray  # [E] float64


@dataclass(frozen=True)
class RouterBiases:
    """The biases of all layers, stored in float32 or wider."""

    places: ClassVar[tuple[Place, ...]] = ("folder", "gguf")
    checkpoint: Checkpoint
    biases: list[RouterBias]


def read_routers(checkpoint: Checkpoint, fit: list[str], findings: Findings) -> None:
    """Show gate and bias of every MoE layer to the rules, then all biases together.

    A bias that is all zero, or not finite, is left to the rules on numbers.
    """
    if not findings.needs(Gate, RouterBias, RouterBiases):
        return
    cfg, ok = checkpoint.cfg, set(fit)
    wide: list[RouterBias] = []
    for i in range(cfg.num_hidden_layers):
        gate = f"model.layers.{i}.mlp.gate."
        names = gate + "weight", gate + "e_score_correction_bias"
        if not cfg.is_moe(i) or not ok.issuperset(names):
            continue
        if findings.needs(Gate):
            label = label_of(checkpoint, names[0])
            findings.judge(Gate(label, values_of(checkpoint, names[0])))
        values = values_of(checkpoint, names[1])
        if not np.isfinite(values).all() or not values.any():
            continue
        dtype = checkpoint.tensors[names[1]].dtype
        bias = RouterBias(label_of(checkpoint, names[1]), i, dtype, values)
        findings.judge(bias)
        if dtype not in ("BF16", "F16"):
            wide.append(bias)
    if wide:
        findings.judge(RouterBiases(checkpoint, wide))


def count_ties(bias: np.ndarray) -> int:
    """Return the number of pairs of experts with equal biases."""
    counts = np.unique(bias, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def share_of_flips(
    checkpoint: Checkpoint, layer: int, bias: np.ndarray, other: np.ndarray
) -> float:
    """Return the share of drawn tokens whose set of experts differs under another bias.

    x after the norm has unit RMS but for the gain g, so that a logit has the variance |w_e·g|² if
    its directions are random; correlations of the gate's rows are left out. The draw is seeded.
    """
    cfg, nx = checkpoint.cfg, policy("float64")
    at = f"model.layers.{layer}."
    gate = values_of(checkpoint, at + "mlp.gate.weight")  # [E, D]
    norm = at + "post_attention_layernorm.weight"
    stored = checkpoint.tensors.get(norm)
    gain = values_of(checkpoint, norm) if stored and stored.shape == gate.shape[1:] else 1.0
    spread = np.sqrt(((gate * gain) ** 2).sum(axis=1))  # [E]
    if not np.isfinite(spread).all():
        return 0.0
    z = np.random.default_rng(layer).standard_normal((DRAWS, len(spread))) * spread
    s, K = sigmoid(z), cfg.num_experts_per_tok
    top = []
    for b in (bias, other):
        score, _ = limit_groups(s + b, cfg, nx)
        chosen = np.argsort(-score, axis=-1, kind="stable")[:, :K]
        top.append(np.sort(chosen, axis=-1))
    return float((top[0] != top[1]).any(axis=-1).mean())
