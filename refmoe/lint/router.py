"""Check the router."""

import numpy as np

from refmoe.lint.base import _Findings
from refmoe.lint.matrices import _label, _named
from refmoe.model.decoder import policy
from refmoe.model.matrix import (
    round_bf16,
)
from refmoe.model.router import limit_groups, sigmoid
from refmoe.weights.checkpoint import (
    Checkpoint,
)

DRAWS = 2048  # tokens drawn to see what a rounded bias does to the choice


# --- router


def _router(checkpoint: Checkpoint, fit: list[str], out: _Findings) -> None:
    """Gate rows of every layer; then the bias, in the layer where bf16 hurts most."""
    cfg, ok = checkpoint.cfg, set(fit)
    worst: tuple[float, str, str] | None = None
    seen = 0
    for i in range(cfg.num_hidden_layers):
        gate = f"model.layers.{i}.mlp.gate."
        names = gate + "weight", gate + "e_score_correction_bias"
        if not cfg.is_moe(i) or not ok.issuperset(names):
            continue
        _gate_rows(_label(checkpoint, names[0]), _named(checkpoint, names[0]), out)
        stored, bias = checkpoint.tensors[names[1]], _named(checkpoint, names[1])
        label = _label(checkpoint, names[1])
        if not np.isfinite(bias).all() or not bias.any():
            continue
        if stored.dtype in ("BF16", "F16"):
            text = (
                f"stored as {stored.dtype}, {len(np.unique(bias))} distinct values for "
                f"{len(bias)} experts; published is F32, and near ties flip in less "
                "(huggingface/transformers#42580)"
            )
            out.add("warning", "router bias", label, text)
            continue
        rounded = round_bf16(bias.astype(np.float32))
        facts = _rounding(checkpoint, i, bias, rounded)
        seen += 1
        if worst is None or facts[0] > worst[0]:
            worst = (*facts, label)
    if worst:
        text = f"{worst[1]}; the worst of {seen} layers. Engines must keep it in float32"
        refs = "(huggingface/transformers#42580, sgl-project/sglang#31213)"
        out.add("note", "router bias", worst[2], f"{text} {refs}")


def _rounding(
    checkpoint: Checkpoint, layer: int, bias: np.ndarray, rounded: np.ndarray
) -> tuple[float, str]:
    """What another bias does to the choice: share of tokens, and in words."""
    before, after = _ties(bias), _ties(rounded)
    share = _flips(checkpoint, layer, bias, rounded)
    text = (
        f"in bf16 {len(np.unique(bias))} distinct values become {len(np.unique(rounded))}, "
        f"{after - before} pairs of experts become equal, and {share:.1%} of tokens choose other "
        f"experts, by {DRAWS:,} draws of logits ~ N(0, |w_e|²)"
    )
    return share, text


def _ties(bias: np.ndarray) -> int:
    counts = np.unique(bias, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def _flips(checkpoint: Checkpoint, layer: int, bias: np.ndarray, other: np.ndarray) -> float:
    """Share of drawn tokens whose set of experts differs under another bias.

    x after the norm has unit RMS but for the gain g, so that a logit has the variance |w_e·g|² if
    its directions are random; correlations of the gate's rows are left out. The draw is seeded.
    """
    cfg, nx = checkpoint.cfg, policy("float64")
    at = f"model.layers.{layer}."
    gate = _named(checkpoint, at + "mlp.gate.weight")  # [E, D]
    norm = at + "post_attention_layernorm.weight"
    stored = checkpoint.tensors.get(norm)
    gain = _named(checkpoint, norm) if stored and stored.shape == gate.shape[1:] else 1.0
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


def _gate_rows(label: str, gate: np.ndarray, out: _Findings) -> None:
    """A row of the gate is an expert's: none may be constant, no two alike."""
    if not gate.any():
        return  # all zero: already said
    first: dict[bytes, int] = {}
    for e, row in enumerate(gate):
        if (row == row[0]).all():
            text = f"row {e} is {'zero' if row[0] == 0 else 'constant'}: expert {e} has no gate"
            out.add("error", "gate rows", label, f"{text} (vllm-project/vllm#36190)")
        elif (other := first.setdefault(row.tobytes(), e)) != e:
            text = f"row {e} is row {other} again: two experts are always chosen alike"
            out.add("warning", "gate rows", label, text)
