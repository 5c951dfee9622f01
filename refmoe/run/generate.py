"""Prompt → tokens, one at a time, over a latent cache.

The prompt goes through in chunks of rows, which bounds the scratch and changes no number beyond
rounding; then each token alone. Generation ends at a stop id (config.json, generation_config.json
and the tokenizer each name some: K2-Instruct's two configs disagree), at `max_new_tokens`, or at
the end of the context.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.fast import threads
from refmoe.files import InputError
from refmoe.model.cache import LatentCache
from refmoe.model.decoder import Decoder, check_tokens
from refmoe.model.experts import routed_experts
from refmoe.run.load import Model
from refmoe.run.sampler import Sampling, sample
from refmoe.weights.checkpoint import Checkpoint

CHUNK = 512  # rows of a prompt at a time
STREAMED = 2048  # where each chunk reads the experts anew; some 1 GB of scratch at K2's widths


def prefill(
    decoder: Decoder,
    tokens: Sequence[int],
    memory: Sequence[LatentCache],
    chunk: int | None = None,
) -> np.ndarray:
    """Put the tokens into `memory`, chunk by chunk → the logits [Z] after the last one."""
    check_tokens(tokens, memory[0].length, decoder.cfg)
    if chunk is None:
        chunk = STREAMED if decoder.experts[0].streamed else CHUNK
    chunk = min(chunk, decoder.cache_options.rows or chunk)
    with alone(decoder):
        for start in range(0, len(tokens), chunk):
            x = decoder.hidden([tokens[start : start + chunk]], [memory])
        return decoder.head(x[-1:])[0]


def step(decoder: Decoder, token: int, memory: Sequence[LatentCache]) -> np.ndarray:
    """One more token → the logits [Z] after it."""
    with alone(decoder):
        return decoder.logits([token], memory)[0]


def alone(decoder: Decoder) -> Any:
    """Where refmoe's own threads work, BLAS's must not spin beside them: it halves both."""
    own = decoder.nx.experts is not routed_experts
    return threads.one_blas_thread() if own else nullcontext()


def context_of(decoder: Decoder) -> int:
    """The most tokens there can be: the model's, or what caches were given room for."""
    most = decoder.cfg.max_position_embeddings
    return min(most, decoder.cache_options.room or most)


def generate_tokens(
    decoder: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    stop: Collection[int] = (),
    memory: Sequence[LatentCache] | None = None,
    chunk: int | None = None,
) -> Iterator[int]:
    """New tokens, the stop id not among them. `memory` may hold what came before the prompt."""
    memory = decoder.caches() if memory is None else memory
    if max_new_tokens is not None and max_new_tokens < 0:
        raise InputError(f"max_new_tokens = {max_new_tokens}, expected 0 or more")
    rng = np.random.default_rng(seed)
    logits = prefill(decoder, prompt, memory, chunk)
    end = context_of(decoder)
    made = 0
    while max_new_tokens is None or made < max_new_tokens:
        token = sample(logits, sampling, rng)
        if token in stop:
            return
        yield token
        made += 1
        if made == max_new_tokens or memory[0].length == end:
            return
        logits = step(decoder, token, memory)


def generate(
    model: Model,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the continuation of a prompt, piece by piece as its characters become complete.

    The same seed gives the same text. Special tokens in the text count as such; pass token ids to
    have them plain (`model.tokenizer.encode(text, allowed_special=())`).
    """
    ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    text = model.tokenizer.stream()
    how = Sampling(temperature, top_p, min_p)
    for token in generate_tokens(
        working(model),
        ids,
        max_new_tokens=max_new_tokens,
        sampling=how,
        seed=seed,
        stop=model.stop_ids,
    ):
        if piece := text.feed(token):
            yield piece
    if piece := text.finish():
        yield piece


TINY = 1 << 25  # bytes of stored weights, 32 MiB: decoded, INT4 is seven times as much


def is_tiny(checkpoint: Checkpoint) -> bool:
    """Tell whether NumPy generates as quickly as kernels, which are then never loaded.

    It is a matter of the bytes alone, so that the same model gives the same bits on every run.
    """
    return sum(t.nbytes for t in checkpoint.tensors.values()) <= TINY


def working(model: Model, int4: str = "fast", cache: str = "float32") -> Decoder:
    """The decoder as generation uses it: the form of attention that costs less at each step.

    int4   fast: 16-bit activations in products with INT4 and Q4_0 weights and, of a prompt, with
           8-bit ones, 2e-5 of a result; exact
    cache  float32, or bf16: half the memory of the context, latents rounded to 2⁻⁹ of themselves
    """
    nx, options = replace(model.nx, attention="auto"), model.decoder.cache_options
    if model.card is None:  # on a card caches are as they were planned
        options = replace(options, bf16=cache == "bf16")
    quicker = not model.reference and nx.name == "float32"
    if quicker and model.card is None and is_tiny(model.checkpoint):
        from refmoe.fast.tiny import with_tiny_operations

        nx = with_tiny_operations(nx, keep=model.store is None)
    elif quicker and int4 == "fast":
        if model.card is not None:
            from refmoe.fast.gpu import operations as gpu_operations

            quick = gpu_operations.engine(model.card, nx.conventions, fast=True)
        else:
            from refmoe.fast.engine import engine

            quick = engine(nx.name, nx.conventions, fast=True)
        nx = nx.computing_with(quick)
    return replace(model.decoder, nx=nx, cache_options=options)
