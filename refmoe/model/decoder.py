"""The decoder: embed, L layers, norm, logits.

    h  = x + attention(norm(x))                                                        [T, D]
    x' = h + mlp(norm(h))           dense in the first layers, then the mixture        [T, D]
    logits = norm(x_L) lm_headᵀ                                                        [T, Z]

Source: DeepSeek-V3 (arXiv:2412.19437), §2.1; pre-norm as in Moonshot's modelling file. Only
attention looks across rows, so one `layer` takes the rows of every prompt, and generating from
one prompt or sweeping over many is the same function. K2: L = 61, the first layer dense.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.engines import CONVENTIONS, Conventions
from refmoe.files import InputError
from refmoe.model import matrix
from refmoe.model.cache import CacheOptions, LatentCache
from refmoe.model.experts import (
    Experts,
    ExpertsFrom,
    MlpWeights,
    MoeWeights,
    moe,
    routed_experts,
    swiglu,
)
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.mla import AttentionWeights, Segment, absorbed, attention, expanded
from refmoe.model.norm import rms_norm
from refmoe.model.numerics import PRECISIONS, Numerics
from refmoe.model.rope import rotate


class LayerWeights(NamedTuple):
    """The matrices of a layer but its routed experts."""

    input_layernorm: Matrix  # [D]
    self_attn: AttentionWeights
    post_attention_layernorm: Matrix  # [D]
    mlp: MlpWeights | MoeWeights


def layer(
    x: np.ndarray,
    w: LayerWeights,
    experts: Experts,
    segments: Sequence[Segment],
    cfg: Config,
    nx: Numerics,
) -> np.ndarray:
    """Compute one layer for the rows of every prompt: x [T, D] → [T, D]. `nx.scope` names it."""
    return mix(attend(x, w, segments, cfg, nx), w, experts, cfg, nx)


def attend(
    x: np.ndarray, w: LayerWeights, segments: Sequence[Segment], cfg: Config, nx: Numerics
) -> np.ndarray:
    """Compute a layer's first half, the one that looks across rows: x [T, D] → h [T, D]."""
    h = nx.point("input_layernorm", nx.norm(x, w.input_layernorm, cfg.rms_norm_eps))
    h = attention(h, w.self_attn, segments, cfg, nx.within("self_attn."))
    return nx.point("#attn_residual", nx.add(x, nx.point("self_attn", h)))


def mix(h: np.ndarray, w: LayerWeights, experts: Experts, cfg: Config, nx: Numerics) -> np.ndarray:
    """Compute a layer's second half, row by row: h [T, D] → x' [T, D]."""
    x, inside = mlp_input(h, w, cfg, nx), nx.within("mlp.")
    if isinstance(w.mlp, MoeWeights):
        return add_mlp(h, moe(x, w.mlp, experts, cfg, inside), nx)
    return add_mlp(h, nx.swiglu(x, w.mlp, inside), nx)


def mlp_input(h: np.ndarray, w: LayerWeights, cfg: Config, nx: Numerics) -> np.ndarray:
    """Return what router and experts see of h: norm(h), [T, D] → [T, D]."""
    norm = nx.norm(h, w.post_attention_layernorm, cfg.rms_norm_eps)
    return nx.point("post_attention_layernorm", norm)


def add_mlp(h: np.ndarray, y: np.ndarray, nx: Numerics) -> np.ndarray:
    """Return the layer's output, h + the mlp's y: [T, D] → [T, D]."""
    return nx.point("", nx.add(h, nx.point("mlp", y)))


def embed(tokens: np.ndarray, embed_tokens: Matrix, nx: Numerics) -> np.ndarray:
    """Look up tokens [T] → x [T, D]."""
    x = dequantize(matrix.rows(embed_tokens, tokens), nx.dtype)
    return nx.point("model.embed_tokens", x)


def final_norm(x: np.ndarray, norm: Matrix, cfg: Config, nx: Numerics) -> np.ndarray:
    """Return what the head multiplies: x [T, D] → [T, D]."""
    return nx.point("model.norm", nx.norm(x, norm, cfg.rms_norm_eps))


def vocabulary(x: np.ndarray, lm_head: Matrix, nx: Numerics) -> np.ndarray:
    """Return the logits of the tokens whose rows of the head are given: x [T, D] → [T, Z]."""
    return nx.point("lm_head", nx.linear(x, lm_head))


def head(x: np.ndarray, norm: Matrix, lm_head: Matrix, cfg: Config, nx: Numerics) -> np.ndarray:
    """Return the logits [T, Z] of the last layer's output x [T, D]."""
    return vocabulary(final_norm(x, norm, cfg, nx), lm_head, nx)


