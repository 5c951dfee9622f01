"""How far a correct engine may be from float64: a precision profile, sampled.

A *profile* is data: in which type an engine stores its tensors, in which it adds up, how often it
rounds inside one operation. An emulated run is the float64 network with noise of just that size:

    stored     x·(1 + r·√n·N)          r: RMS error of one rounding, n: roundings in the operation
    summed     y + u·√(I/6)·N·√(x²W²ᵀ)    a recursive sum of I products in unit roundoff u
    normed     x·(1 + 2u·N), N one for a row: the mean of squares and its root are shared
    rotated    each pair turned by position·inv_freq·2u·N    angles computed in float32

with N standard normal, drawn anew everywhere. r = 0.425·u for values spread over a binade (one
bf16 rounding is 0.166 %). √(I/6): partial sums grow as √k, so the variance of a sum's error is
Σ k·u²/3 of a term's, Higham and Mary 2019 in expectation; blocked sums err less.

Layer-local: emulated operations get the engine's own inputs, as the judged ones do.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from refmoe.model.decoder import Decoder
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.rope import inv_freq

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
ROUNDING = 0.425  # RMS of one rounding's relative error, in units of u


@dataclass(frozen=True)
class Profile:
    """Types by name; `UNIT` has their unit roundoffs."""

    name: str
    storage: str  # of every point
    sums: str = "float32"  # accumulation in matrix products
    router: str = "float32"  # logits and weights of the router
    angles: str = "float32"  # position · frequency


PROFILES = {
    p.name: p
    for p in (
        Profile("float64", "float64", "float64", "float64", "float64"),
        Profile("float32", "float32"),
        Profile("bfloat16", "bfloat16"),
        Profile("bfloat16-router", "bfloat16", router="bfloat16"),
        Profile("float16", "float16"),
    )
}

# roundings an engine may make inside the operation that ends at a point, its own included
ROUNDINGS = (
    ("layernorm", 3),  # of the quotient, of the product with the gain, of x where it was wide
    ("model.norm", 3),
    ("#q_pe", 5),  # cos, sin, two products, a sum
    ("#k_pe", 5),
    ("#scores", 3),  # the two products, the scaling
    ("#probs", 2),
    (".act", 3),  # sigmoid, silu, product
    (".mlp.experts", 10),  # weight and product of each expert, sums over K
    ("gate", 4),
    ("gate#weights", 6),  # sigmoid, sum, quotient, scaling
)


def roundings(path: str) -> int:
    return next((n for end, n in reversed(ROUNDINGS) if path.endswith(end)), 1)


def emulated(
    decoder: Decoder,
    profile: Profile,
    positions: int,
    rng: np.random.Generator,
    inject: Callable[[str, np.ndarray], np.ndarray],
) -> Decoder:
    """The decoder as an engine of this profile might compute; `inject` sees the noisy values."""
    cfg, sums = decoder.cfg, UNIT[profile.sums]

    # lengths of the sums outside `linear`; of the latter two no more than the positions
    inner = {".mlp.gate": cfg.hidden_size, "#scores": cfg.kv_lora_rank}
    inner |= {"#context": positions, "#context_latent": positions}

    def linear(x: np.ndarray, m: Matrix) -> np.ndarray:
        w = dequantize(m, x.dtype, decoder.nx.conventions.rounded_products)
        size = np.sqrt((x * x) @ (w * w).T)
        return x @ w.T + sums * np.sqrt(m.shape[1] / 6) * rng.standard_normal(size.shape) * size

    def watch(path: str, x: np.ndarray) -> np.ndarray:
        if x.dtype.kind != "f":
            return inject(path, x)
        router = path.endswith((".mlp.gate", "gate#weights"))
        unit = UNIT[profile.router if router else profile.storage]
        noise = ROUNDING * unit * np.sqrt(roundings(path)) * rng.standard_normal(x.shape)
        if path.endswith(("#q_pe", "#k_pe")):
            turned = _turned(x, rng, inv_freq(cfg, decoder.nx.conventions.yarn_betas), profile)
            return inject(path, turned + noise * _pair_size(x))
        if path.endswith(tuple(inner)):  # sums whose operands are not at hand here
            width = next(n for end, n in inner.items() if path.endswith(end))
            size = np.sqrt((x * x).mean(axis=-1, keepdims=True))
            x = x + sums * np.sqrt(width) * rng.standard_normal(x.shape) * size
        if path.endswith(("layernorm", "model.norm")):
            noise = noise + 2 * sums * rng.standard_normal((len(x), 1))
        return inject(path, x * (1 + noise))

    return decoder.using(replace(decoder.nx, linear=linear, watch=watch, round=None))


def _turned(
    x: np.ndarray, rng: np.random.Generator, freq: np.ndarray, profile: Profile
) -> np.ndarray:
    """Each pair turned by what its angle is wrong."""
    middle = (1,) * (x.ndim - 2)  # one angle for all heads
    positions = np.arange(len(x)).reshape(-1, *middle, 1)
    wrong = rng.standard_normal((len(x), *middle, len(freq)))
    wrong *= 2 * UNIT[profile.angles] * positions * freq
    out = x.copy()
    out[..., 0::2] -= wrong * x[..., 1::2]
    out[..., 1::2] += wrong * x[..., 0::2]
    return out


def _pair_size(x: np.ndarray) -> np.ndarray:
    return np.repeat(np.hypot(x[..., 0::2], x[..., 1::2]), 2, axis=-1)
