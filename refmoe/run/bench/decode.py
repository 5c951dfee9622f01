"""Measure decoding: one token after another."""

from functools import partial
from typing import Any

from refmoe.model.decoder import Decoder
from refmoe.run.bench.base import Stream, time_call
from refmoe.run.bench.model import bytes_per_token, random_tokens, summarize, watch_clock
from refmoe.run.generate import prefill, step
from refmoe.run.load import Model


def measure_decode(
    model: Model, decoder: Decoder, prompt: int = 16, steps: int = 24
) -> dict[str, Any]:
    """Measure one token at a time after a prompt of so many random tokens."""
    stream, memory = Stream(), decoder.caches()
    ids = random_tokens(model, prompt + 2 * steps)
    prefill(decoder, ids[:prompt], memory)
    for token in ids[prompt : prompt + steps]:  # pages and caches as they will be
        step(decoder, token, memory)
    nbytes = bytes_per_token(decoder, prompt + steps + steps // 2)
    rates: list[float] = []

    def one(token: int) -> float:
        rates.append(1 / time_call(partial(step, decoder, token, memory)))
        return nbytes * rates[-1] / 1e9

    stream.measure()
    ratios = [stream.compare(partial(one, token)) for token in ids[prompt + steps :]]
    watched, clock = watch_clock(decoder)
    for token in ids[prompt : prompt + steps]:
        step(watched, token, memory)
    return summarize(rates, ratios, stream, nbytes, clock, steps)
