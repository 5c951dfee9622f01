"""The noise of an engine's precision: the float64 network as such an engine might compute it.

A precision profile (`engines.Profile`) says in which type an engine stores its tensors, in which it
adds up, what it does to activations before it multiplies, and to the cache before it reads it back.
An emulated run is the float64 network with random errors of the size that these types make:

    stored     x·(1 + r·√n·N)          r: RMS error of one rounding, n: roundings in the operation
    summed     y + u·√(I/6)·N·√(x²W²ᵀ)    a recursive sum of I products in unit roundoff u
    normed     x·(1 + 2u·N), N one for a row: the mean of squares and its root are shared
    rotated    each pair turned by position·inv_freq·2u·N    angles computed in float32
    quantised  x + U(-d/2, d/2), d the step of its group    activations in 8 bits, before a product
    cached     Q(x′) - x′ more, x′ = x·(1 + U(-1/16, 1/16))  latent and rotated key; Q: caches.py
    narrowed   y + √2·r·N·√(x²W²ᵀ)     both operands of a product rounded before it

with N standard normal, U uniform, drawn anew everywhere. r = 0.425·u for values spread over a
binade (one bf16 rounding is 0.166 %). √(I/6): partial sums grow as √k, so the variance of a sum's
error is Σ k·u²/3 of a term's, Higham and Mary 2019 in expectation; blocked sums err less.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass, replace

import numpy as np

from refmoe.config import Config
from refmoe.engines import Profile
from refmoe.fast.reproducible import for_each_tile
from refmoe.model.decoder import Decoder
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.numerics import Watch
from refmoe.model.points import kind, roundings
from refmoe.model.rope import inv_freq
from refmoe.oracle.caches import CACHES, Form, reading
from refmoe.oracle.forms.prefix import prefix_of

UNIT = {  # unit roundoffs
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float8": 2.0**-4,  # e4m3
}
GROUPS = {  # names for several ends of points in `Profile.points`
    "norms": ("input_layernorm", "post_attention_layernorm", "model.norm"),
    "residual": ("#attn_residual", "model.layers"),
}
ROUNDING = 0.425  # RMS of one rounding's relative error, in units of u


def rms(x: np.ndarray) -> np.ndarray:
    """Return the root mean square of each row, [T, ...] → [T]."""
    flat = x.reshape(len(x), -1)
    return np.sqrt((flat * flat).mean(axis=1))


def storage_of(profile: Profile, path: str) -> str:
    """Return the type in which an engine of this profile stores a point."""
    for name, type in profile.points:
        if kind(path).endswith(GROUPS.get(name, (name,))):
            return type
    if path.endswith(".mlp.gate"):
        return profile.logits
    return profile.weights if path.endswith("gate#weights") else profile.storage


def emulated(
    decoder: Decoder,
    profile: Profile,
    positions: int,
    rng: np.random.Generator,
    inject: Callable[[str, np.ndarray], np.ndarray],
    whole: Container[str] | None = None,
) -> Decoder:
    """Return the decoder as an engine of this profile might compute.

    inject     gets each point's name and noisy value, and returns what the computation goes on with
    positions  of the longest sum in attention
    whole      names that inject gets; None: all. Scores and probabilities, [T, H, T], that are not
               among them are computed in blocks of rows, and inject does not get them
    """
    cfg, sums = decoder.cfg, UNIT[profile.sums]
    spread = None if whole is None else rng.spawn(1)[0]

    # lengths of the sums outside `linear`; of the latter two no more than the positions
    inner = {".mlp.gate": cfg.hidden_size, "#scores": cfg.kv_lora_rank}
    inner |= {"#context": positions, "#context_latent": positions}

    def linear(x: np.ndarray, m: Matrix) -> np.ndarray:
        """Return x Wᵀ with the errors of its sums, x as the engine quantises it."""
        O, I = m.shape
        each = sums * np.sqrt(I / 6)
        if profile.activations in ("bfloat16", "float16"):
            each = np.hypot(each, np.sqrt(2) * ROUNDING * UNIT[profile.activations])
        drawn = each * rng.standard_normal((len(x), O))
        square = x * x
        if profile.activations == "int8/32":
            x = x + rng.uniform(-0.5, 0.5, x.shape) * _steps(x, 32) / 127
        elif profile.activations == "fp8/128" and isinstance(m, Fp8Block):
            least = _steps(x, 128) / 448 * 2.0**-9  # subnormals of e4m3
            relative = ROUNDING * UNIT["float8"] * rng.standard_normal(x.shape) * x
            x = x + relative + rng.uniform(-0.5, 0.5, x.shape) * least
        y = np.empty_like(drawn)

        def multiply(rows: slice, tile: Matrix) -> None:
            w = dequantize(tile, x.dtype, decoder.nx.conventions.rounded_products)
            y[:, rows] = x @ w.T + drawn[:, rows] * np.sqrt(square @ (w * w).T)

        for_each_tile(m, multiply)
        return y

    def watch(path: str, x: np.ndarray) -> np.ndarray:
        """Return a point with the errors of its operation, as `inject` gives it back."""
        if x.dtype.kind != "f":
            return inject(path, x)
        if spread is not None and takes_rows(path):
            return scored(path, x, spread)
        unit = ROUNDING * UNIT[storage_of(profile, path)]
        noise = unit * np.sqrt(roundings(path)) * rng.standard_normal(x.shape)
        if path.endswith(("#q_pe", "#k_pe")):
            freq = inv_freq(cfg, decoder.nx.conventions.yarn_betas)
            turned = _turned(x, rng, freq, profile, prefix_of(decoder))
            return cached(path, inject(path, turned + noise * _pair_size(x)))
        if path.endswith(tuple(inner)):  # sums whose operands are not at hand here
            width = next(n for end, n in inner.items() if path.endswith(end))
            size = np.sqrt((x * x).mean(axis=-1, keepdims=True))
            x = x + sums * np.sqrt(width) * rng.standard_normal(x.shape) * size
        if path.endswith(("layernorm", "model.norm")):
            noise = noise + 2 * sums * rng.standard_normal((len(x), 1))
        return cached(path, inject(path, x * (1 + noise)))

    def takes_rows(path: str) -> bool:
        """Tell whether this point is of the size T², and nobody wants it whole."""
        return whole is not None and path.endswith(("#scores", "#probs")) and path not in whole

    def scored(path: str, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a block of scores or probabilities with the errors that `watch` gives others.

        There are T² of them: the errors of sum and storage are drawn as one, in float32.
        """
        drawn = rng.standard_normal(x.shape, np.float32)
        stored = ROUNDING * UNIT[storage_of(profile, path)] * np.sqrt(roundings(path))
        if path.endswith("#probs"):
            return x * (1 + stored * drawn)
        square = x * x
        summed = sums**2 * inner["#scores"] * square.mean(axis=-1, keepdims=True)
        return x + np.sqrt(stored**2 * square + summed) * drawn

    def cached(path: str, x: np.ndarray) -> np.ndarray:
        """Return what the cache holds of a point that goes into it, and any other as it is."""
        if profile.cache not in UNIT or not path.endswith(("kv_a_layernorm", "#k_pe")):
            return x
        return x * (1 + ROUNDING * UNIT[profile.cache] * rng.standard_normal(x.shape))

    if profile.cache is not None and profile.cache not in UNIT:
        noisy = _NoisyCache(CACHES[profile.cache][0], rng)
        decoder = reading(decoder, lambda i: noisy)
    watcher = _Noisy(watch, takes_rows)
    return decoder.using(replace(decoder.nx, linear=linear, watch=watcher, round=None))


