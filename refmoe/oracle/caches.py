"""Narrow caches: what attention reads back of a latent and a rotated key that were quantised.

A cache of a type that is narrower than the tensors is no noise: rounding is the same each time, so
that attention over another engine's own latents can be computed again with these quantised just as
that engine's cache does. What is then left of the error is rounding, or the cause is another. A
`Form` is one way to write a row; a type has several, as engines differ in what shares a scale and
in whether the key is quantised, too:

    float16, bfloat16   rounded
    e4m3, e5m2          rounded and clipped to the largest; alone, or over a scale that brings the
                        largest magnitude of a token, of 128 channels, or of all tokens to it
    int8                codes -127..127, the scale as above
    q8_0                32 channels in codes -127..127, the scale in float16 (ggml)
    int4                32 channels in codes -7..7
    q4_0                32 channels in codes -8..7, the scale in float16 (ggml)

`keeping(decoder, forms)` is the decoder whose attention reads such a cache. The two `expanded`
forms are of an engine that caches each head's keys and values. Sources: vllm-project/vllm
`csrc/quantization/fp8/nvidia/quant_utils.cuh`, `csrc/cache_kernels.cu` (concat_and_cache_mla, the
latent with four scales and the key in bf16), sgl-project/sglang `srt/mem_cache/memory_pool.py`,
ggml-org/llama.cpp `ggml/src/ggml-quants.c`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.model.cache import LatentCache
from refmoe.model.decoder import Decoder
from refmoe.model.matrix import Matrix, round_bf16
from refmoe.model.numerics import Numerics, round_float16
from refmoe.model.points import parse

Write = Callable[[np.ndarray], np.ndarray]  # rows [T, n] → as they are read back


@dataclass(frozen=True)
class Form:
    """One way in which a cache of a type holds latent and key."""

    type: str  # a key of `CACHES`
    text: str  # how, after the type; empty: the plain way
    latent: Write
    key: Write
    together: bool = False  # latent and key are one row, and share its scale
    expanded: bool = False  # keys and values of each head are held, not the latent

    def read(self, latent: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return latent and key as they are read back; the latent as it is where heads are kept."""
        if self.expanded:
            return latent, self.key(key)
        if not self.together:
            return self.latent(latent), self.key(key)
        both = self.latent(np.concatenate((latent, key), axis=-1))
        return both[:, : latent.shape[-1]], both[:, latent.shape[-1] :]

    def heads(self, kv: np.ndarray, cfg: Config) -> np.ndarray:
        """Return each head's key and value [S, H(N+V)] as they are read back."""
        N = cfg.qk_nope_head_dim
        rows = kv.reshape(len(kv) * cfg.num_attention_heads, -1)
        parts = (self.latent(rows[:, :N]), self.latent(rows[:, N:]))
        return np.concatenate(parts, axis=-1).reshape(kv.shape)

    def __str__(self) -> str:
        return f"{self.type}{f' ({self.text})' if self.text else ''}"


def same(x: np.ndarray) -> np.ndarray:
    """Return x as it is."""
    return x


def round_bfloat16(x: np.ndarray) -> np.ndarray:
    """Return x rounded to bf16, in its own type."""
    return round_bf16(x.astype(np.float32)).astype(x.dtype)


def round_float8(x: np.ndarray, mantissa: int, least: int, most: float) -> np.ndarray:
    """Return x rounded to an 8-bit float with so many bits of mantissa, and clipped to ±most.

    least  exponent of the smallest normal number
    """
    x = np.clip(x, -most, most)
    _, exponent = np.frexp(x)  # x = f·2^e, f in [1/2, 1)
    step = np.exp2(np.maximum(exponent - 1, least) - mantissa).astype(x.dtype)
    return np.clip(np.rint(x / step) * step, -most, most)


FLOAT8 = {  # mantissa, exponent of the smallest normal, largest
    "e4m3": (3, -6, 448.0),
    "e5m2": (2, -14, 57344.0),
}


