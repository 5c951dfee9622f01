"""Compute what engines derive from YaRN's settings: the ramp over channels, and the gain."""

from math import ceil, floor, log, pi

from refmoe.config import Config, Yarn


def gain(yarn: Yarn) -> float:
    """Return what cos and sin are multiplied by: m(mscale) / m(mscale_all_dim)."""
    return _mscale(yarn, yarn.mscale) / _mscale(yarn, yarn.mscale_all_dim)


def _mscale(yarn: Yarn, m: float) -> float:
    """Return YaRN's m(factor) = 0.1·m·ln(factor) + 1."""
    return 0.1 * m * log(yarn.factor) + 1 if yarn.factor > 1 else 1.0


def ramp(cfg: Config, yarn: Yarn, betas: tuple[float, float] | None) -> tuple[int, int]:
    """Return `low` and `high` of model/rope.py under these betas; None: the config's."""
    R, L = cfg.qk_rope_head_dim, yarn.original_max_position_embeddings
    fast, slow = (
        R * log(L / (2 * pi * n)) / (2 * log(cfg.rope_theta))
        for n in betas or (yarn.beta_fast, yarn.beta_slow)
    )
    return max(floor(fast), 0), min(ceil(slow), R - 1)
