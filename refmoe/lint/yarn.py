"""Read YaRN's settings as each engine does."""

from math import ceil, floor, log, pi, sqrt

import numpy as np

from refmoe.config import Config, Yarn
from refmoe.engines import YARN_READINGS, YarnReading
from refmoe.lint.base import _Findings
from refmoe.model.rope import inv_freq, softmax_scale

# --- YaRN, as engines take it from the config


def _yarn(cfg: Config, out: _Findings) -> None:
    yarn = cfg.rope_scaling
    scale = softmax_scale(cfg)
    if yarn is None:
        text = f"no YaRN: theta {cfg.rope_theta:g}, softmax scale {scale:.6f} in every engine"
        out.add("note", "yarn", None, text)
        return
    gain = _mscale(yarn, yarn.mscale) / _mscale(yarn, yarn.mscale_all_dim)
    for e in YARN_READINGS:
        low, high = _ramp(cfg, yarn, e.betas or (yarn.beta_fast, yarn.beta_slow))
        short = (
            f" ({1 / sqrt(cfg.qk_head_dim):.6f} if not more than "
            f"{yarn.original_max_position_embeddings} positions are allocated)"
        )
        text = (
            f"YaRN in {e.name}: ramp {low} to {high}, softmax scale {scale:.6f}"
            f"{short if e.short else ''}, cos and sin x{1.0 if e.one_mscale else gain:.6g}"
        )
        out.add("note", "yarn", None, f"{text} [{e.source}]")
        if e.betas:
            _other_betas(cfg, yarn, e, out)
        if e.one_mscale and gain != 1:
            text = f"{e.name}: GGUF has no key for mscale; cos and sin lack the factor {gain:.6g}"
            out.add("warning", "YaRN", None, text)
    given = cfg.max_position_embeddings / yarn.original_max_position_embeddings
    if given != yarn.factor:
        text = (
            f"max_position_embeddings / original_max_position_embeddings = {given:g}, factor is "
            f"{yarn.factor:g}: some transformers versions take the quotient (transformers#40320)"
        )
        out.add("warning", "YaRN", None, text)


def _mscale(yarn: Yarn, m: float) -> float:
    return 0.1 * m * log(yarn.factor) + 1 if yarn.factor > 1 else 1.0


def _ramp(cfg: Config, yarn: Yarn, betas: tuple[float, float]) -> tuple[int, int]:
    """low and high of model/rope.py."""
    R, L = cfg.qk_rope_head_dim, yarn.original_max_position_embeddings
    fast, slow = (R * log(L / (2 * pi * n)) / (2 * log(cfg.rope_theta)) for n in betas)
    return max(floor(fast), 0), min(ceil(slow), R - 1)


def _other_betas(cfg: Config, yarn: Yarn, e: YarnReading, out: _Findings) -> None:
    ratio = inv_freq(cfg, e.betas) / inv_freq(cfg)
    wrong = np.flatnonzero(np.abs(ratio - 1) > 1e-12)
    if len(wrong):
        worst = wrong[np.abs(np.log(ratio[wrong])).argmax()]
        assert e.betas is not None
        text = (
            f"{e.name}'s deepseek2 takes beta_fast, beta_slow = {e.betas[0]:g}, {e.betas[1]:g} for "
            f"{yarn.beta_fast:g}, {yarn.beta_slow:g}: {len(wrong)} of {len(ratio)} frequencies are "
            f"wrong, number {worst} by x{1 / ratio[worst]:.3g} (measured in llama-cpp-python "
            "0.3.36; older GGUFs lack the keys too: ggml-org/llama.cpp#18013)"
        )
        out.add("warning", "YaRN", None, text)