def scaled(x: np.ndarray, write: Write, most: float, group: int | None) -> np.ndarray:
    """Write x over a scale that brings the largest magnitude of each group to `most`.

    group  channels of a token that share a scale; 0: all of a token; None: all tokens
    """
    if group is None:
        largest = np.full((len(x), 1), np.abs(x).max(initial=0))
    else:
        starts = np.arange(0, x.shape[-1], group or x.shape[-1])
        largest = np.maximum.reduceat(np.abs(x), starts, axis=-1)
        sizes = np.diff([*starts, x.shape[-1]])
        largest = np.repeat(largest, sizes, axis=-1)
    scale = np.where(largest > 0, largest, 1) / most
    return write(x / scale) * scale


def write_integers(x: np.ndarray, most: int) -> np.ndarray:
    """Return x rounded to integers in ±most."""
    return np.clip(np.rint(x), -most, most)


def write_q8_0(x: np.ndarray) -> np.ndarray:
    """Write 32 channels as ggml's Q8_0: codes over largest/127, which is kept in float16."""
    return _in_blocks(x, lambda b: np.abs(b).max(axis=-1, keepdims=True) / 127, 0, -127, 127)


def write_q4_0(x: np.ndarray) -> np.ndarray:
    """Write 32 channels as ggml's Q4_0: codes over extreme/-8, which is kept in float16."""

    def scale(b: np.ndarray) -> np.ndarray:
        at = np.abs(b).argmax(axis=-1, keepdims=True)
        return np.take_along_axis(b, at, axis=-1) / -8

    return _in_blocks(x, scale, 8.5, 0, 15, 8)


def _in_blocks(
    x: np.ndarray,
    scale: Callable[[np.ndarray], np.ndarray],
    above: float,
    least: int,
    most: int,
    zero: int = 0,
) -> np.ndarray:
    """Write blocks of 32 as codes: x over the scale, `above` added and cut; 0: to the nearest."""
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], 32):
        b = x[..., start : start + 32]
        d = scale(b)
        over = np.divide(b, d, out=np.zeros_like(b), where=d != 0)
        nearest = np.copysign(np.floor(np.abs(over) + 0.5), over)
        codes = np.floor(over + above) if above else nearest
        out[..., start : start + 32] = (np.clip(codes, least, most) - zero) * round_float16(d)
    return out


def _forms(type: str, plain: Write | None, most: float | None, code: Write) -> tuple[Form, ...]:
    """Return the forms of a type: plain, over scales, with the key left alone, of expanded ones."""
    ways: list[tuple[str, Write]] = [] if plain is None else [("", plain)]
    for text, group in (
        ("a scale for each token", 0),
        ("a scale for each 128 channels", 128),
        ("one scale for all tokens", None),
    ):
        if most is not None:
            ways.append((text, partial(scaled, write=code, most=most, group=group)))
    out = []
    for text, write in ways:
        out.append(Form(type, text, write, write))
        alone = f"{text}, " if text else ""
        out.append(Form(type, f"{alone}the key as it is", write, same))
        if "token" in text:
            joint = f"{alone}latent and key together"
            out.append(Form(type, joint, write, write, together=True))
    first = ways[0]
    text = f"{first[0]}, " if first[0] else ""
    out.append(Form(type, f"{text}keys and values of each head", first[1], first[1], expanded=True))
    return tuple(out)


def _blocks(type: str, write: Write) -> tuple[Form, ...]:
    """Return the forms of a type whose scales are those of 32 channels."""
    return _forms(type, write, None, same)


def _float8(type: str) -> tuple[Form, ...]:
    """Return the forms of an 8-bit float."""
    mantissa, least, most = FLOAT8[type]
    write = partial(round_float8, mantissa=mantissa, least=least, most=most)
    return _forms(type, write, most, write)


CACHES: Mapping[str, tuple[Form, ...]] = {
    "float32": (Form("float32", "", same, same),),
    "float16": _forms("float16", round_float16, None, same),
    "bfloat16": _forms("bfloat16", round_bfloat16, None, same),
    "e4m3": _float8("e4m3"),
    "e5m2": _float8("e5m2"),
    "int8": _forms("int8", None, 127, partial(write_integers, most=127)),
    "q8_0": _blocks("q8_0", write_q8_0),
    "int4": _blocks(
        "int4", partial(scaled, write=partial(write_integers, most=7), most=7, group=32)
    ),
    "q4_0": _blocks("q4_0", write_q4_0),
}
SHORT = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "fp8": "e4m3"}


