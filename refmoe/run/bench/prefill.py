"""Measure how fast a prompt is taken in."""

import time
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.fast import threads
from refmoe.model.decoder import Decoder
from refmoe.run.bench.base import Stream, timed
from refmoe.run.bench.decode import Clock, random_tokens
from refmoe.run.generate import prefill
from refmoe.run.load import Model


def prompt(model: Model, decoder: Decoder, count: int = 128, runs: int = 5) -> dict[str, Any]:
    """A whole prompt at once; the head of its last token alone."""
    stream, ids = Stream(), random_tokens(model, count)
    prefill(decoder, ids, decoder.caches())
    nbytes = sum(t.nbytes for n, t in model.checkpoint.tensors.items() if "embed_tokens" not in n)
    rates: list[float] = []

    def once() -> float:
        rates.append(count / timed(lambda: prefill(decoder, ids, decoder.caches())))
        return nbytes / count * rates[-1] / 1e9

    stream.measure()
    ratios = [stream.beside(once) for _ in range(runs)]
    clock = Clock()
    watched = decoder.using(replace(decoder.nx, watch=clock))
    clock.last = time.perf_counter()
    prefill(watched, ids, watched.caches())
    rate = float(np.median(rates))
    return {
        "tok_s": rate,
        "tok_s_best": max(rates),
        "bytes_per_token": nbytes // count,
        "gbs": nbytes / count * rate / 1e9,
        "stream_gbs": stream.rate,
        "ratio": float(np.median(ratios)),
        "threads": threads.pool().threads,
        "parts": {part: s / count for part, s in clock.seconds.items()},
    }