@dataclass(frozen=True)
class _Noisy:
    """A watcher that gives errors to what it sees, and which points it takes in blocks of rows."""

    watch: Watch
    takes_rows: Callable[[str], bool]

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        return self.watch(path, x)


@dataclass(frozen=True)
class _NoisyCache:
    """A cache that errs as a form of one does, and otherwise in every run."""

    form: Form
    rng: np.random.Generator
    expanded: bool = False

    def read(self, latent: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return latent and key with the errors that rows near them have."""
        near = [x * (1 + self.rng.uniform(-1 / 16, 1 / 16, x.shape)) for x in (latent, key)]
        back = self.form.read(*near)
        return latent + back[0] - near[0], key + back[1] - near[1]

    def heads(self, kv: np.ndarray, cfg: Config) -> np.ndarray:
        """Return keys and values as they are, as none are held."""
        return kv


def _steps(x: np.ndarray, group: int) -> np.ndarray:
    """Return for each column the largest magnitude of its group of columns, [T, I]."""
    starts = np.arange(0, x.shape[-1], group)
    most = np.maximum.reduceat(np.abs(x), starts, axis=-1)
    return np.repeat(most, group, axis=-1)[..., : x.shape[-1]]


def _turned(
    x: np.ndarray, rng: np.random.Generator, freq: np.ndarray, profile: Profile, start: int
) -> np.ndarray:
    """Turn each pair of channels by the error of its angle; `start` is the first row's position."""
    middle = (1,) * (x.ndim - 2)  # one angle for all heads
    positions = np.arange(start, start + len(x)).reshape(-1, *middle, 1)
    wrong = rng.standard_normal((len(x), *middle, len(freq)))
    wrong *= 2 * UNIT[profile.angles] * positions * freq
    out = x.copy()
    out[..., 0::2] -= wrong * x[..., 1::2]
    out[..., 1::2] += wrong * x[..., 0::2]
    return out


def _pair_size(x: np.ndarray) -> np.ndarray:
    """Return for each channel the length of the pair that it is rotated in."""
    return np.repeat(np.hypot(x[..., 0::2], x[..., 1::2]), 2, axis=-1)
