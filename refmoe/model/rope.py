"""Rotary positions and YaRN: a pair of channels turns by an angle proportional to its position.

    (a, b) → (a·cos θ - b·sin θ, a·sin θ + b·cos θ),    θ = position · inv_freq[i]     [T, R/2]

Pairs are adjacent channels (2i, 2i+1), and the result stays in place: the checkpoint's own
layout. (Hugging Face permutes the result to halves; products q·k do not change.)

YaRN stretches a context trained to length L by `factor`: frequencies that turn more than
`beta_fast` times within L stay, those that turn less than `beta_slow` times are slowed by the
factor, a ramp over the channel index lies between.

    inv_freq[i] = base[i]·(1 - r[i]) + base[i]/factor·r[i],        base[i] = theta^(-2i/R)
    r[i]        = clamp((i - low)/(high - low), 0, 1)
    low, high   = floor d(beta_fast), ceil d(beta_slow);    d(n) = R·ln(L / 2πn) / (2 ln theta)

    cos and sin are multiplied by m(mscale)/m(mscale_all_dim), which is 1 for K2;
    the softmax scale is m(mscale_all_dim)² / sqrt(N + R);      m(s) = 0.1·s·ln(factor) + 1

Sources: Su et al., arXiv:2104.09864, eq. 34; Peng et al., arXiv:2309.00071, §3.2-3.4;
deepseek-ai/DeepSeek-V3 inference/model.py for the placement of mscale. K2-Instruct and
K2-Thinking: theta = 50000, R = 64, L = 4096, beta_fast = beta_slow = 1; K2.5: beta_fast = 32.
"""

import math
from functools import cache

import numpy as np

from refmoe.config import Config, Yarn
from refmoe.model.matrix import array_module
from refmoe.model.numerics import Numerics


@cache
def inv_freq(cfg: Config, betas: tuple[float, float] | None = None) -> np.ndarray:
    """Return the radians a position for each pair, [R/2] float64.

    `betas` (fast, slow) take the place of the config's. The array is cached, and so read-only.
    """
    R, theta, yarn = cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling
    base = theta ** (-np.arange(0, R, 2) / R)  # [R/2]
    if yarn is None:
        base.flags.writeable = False
        return base

    def d(rotations: float) -> float:  # the channel pair that turns so often within L
        L = yarn.original_max_position_embeddings
        return R * math.log(L / (2 * math.pi * rotations)) / (2 * math.log(theta))

    fast, slow = betas or (yarn.beta_fast, yarn.beta_slow)
    low, high = max(math.floor(d(fast)), 0), min(math.ceil(d(slow)), R - 1)
    width = high - low or 0.001  # 0.001 as in every implementation: a step, not a division by zero
    r = np.clip((np.arange(R // 2) - low) / width, 0, 1)  # [R/2]
    out = base * (1 - r) + base / yarn.factor * r
    out.flags.writeable = False
    return out


def cos_sin(positions: np.ndarray, cfg: Config, nx: Numerics) -> tuple[np.ndarray, np.ndarray]:
    """Return cos, sin [T, R/2] of positions [T], in nx.dtype; the angles are float64."""
    angle = positions[:, None] * inv_freq(cfg, nx.conventions.yarn_betas)  # [T, R/2]
    yarn = cfg.rope_scaling
    gain = 1.0 if yarn is None else _m(yarn, yarn.mscale) / _m(yarn, yarn.mscale_all_dim)
    return (np.cos(angle) * gain).astype(nx.dtype), (np.sin(angle) * gain).astype(nx.dtype)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn adjacent pairs of x [..., R] by the angles of cos, sin [..., R/2]."""
    a, b = x[..., 0::2], x[..., 1::2]
    out = array_module(x).empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out


def softmax_scale(cfg: Config) -> float:
    """Return what scores are multiplied by: m(mscale_all_dim)² / sqrt(N + R)."""
    yarn = cfg.rope_scaling
    m = _m(yarn, yarn.mscale_all_dim) if yarn else 1.0
    return m * m / math.sqrt(cfg.qk_head_dim)


def _m(yarn: Yarn, mscale: float) -> float:
    """Return m(mscale), YaRN's factor on the attention temperature."""
    return 0.1 * mscale * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
