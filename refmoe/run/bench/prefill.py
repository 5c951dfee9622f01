"""Measure prefill: how fast a prompt is taken in."""

from typing import Any

from refmoe.model.decoder import Decoder
from refmoe.run.bench.base import Stream, time_call
from refmoe.run.bench.model import random_tokens, summarize, watch_clock
from refmoe.run.generate import prefill
from refmoe.run.load import Model


def measure_prefill(
    model: Model, decoder: Decoder, count: int = 128, runs: int = 5
) -> dict[str, Any]:
    """Measure a prompt of `count` random tokens, taken whole, with the head of its last token.

    Its bytes are those of all weights, once, whatever the router chooses.
    """
    stream, ids = Stream(), random_tokens(model, count)
    prefill(decoder, ids, decoder.caches())
    nbytes = sum(t.nbytes for n, t in model.checkpoint.tensors.items() if "embed_tokens" not in n)
    rates: list[float] = []

    def once() -> float:
        rates.append(count / time_call(lambda: prefill(decoder, ids, decoder.caches())))
        return nbytes / count * rates[-1] / 1e9

    stream.measure()
    ratios = [stream.compare(once) for _ in range(runs)]
    watched, clock = watch_clock(decoder)
    prefill(watched, ids, watched.caches())
    return summarize(rates, ratios, stream, nbytes / count, clock, count)
