"""Measure a whole model: what decoding and prefill have in common."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from refmoe.fast import threads
from refmoe.model.decoder import Decoder
from refmoe.model.experts import MoeWeights
from refmoe.run.bench.base import Stream
from refmoe.run.load import Model


class Clock:
    """A watcher that adds the time since the last point to the part that ended there."""

    PARTS = (
        ("self_attn", "attention"),
        ("mlp.gate_proj", "dense mlp"),
        ("mlp.gate", "router"),
        ("mlp.experts", "experts"),
        ("mlp.shared_experts", "shared experts"),
        ("mlp.", "dense mlp"),
        ("lm_head", "head"),
        ("", "other"),  # norms, residuals, the embedding
    )
    INSIDE = ("kv_b_proj", "#q_latent", "#scores", "#probs", "#context_latent", "#rows")

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def wants(self, path: str) -> bool:
        """Return whether to stop at a point: not at those that only a slower form would have."""
        return ".experts." not in path and not path.endswith(self.INSIDE)

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        now = time.perf_counter()
        part = next(part for mark, part in self.PARTS if mark in path)
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now
        return x


def bytes_per_token(decoder: Decoder, positions: int) -> int:
    """Return the bytes that one token reads: weights as they are held, and the latent cache.

    `positions` is how many tokens the cache holds.
    """
    cfg = decoder.cfg
    total = decoder.lm_head.nbytes + decoder.norm.nbytes
    total += decoder.embed_tokens.nbytes // decoder.embed_tokens.shape[0]
    for i, w in enumerate(decoder.layers):
        total += w.input_layernorm.nbytes + w.post_attention_layernorm.nbytes
        total += sum(m.nbytes for m in w.self_attn if m is not None)
        if isinstance(w.mlp, MoeWeights):
            total += sum(m.nbytes for m in w.mlp.gate)
            total += sum(m.nbytes for m in w.mlp.shared_experts or ())
            total += cfg.num_experts_per_tok * sum(m.nbytes for m in decoder.experts[i](0))
        else:
            total += sum(m.nbytes for m in w.mlp)
    number = 2 if decoder.cache_options.bf16 else np.dtype(decoder.nx.dtype).itemsize
    latent = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    return total + number * latent * positions * cfg.num_hidden_layers


def random_tokens(model: Model, count: int) -> list[int]:
    """Return so many token ids, drawn with a fixed seed."""
    rng = np.random.default_rng(1)
    return rng.integers(0, min(model.cfg.vocab_size, 2000), count).tolist()


def watch_clock(decoder: Decoder) -> tuple[Decoder, Clock]:
    """Return the decoder with a clock that starts now, and the clock."""
    clock = Clock()
    watched = decoder.using(decoder.nx.watching(clock))
    clock.last = time.perf_counter()
    return watched, clock


def summarize(
    rates: Sequence[float],
    ratios: Sequence[float],
    stream: Stream,
    nbytes: float,
    clock: Clock,
    count: int,
) -> dict[str, Any]:
    """Return the document of tokens a second, for `nbytes` a token.

    rates   tokens a second of each round; ratios: of bytes a second to those of reading
    count   tokens during which the clock ran
    """
    rate = float(np.median(rates))
    return {
        "tok_s": rate,
        "tok_s_best": max(rates),
        "bytes_per_token": int(nbytes),
        "gbs": nbytes * rate / 1e9,
        "stream_gbs": stream.rate,
        "ratio": float(np.median(ratios)),
        "threads": threads.pool().threads,
        "parts": {part: s / count for part, s in clock.seconds.items()},
    }


def format_model(document: dict[str, Any]) -> list[str]:
    """Return the lines that show a document of `measure_decode` or `measure_prefill` to people."""
    d = document
    size, unit = (
        (d["bytes_per_token"] / 1e9, "GB")
        if d["bytes_per_token"] > 1e8
        else (d["bytes_per_token"] / 1e6, "MB")
    )
    out = [
        d["machine"],
        f"{d['tok_s']:.2f} tok/s, at best {d['tok_s_best']:.2f} "
        f"(dense {d['dense']}, INT4 {d['int4']}, cache {d['cache']}, {d['threads']} threads)",
        f"{size:.3f} {unit} a token: {d['gbs']:.1f} GB/s, {d['ratio']:.2f} of what reading alone "
        f"gives at the same time (in the middle {d['stream_gbs']:.1f} GB/s)",
    ]
    for part, seconds in sorted(d["parts"].items(), key=lambda p: -p[1]):
        out.append(f"{part:<16}{1e3 * seconds:>9.3f} ms a token")
    return out
