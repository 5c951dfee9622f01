"""How fast, beside what the memory gives: every figure is a ratio to a rate of the same run.

    kernels    each format's rows times tokens, GB/s of weights over the rate of plain reading
    decode     one token after another: tok/s, and bytes a token times tok/s over the same rate
    prefill    a prompt: tok/s
    peers      the small slice of K2 through transformers and llama.cpp beside refmoe

Rates of a shared machine change by half from one second to the next. So reading and measuring take
turns, a ratio is of neighbours, and the middle one of all ratios counts; rates are the middle ones
too, and the best is given beside them. Reading adds up 64-bit words, which the compiler makes as
wide as the machine.
"""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from refmoe.fast import threads
from refmoe.model.decoder import Decoder
from refmoe.model.experts import MoeWeights
from refmoe.run.bench.base import Stream, timed
from refmoe.run.generate import prefill, step
from refmoe.run.load import Model

# --- a whole model


class Clock:
    """A watcher that gives the time since the last mark to the part that ended there."""

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
        """Not what would take a quicker form of the same away."""
        return ".experts." not in path and not path.endswith(self.INSIDE)

    def __call__(self, path: str, x: np.ndarray) -> np.ndarray:
        now = time.perf_counter()
        part = next(part for mark, part in self.PARTS if mark in path)
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now
        return x


def bytes_per_token(decoder: Decoder, positions: int) -> int:
    """Weights that one token reads, as they are held, and its latents at so many positions."""
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
    rng = np.random.default_rng(1)
    return rng.integers(0, min(model.cfg.vocab_size, 2000), count).tolist()


def decode(model: Model, decoder: Decoder, prompt: int = 16, steps: int = 24) -> dict[str, Any]:
    """One token at a time after a prompt, with the tokens of a seed: the best and middle step."""
    stream, memory = Stream(), decoder.caches()
    ids = random_tokens(model, prompt + 2 * steps)
    prefill(decoder, ids[:prompt], memory)
    for token in ids[prompt : prompt + steps]:  # pages and caches as they will be
        step(decoder, token, memory)
    nbytes = bytes_per_token(decoder, prompt + steps + steps // 2)
    rates: list[float] = []

    def one(token: int) -> float:
        rates.append(1 / timed(partial(step, decoder, token, memory)))
        return nbytes * rates[-1] / 1e9

    stream.measure()
    ratios = [stream.beside(partial(one, token)) for token in ids[prompt + steps :]]
    clock = Clock()
    watched = decoder.using(replace(decoder.nx, watch=clock))
    clock.last = time.perf_counter()
    for token in ids[prompt : prompt + steps]:
        step(watched, token, memory)
    rate = float(np.median(rates))
    return {
        "tok_s": rate,
        "tok_s_best": max(rates),
        "bytes_per_token": nbytes,
        "gbs": nbytes * rate / 1e9,
        "stream_gbs": stream.rate,
        "ratio": float(np.median(ratios)),
        "threads": threads.pool().threads,
        "parts": {part: s / steps for part, s in clock.seconds.items()},
    }
