"""How far a correct engine may be from float64: a precision profile, sampled.

A *profile* is data: in which type an engine stores its tensors, in which it adds up, what it
does to activations before it multiplies and to the cache before it reads it back. An emulated run
is the float64 network with noise of just that size:

    stored     x·(1 + r·√n·N)          r: RMS error of one rounding, n: roundings in the operation
    summed     y + u·√(I/6)·N·√(x²W²ᵀ)    a recursive sum of I products in unit roundoff u
    normed     x·(1 + 2u·N), N one for a row: the mean of squares and its root are shared
    rotated    each pair turned by position·inv_freq·2u·N    angles computed in float32
    quantised  x + U(-d/2, d/2), d the step of its group    activations in 8 bits, before a product
    cached     x·(1 + r·N)             latent and rotated key as the cache holds them

with N standard normal, U uniform, drawn anew everywhere. r = 0.425·u for values spread over a
binade (one bf16 rounding is 0.166 %). √(I/6): partial sums grow as √k, so the variance of a sum's
error is Σ k·u²/3 of a term's, Higham and Mary 2019 in expectation; blocked sums err less.

Layer-local: wherever the dump has a tensor, the next operation of every emulated run gets the
exact one, so an envelope is a property of checkpoint, tokens, profile and the dump's list of
names, and not of the dump's numbers. It is kept on disk: a second check of the same model samples
nothing.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.engines import CONVENTIONS
from refmoe.model import matrix
from refmoe.model.decoder import Decoder
from refmoe.model.formats.fp8_block import Fp8Block
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.rope import inv_freq

UNIT = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float8": 2.0**-4,  # e4m3
}
TILE = 1 << 24  # elements of a matrix at once: 128 MB of float64
ROUNDING = 0.425  # RMS of one rounding's relative error, in units of u


@dataclass(frozen=True)
class Profile:
    """Types by name; `UNIT` has their unit roundoffs."""

    name: str
    storage: str  # of every point
    sums: str = "float32"  # accumulation in matrix products
    logits: str = "float32"  # of the router
    weights: str = "float32"  # of the router
    angles: str = "float32"  # position · frequency
    cache: str | None = None  # latent and rotated key, where narrower than storage
    activations: str | None = None  # "int8/32", every product; "fp8/128", products of FP8 matrices


PROFILES = {
    p.name: p
    for p in (
        Profile("float64", *["float64"] * 5),
        Profile("float32", "float32"),
        Profile("bfloat16", "bfloat16"),
        Profile("bfloat16-router", "bfloat16", logits="bfloat16", weights="bfloat16"),
        Profile("float16", "float16"),
        # DeepSeek's FP8: activations in e4m3, a scale for 128 (deepseek-ai/DeepSeek-V3 kernel.py)
        Profile("fp8-block", "bfloat16", logits="bfloat16", activations="fp8/128"),
        # Q8_0 activations before every product, f16 cache (ggml-org/llama.cpp ggml-cpu, defaults)
        Profile("llama.cpp-q8", "float32", cache="float16", activations="int8/32"),
        # as the engines are usually run
        Profile("moonshot", "bfloat16"),
        Profile("transformers", "bfloat16"),
        Profile("vllm", "bfloat16", logits="bfloat16"),
        Profile("sglang", "bfloat16", logits="bfloat16"),
        Profile("mlx", "bfloat16", logits="bfloat16"),
        Profile("llama.cpp", "float32", cache="float16", activations="int8/32"),
    )
}


def profile_of(rounded: str, engine: str) -> Profile:
    """The profile of an engine whose dumped values are of this type."""
    if engine == "llama.cpp":
        return PROFILES["llama.cpp"]
    if CONVENTIONS[engine].router_logits == "activations":
        return replace(PROFILES[rounded], logits=rounded)
    return PROFILES[rounded]


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
        O, I = m.shape
        drawn = sums * np.sqrt(I / 6) * rng.standard_normal((len(x), O))
        square = x * x
        if profile.activations == "int8/32":
            x = x + rng.uniform(-0.5, 0.5, x.shape) * _steps(x, 32) / 127
        elif profile.activations == "fp8/128" and isinstance(m, Fp8Block):
            least = _steps(x, 128) / 448 * 2.0**-9  # subnormals of e4m3
            relative = ROUNDING * UNIT["float8"] * rng.standard_normal(x.shape) * x
            x = x + relative + rng.uniform(-0.5, 0.5, x.shape) * least
        y = np.empty_like(drawn)
        whole = [(slice(0, O), m)]
        for rows, tile in matrix.tiles(m, TILE) if O * I > TILE else whole:
            w = dequantize(tile, x.dtype, decoder.nx.conventions.rounded_products)
            y[:, rows] = x @ w.T + drawn[:, rows] * np.sqrt(square @ (w * w).T)
        return y

    def unit_of(path: str) -> float:
        if path.endswith(".mlp.gate"):
            return UNIT[profile.logits]
        return UNIT[profile.weights if path.endswith("gate#weights") else profile.storage]

    def watch(path: str, x: np.ndarray) -> np.ndarray:
        if x.dtype.kind != "f":
            return inject(path, x)
        noise = ROUNDING * unit_of(path) * np.sqrt(roundings(path)) * rng.standard_normal(x.shape)
        if path.endswith(("#q_pe", "#k_pe")):
            turned = _turned(x, rng, inv_freq(cfg, decoder.nx.conventions.yarn_betas), profile)
            return cached(path, inject(path, turned + noise * _pair_size(x)))
        if path.endswith(tuple(inner)):  # sums whose operands are not at hand here
            width = next(n for end, n in inner.items() if path.endswith(end))
            size = np.sqrt((x * x).mean(axis=-1, keepdims=True))
            x = x + sums * np.sqrt(width) * rng.standard_normal(x.shape) * size
        if path.endswith(("layernorm", "model.norm")):
            noise = noise + 2 * sums * rng.standard_normal((len(x), 1))
        return cached(path, inject(path, x * (1 + noise)))

    def cached(path: str, x: np.ndarray) -> np.ndarray:
        """Between a point and the cache that it goes into."""
        if profile.cache is None or not path.endswith(("kv_a_layernorm", "#k_pe")):
            return x
        return x * (1 + ROUNDING * UNIT[profile.cache] * rng.standard_normal(x.shape))

    return decoder.using(replace(decoder.nx, linear=linear, watch=watch, round=None))


def _steps(x: np.ndarray, group: int) -> np.ndarray:
    """The largest magnitude of each group of columns, for each column [T, I]."""
    starts = np.arange(0, x.shape[-1], group)
    most = np.maximum.reduceat(np.abs(x), starts, axis=-1)
    return np.repeat(most, group, axis=-1)[..., : x.shape[-1]]


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


# --- envelopes


class Lens(NamedTuple):
    """What of a point is compared, and whether the computation goes on with what was compared."""

    look: Callable[[np.ndarray], np.ndarray]  # [T, ...] → [T', ...]
    goes_on: bool
    step: float = 0.0  # half of the last decimal, where numbers were printed
    key: str = ""  # tells this lens from another one at the same point


@dataclass(frozen=True)
class Envelope:
    """Relative errors of emulated runs, RMS over a row: path → [runs, T']."""

    noise: dict[str, np.ndarray]
    gates: dict[str, float]  # router logits: RMS of the noise, absolute


def envelope(
    decoder: Decoder,
    profile: Profile,
    tokens: Sequence[int],
    lenses: Mapping[str, Lens],
    runs: int,
    identity: str | None = None,
) -> Envelope:
    """Sampled, or read back if the same was sampled before (`identity`: of the checkpoint)."""
    facts: list[Any] = [
        identity,
        asdict(profile),
        asdict(decoder.nx.conventions),
        list(tokens),
        runs,
        VERSION,
    ]
    facts += [[name, lens.goes_on, lens.key] for name, lens in lenses.items()]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    kept = _recall(key) if identity else None
    if kept is None:
        kept = _sampled(decoder, profile, tokens, lenses, runs)
        if identity:
            _remember(key, kept)
    return kept


VERSION = 1  # of the emulation: another one forgets what the last one sampled
KEPT = 64  # envelopes on disk


def _sampled(
    decoder: Decoder,
    profile: Profile,
    tokens: Sequence[int],
    lenses: Mapping[str, Lens],
    runs: int,
) -> Envelope:
    exact: dict[str, np.ndarray] = {}

    def record(path: str, x: np.ndarray) -> np.ndarray:
        if path in lenses or path.endswith(".mlp.gate"):
            exact[path] = x
        return x

    nx = replace(decoder.nx, stop_at_nonfinite=False)
    decoder.using(nx.watching(record)).logits(tokens)
    # an expert that only the engine chose has no exact rows; compare pools what others have
    lenses = {name: lens for name, lens in lenses.items() if name in exact}
    size = {}
    for name, lens in lenses.items():
        own = rms(lens.look(exact[name]))
        size[name] = np.where(own > 0, own, 1)
    noise: dict[str, list[np.ndarray]] = {name: [] for name in lenses}
    gates: dict[str, list[float]] = {}
    for seed in range(runs):
        rng = np.random.default_rng(seed)

        def inject(path: str, x: np.ndarray, rng: np.random.Generator = rng) -> np.ndarray:
            if path.endswith(".mlp.gate"):
                gates.setdefault(path, []).append(float(((x - exact[path]) ** 2).mean()))
            lens = lenses.get(path)
            if lens is None or x.shape != exact[path].shape:
                return x
            if x.dtype.kind == "f":
                error = lens.look(x) - lens.look(exact[path])
                if lens.step:
                    error = error + rng.uniform(-lens.step, lens.step, error.shape)
                noise[path].append(rms(error) / size[path])
            return exact[path] if lens.goes_on else x

        emulated(decoder.using(nx), profile, len(tokens), rng, inject).logits(tokens)
    return Envelope(
        {name: np.stack(rows) for name, rows in noise.items() if rows},
        {name: float(np.sqrt(np.mean(squares))) for name, squares in gates.items()},
    )


def rms(x: np.ndarray) -> np.ndarray:
    """Of each row: [T, ...] → [T]."""
    flat = x.reshape(len(x), -1)
    return np.sqrt((flat * flat).mean(axis=1))


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "refmoe" / "envelopes"


def _recall(key: str) -> Envelope | None:
    try:
        path = cache_folder() / f"{key}.npz"
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            noise = {n[1:]: file[n] for n in file.files if n[0] == "n"}
            return Envelope(noise, {n[1:]: float(file[n]) for n in file.files if n[0] == "g"})
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None  # absent, or half of one that a crash left: sampled again


def _remember(key: str, kept: Envelope) -> None:
    """A folder that cannot be written to is no error: the next check samples again."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{key}.{os.getpid()}.part"
        with part.open("wb") as file:
            arrays: dict[str, Any] = {"n" + name: x for name, x in kept.noise.items()}
            arrays |= {"g" + name: x for name, x in kept.gates.items()}
            np.savez(file, **arrays)
        part.replace(folder / f"{key}.npz")
        by_age = sorted(folder.glob("*.npz"), key=lambda f: f.stat().st_mtime)
        for file_ in by_age[:-KEPT]:
            file_.unlink(missing_ok=True)
    except OSError:
        pass