@dataclass(frozen=True)
class Decoder:
    """A config, weights as stored, and how to compute. Nothing in it changes while it runs."""

    cfg: Config
    nx: Numerics
    embed_tokens: Matrix  # [Z, D]
    layers: Sequence[LayerWeights]
    experts: Sequence[Experts]  # of each layer; a dense one's are never asked for
    norm: Matrix  # [D]
    lm_head: Matrix  # [Z, D]
    cache_options: CacheOptions = CacheOptions()  # noqa: RUF009 (frozen)

    def using(self, nx: Numerics) -> "Decoder":
        """Return a decoder with these weights and other numerics."""
        return replace(self, nx=nx)

    def with_experts(self, expert: Callable[[int, int], MlpWeights]) -> "Decoder":
        """Return a decoder whose routed experts are `expert(layer, e)`."""
        own = [ExpertsFrom(partial(expert, i), e.streamed) for i, e in enumerate(self.experts)]
        return replace(self, experts=own)

    def caches(self) -> list[LatentCache]:
        """Return an empty cache for each layer: the memory of one prompt."""
        cfg, dtype, how = self.cfg, self.nx.dtype, self.cache_options
        count = cfg.num_hidden_layers
        return [LatentCache(cfg, dtype, how.bf16, how.room) for _ in range(count)]

    def hidden(
        self, prompts: Sequence[Sequence[int]], memory: Sequence[Sequence[LatentCache]]
    ) -> np.ndarray:
        """Return the last layer's output for the new tokens of each prompt, in order: [T, D].

        `memory` has the caches of each prompt, and holds these tokens as well afterwards. After an
        error or Ctrl-C it is as it was.
        """
        spans, start = [], 0
        for tokens, layers in zip(prompts, memory, strict=True):
            check_tokens(tokens, layers[0].length, self.cfg)
            spans.append(slice(start, start + len(tokens)))
            start += len(tokens)
        ids = np.concatenate([np.asarray(t, np.intp) for t in prompts])
        before = [[cache.length for cache in layers] for layers in memory]
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # points name what is not finite
                x = embed(ids, self.embed_tokens, self.nx)
                for i, w in enumerate(self.layers):
                    segments = [
                        Segment(s, layers[i]) for s, layers in zip(spans, memory, strict=True)
                    ]
                    nx = self.nx.within(f"model.layers.{i}.")
                    x = layer(x, w, self.experts[i], segments, self.cfg, nx)
        except BaseException:
            for layers, lengths in zip(memory, before, strict=True):
                for cache, length in zip(layers, lengths, strict=True):
                    cache.truncate(length)
            raise
        return x

    def head(self, x: np.ndarray) -> np.ndarray:
        """x [T, D] → logits [T, Z]."""
        with np.errstate(over="ignore", invalid="ignore"):  # as in `hidden`
            return head(x, self.norm, self.lm_head, self.cfg, self.nx)

    def logits(
        self, tokens: Sequence[int], memory: Sequence[LatentCache] | None = None
    ) -> np.ndarray:
        """tokens [T] → logits [T, Z], after what `memory` holds; it then holds these as well."""
        return self.head(self.hidden([tokens], [self.caches() if memory is None else memory]))


def check_tokens(tokens: Iterable[int], before: int, cfg: Config) -> None:
    """Raise `InputError` for no token, an id outside the vocabulary, or more than the context."""
    ids = np.asarray(tokens)
    if ids.size == 0:
        raise InputError("the prompt is empty; give at least one token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"tokens are {ids.dtype} {list(ids.shape)}, expected a list of integers")
    bad = np.flatnonzero((ids < 0) | (ids >= cfg.vocab_size))
    if bad.size:
        raise InputError(
            f"token {bad[0]} is {ids[bad[0]]}, the vocabulary has ids 0 to {cfg.vocab_size - 1}"
        )
    if before + ids.size > cfg.max_position_embeddings:
        raise InputError(
            f"{before + ids.size} tokens, max_position_embeddings is {cfg.max_position_embeddings}"
        )


def policy(name: str, conventions: Conventions | str = "refmoe") -> Numerics:
    """Return the definition, model/ alone, in one of four precisions, by an engine's conventions.

    Raises `InputError` for an unknown precision or engine.
    """
    if name not in PRECISIONS:
        raise InputError(f"numerics {name!r}; supported: {', '.join(PRECISIONS)}")
    if isinstance(conventions, str):
        if conventions not in CONVENTIONS:
            raise InputError(f"conventions {conventions!r}; supported: {', '.join(CONVENTIONS)}")
        conventions = CONVENTIONS[conventions]
    return Numerics(
        name=name,
        dtype=PRECISIONS[name].dtype,
        round=PRECISIONS[name].round,
        linear=partial(matrix.linear, rounded=conventions.rounded_products),
        gate=matrix.linear,
        norm=rms_norm,
        rotate=rotate,
        add=operator.add,
        swiglu=swiglu,
        experts=routed_experts,
        expanded=expanded,
        absorbed=absorbed,
        conventions=conventions,
    )
