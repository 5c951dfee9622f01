"""Measure how well weights larger than memory are streamed.

    ratio = tok/s · bytes read a token / the disk's own rate for such reads

1 where the disk is never idle and what is read is what was needed; less where computing binds. The
disk's own rate is that of experts drawn at random, by the same threads in the same way with nothing
computed meanwhile, before and after decoding: in the mean, for it swings.
"""

from pathlib import Path
from typing import Any

import numpy as np

from refmoe.files import InputError
from refmoe.run.bench.base import time_call
from refmoe.run.bench.model import random_tokens
from refmoe.run.generate import generation_decoder, prefill, step
from refmoe.run.load import load
from refmoe.weights.streaming.reader import high_water

WARM = 2  # tokens before counting begins


def measure_store(
    path: str | Path | None,
    ram: int | None,
    steps: int = 12,
    prompt: int = 1,
    int4: str = "fast",
    dense: str = "exact",
    reads: str | None = None,
) -> dict[str, Any]:
    """Measure decoding with `ram` bytes for weights.

    steps   tokens that are decoded, after a prompt of `prompt` tokens
    Raises `InputError` without a budget, and where everything fits into it.
    """
    if ram is None:
        raise InputError("--ram BYTES: the budget, like 4GB")
    model = load(path, dense=dense, ram=ram, reads=reads)
    store = model.store
    if store is None:
        raise InputError(f"{ram / 1e9:.1f} GB: all fits, or lies in memory; nothing is streamed")
    decoder = generation_decoder(model, int4)
    memory = decoder.caches()
    ids = random_tokens(model, prompt + WARM + steps)
    prefill(decoder, ids[:prompt], memory)
    for token in ids[prompt : prompt + WARM]:
        step(decoder, token, memory)
    sample = max(256 << 20, store.slot)
    rates = [store.arena.measure_read_rate(sample)]
    store.reset()
    seconds = [
        time_call(lambda token=token: step(decoder, token, memory))  # type: ignore[misc]
        for token in ids[prompt + WARM :]
    ]
    counters = store.counters
    rates.append(store.arena.measure_read_rate(sample))
    kept = sum(c.stored[0].nbytes + c.stored[1].nbytes for c in memory)
    total, disk = float(np.sum(seconds)), float(np.mean(rates))
    missed = counters.bytes_read / steps
    store.close()
    return {
        "budget": ram,
        "max_rss": high_water(),
        "disk_gbs": disk / 1e9,
        "tok_s": steps / total,
        "hit_rate": counters.hit_rate,
        "missed_bytes_per_token": missed,
        "ratio": steps / total * missed / disk,
        "least": store.least,
        "checkpoint_bytes": sum(t.nbytes for t in model.checkpoint.tensors.values()),
        "guess_rate": counters.guess_rate,
        "stalled": counters.stalled / total,
        "way": store.reader.way,
        "experts_held": store.budget.slots,
        "cache_bytes": kept,
    }


def format_store(document: dict[str, Any]) -> list[str]:
    """Return the lines that show a document of `measure_store` to people."""
    d = document
    hit = "none" if d["hit_rate"] is None else f"{d['hit_rate']:.1%}"
    guess = "none made" if d["guess_rate"] is None else f"{d['guess_rate']:.1%} right"
    return [
        f"budget {d['budget'] / 1e9:.2f} GB (at least {d['least'] / 1e9:.2f}) for a checkpoint of "
        f"{d['checkpoint_bytes'] / 1e9:.1f} GB; places for {d['experts_held']} experts",
        f"most memory ever resident {d['max_rss'] / 1e9:.2f} GB, latent cache "
        f"{d['cache_bytes'] / 1e6:.2f} MB of it",
        f"{d['tok_s']:.3f} tok/s; {d['missed_bytes_per_token'] / 1e9:.3f} GB read a token, {hit} "
        f"of experts there, guesses {guess}",
        f"{d['ratio']:.2f} of what the disk gives alone ({d['disk_gbs']:.2f} GB/s, {d['way']} "
        f"reads); computing waited {d['stalled']:.0%} of the time",
    ]
