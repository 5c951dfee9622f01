"""Generate: continue a prompt token by token, over a latent cache.

The prompt goes through in chunks of rows, which bounds the scratch and changes no number beyond
rounding; then each token alone. Generation ends at a stop id (config.json, generation_config.json
and the tokenizer each name some: K2-Instruct's two configs disagree), at `max_new_tokens`, or at
the end of the context.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from refmoe.fast.threads import single_blas_thread
from refmoe.files import InputError
from refmoe.model.cache import LatentCache
from refmoe.model.decoder import Decoder, check_tokens
from refmoe.run.load import Model
from refmoe.run.sampler import Sampling, sample
from refmoe.weights.checkpoint import Checkpoint

TINY = 1 << 25  # bytes of stored weights, 32 MiB: decoded, INT4 is seven times as much
CHUNK = 512  # rows of a prompt at a time: enough to multiply by matrices at full speed
STREAMED_CHUNK = 2048  # of streamed experts, which each chunk reads anew; 1 GB of scratch for K2


def prefill(
    decoder: Decoder,
    tokens: Sequence[int],
    memory: Sequence[LatentCache],
    chunk: int | None = None,
) -> np.ndarray:
    """Put tokens into `memory`, chunk by chunk, and return the logits [Z] after the last one.

    Raises `InputError` for bad ids, and for more tokens than the context has room for.
    """
    check_tokens(tokens, memory[0].length, decoder.cfg)
    if chunk is None:
        chunk = STREAMED_CHUNK if decoder.experts[0].streamed else CHUNK
    chunk = min(chunk, decoder.cache_options.rows or chunk)
    with single_blas_thread():
        for start in range(0, len(tokens), chunk):
            x = decoder.hidden([tokens[start : start + chunk]], [memory])
        return decoder.head(x[-1:])[0]


def step(decoder: Decoder, token: int, memory: Sequence[LatentCache]) -> np.ndarray:
    """Put one more token into `memory` and return the logits [Z] after it."""
    with single_blas_thread():
        return decoder.logits([token], memory)[0]


def context_length(decoder: Decoder) -> int:
    """Return the most tokens there can be: the model's context, or the room its caches have."""
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
    """Yield the tokens that continue a prompt; the stop id is not among them.

    max_new_tokens  at most so many; None: until a stop id, or the end of the context
    sampling        how a token is drawn, greedy by default, and `seed` of the draws
    stop            ids that end it
    memory          the latent caches, which may hold what came before the prompt; None: empty ones
    chunk           rows of the prompt at a time; None: `CHUNK`, or `STREAMED_CHUNK`
    """
    memory = decoder.caches() if memory is None else memory
    if max_new_tokens is not None and max_new_tokens < 0:
        raise InputError(f"max_new_tokens = {max_new_tokens}, expected 0 or more")
    # greedy needs no draws, and numpy.random takes a tenth of the time to a first token to load
    rng = np.random.default_rng(seed) if sampling.temperature else None
    logits = prefill(decoder, prompt, memory, chunk)
    end = context_length(decoder)
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

    prompt          a text, in which special tokens count as such, or token ids; for a text with
                    special tokens as plain text: `model.tokenizer.encode(text, ())`
    max_new_tokens  at most so many tokens; None: until a stop token, or the end of the context
    temperature     0 takes the likeliest token each time; `top_p`, `min_p`: see run/sampler.py
    seed            of the draws; each seed always gives the same text
    """
    ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    text = model.tokenizer.stream()
    how = Sampling(temperature, top_p, min_p)
    for token in generate_tokens(
        generation_decoder(model),
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


def is_tiny(checkpoint: Checkpoint) -> bool:
    """Tell whether NumPy generates as quickly as kernels, which are then never loaded.

    It is a matter of the bytes alone, so that the same model gives the same bits on every run.
    """
    return sum(t.nbytes for t in checkpoint.tensors.values()) <= TINY


def generation_decoder(model: Model, int4: str = "fast", cache: str = "float32") -> Decoder:
    """Return the model's decoder with the form of attention that costs less at each step.

    int4   fast: 16-bit activations in products with INT4 and Q4_0 weights and, of a prompt, with
           8-bit ones, which is 2e-5 off; exact: as everywhere else
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