def read_cache(name: str | None) -> str | None:
    """Return the type of a cache by its name or short name; raise `InputError` for another."""
    if name is None or name in CACHES:
        return name
    if name not in SHORT:
        raise InputError(f"cache {name!r}; known: {', '.join((*CACHES, *SHORT))}")
    return SHORT[name]


class Reader(Protocol):
    """How attention reads a cache: as it was written, or not."""

    @property
    def expanded(self) -> bool:
        """Whether keys and values of each head are held, not the latent."""

    def read(self, latent: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return latent [S, C] and key [S, R] as they are read back."""

    def heads(self, kv: np.ndarray, cfg: Config) -> np.ndarray:
        """Return each head's key and value [S, H(N+V)] as they are read back."""


def keeping(decoder: Decoder, forms: Mapping[int, Form]) -> Decoder:
    """Return the decoder whose attention in these layers reads a cache of this form."""
    return reading(decoder, forms.get) if forms else decoder


def reading(decoder: Decoder, reader: Callable[[int], Reader | None]) -> Decoder:
    """Return the decoder whose attention in layer i reads its cache by reader(i).

    Keys and values are made from what is read. An engine may have dumped others as kv_b_proj, that
    it made from the latent before it was cached: they are judged as those, and not gone on with.
    """
    inside = decoder.nx.expanded

    def expanded(
        q_nope: np.ndarray,
        q_pe: np.ndarray,
        kv_b_proj: Matrix,
        cache: LatentCache,
        cfg: Config,
        nx: Numerics,
    ) -> np.ndarray:
        layer = parse(nx.path("#context")).layer
        how = None if layer is None else reader(layer)
        if how is None:
            return inside(q_nope, q_pe, kv_b_proj, cache, cfg, nx)
        held = _held(how, cache, cfg)
        fresh = nx.linear(cache.c_kv, kv_b_proj)
        theirs = nx.point("kv_b_proj", fresh)
        if how.expanded:
            kv = how.heads(theirs, cfg)
        else:
            kv = nx.linear(held.c_kv, kv_b_proj)
            if np.linalg.norm(theirs - kv) < np.linalg.norm(theirs - fresh):
                kv = nx.point("kv_b_proj", kv)
        rest = nx.watching(_Given(nx.watch, kv))
        return inside(q_nope, q_pe, kv_b_proj, held, cfg, rest)

    beside = decoder.nx.absorbed

    def absorbed(
        q_nope: np.ndarray,
        q_pe: np.ndarray,
        kv_b_proj: Matrix,
        cache: LatentCache,
        cfg: Config,
        nx: Numerics,
    ) -> np.ndarray:
        layer = parse(nx.path("#context")).layer
        how = None if layer is None else reader(layer)
        held = cache if how is None or how.expanded else _held(how, cache, cfg)
        return beside(q_nope, q_pe, kv_b_proj, held, cfg, nx)

    return decoder.using(replace(decoder.nx, expanded=expanded, absorbed=absorbed))


def _held(how: Reader, cache: LatentCache, cfg: Config) -> LatentCache:
    """Return a cache that holds what is read back of this one."""
    latent, key = how.read(cache.c_kv, cache.k_pe)
    held = LatentCache(cfg, latent.dtype, room=max(1, len(latent)))
    held.append(latent, key)
    return held


class _Given:
    """A watcher around another that has the keys and values of all heads as they are."""

    def __init__(self, inside: Any, kv: np.ndarray):
        self.inside, self.kv = inside, kv

    def wants(self, path: str) -> bool:
        """Tell whether this point is looked at: keys and values always."""
        if path.endswith("kv_b_proj"):
            return True
        wants = getattr(self.inside, "wants", None)
        return self.inside is not None and (wants is None or bool(wants(path)))

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        if path.endswith("kv_b_proj"):
            return self.kv
        return x if self.inside is None else np.asarray(self.inside(path, x))
