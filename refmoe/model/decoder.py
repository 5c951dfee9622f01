"""The decoder: embed, L layers, norm, logits.

    h  = x + attention(norm(x))                                                        [T, D]
    x' = h + mlp(norm(h))           dense in the first layers, then the mixture        [T, D]
    logits = norm(x_L) lm_headᵀ                                                        [T, Z]

Source: DeepSeek-V3 (arXiv:2412.19437), §2.1; pre-norm as in Moonshot's modelling file. Only
attention looks across rows, so one `layer` takes the rows of every prompt, and generating from
one prompt or sweeping over many is the same function. K2: L = 61, the first layer dense.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.engines import CONVENTIONS, Conventions
from refmoe.files import InputError
from refmoe.model import matrix
from refmoe.model.cache import LatentCache, caches
from refmoe.model.experts import Experts, MlpWeights, MoeWeights, moe, routed_experts, swiglu
from refmoe.model.matrix import Matrix, dequantize
from refmoe.model.mla import AttentionWeights, Segment, absorbed, attention, expanded
from refmoe.model.norm import rms_norm
from refmoe.model.numerics import POLICIES, Numerics


class LayerWeights(NamedTuple):
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
    """One layer over the rows of every prompt: x [T, D] → [T, D]. `nx.scope` names the layer."""
    return mix(attend(x, w, segments, cfg, nx), w, experts, cfg, nx)


def attend(
    x: np.ndarray, w: LayerWeights, segments: Sequence[Segment], cfg: Config, nx: Numerics
) -> np.ndarray:
    """The first half of a layer, the only one that looks across rows: x [T, D] → h [T, D]."""
    x = nx.bring(x, w.input_layernorm)
    h = nx.point("input_layernorm", rms_norm(x, w.input_layernorm, cfg.rms_norm_eps))
    h = attention(h, w.self_attn, segments, cfg, nx.within("self_attn."))
    return nx.point("#attn_residual", x + nx.point("self_attn", h))


def mix(x: np.ndarray, w: LayerWeights, experts: Experts, cfg: Config, nx: Numerics) -> np.ndarray:
    """The second half, row by row: h [T, D] → x' [T, D]."""
    h = mlp_input(x, w, cfg, nx)
    inside = nx.within("mlp.")
    if isinstance(w.mlp, MoeWeights):
        h = moe(h, w.mlp, experts, cfg, inside)
    else:
        h = swiglu(nx.bring(h, w.mlp.gate_proj), w.mlp, inside)
    return add_mlp(x, h, nx)


def mlp_input(x: np.ndarray, w: LayerWeights, cfg: Config, nx: Numerics) -> np.ndarray:
    """What router and experts see of h: [T, D] → [T, D]."""
    x = nx.bring(x, w.post_attention_layernorm)
    h = rms_norm(x, w.post_attention_layernorm, cfg.rms_norm_eps)
    return nx.point("post_attention_layernorm", h)


def add_mlp(x: np.ndarray, h: np.ndarray, nx: Numerics) -> np.ndarray:
    """The layer's output, of its first half and its mlp: [T, D] → [T, D]."""
    return nx.point("", x + nx.point("mlp", nx.bring(h, x)))


def embed(tokens: np.ndarray, embed_tokens: Matrix, nx: Numerics) -> np.ndarray:
    """tokens [T] → [T, D]."""
    x = dequantize(matrix.rows(embed_tokens, tokens), nx.dtype)
    return nx.point("model.embed_tokens", x)


def head(x: np.ndarray, norm: Matrix, lm_head: Matrix, cfg: Config, nx: Numerics) -> np.ndarray:
    """x [T, D] → logits [T, Z]."""
    return vocabulary(final_norm(x, norm, cfg, nx), lm_head, nx)


def final_norm(x: np.ndarray, norm: Matrix, cfg: Config, nx: Numerics) -> np.ndarray:
    """What the head multiplies: x [T, D] → [T, D]."""
    x = nx.bring(x, norm)
    return nx.point("model.norm", rms_norm(x, norm, cfg.rms_norm_eps))


def vocabulary(x: np.ndarray, lm_head: Matrix, nx: Numerics) -> np.ndarray:
    """Logits of all tokens, or of those whose rows of the head these are: [T, D] → [T, Z]."""
    return nx.point("lm_head", nx.bring(nx.linear(nx.bring(x, lm_head), lm_head), None))


@dataclass(frozen=True)
class Decoder:
    """A config, weights as stored, and how to compute. Nothing in it changes while it runs."""

    cfg: Config
    nx: Numerics
    embed_tokens: Matrix  # [Z, D]
    layers: Sequence[LayerWeights]
    experts: Callable[[int, int], MlpWeights]  # layer, expert → its matrices
    norm: Matrix  # [D]
    lm_head: Matrix  # [Z, D]

    def using(self, nx: Numerics) -> "Decoder":
        """The same weights under other numerics."""
        return replace(self, nx=nx)

    def experts_of(self, i: int) -> Experts:
        """A layer's own; a `Lender` where `experts` makes one."""
        lender = getattr(self.experts, "of_layer", None)
        return partial(self.experts, i) if lender is None else lender(i)

    def caches(self) -> list[LatentCache]:
        """The empty memory of one prompt."""
        return caches(self.cfg, self.nx)

    def hidden(
        self, prompts: Sequence[Sequence[int]], memory: Sequence[Sequence[LatentCache]]
    ) -> np.ndarray:
        """The last layer's output for the new tokens of each prompt, rows in order: [T, D]."""
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
                    x = layer(x, w, self.experts_of(i), segments, self.cfg, nx)
        except BaseException:  # also Ctrl-C: a half-done step leaves no rows behind
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
    """`InputError` for an empty prompt, an id outside the vocabulary, or more than the context."""
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
    """The definition, `model/` alone, in one of the four precisions, with some engine's sides."""
    if name not in POLICIES:
        raise InputError(f"numerics {name!r}; supported: {', '.join(POLICIES)}")
    if isinstance(conventions, str):
        if conventions not in CONVENTIONS:
            raise InputError(f"conventions {conventions!r}; supported: {', '.join(CONVENTIONS)}")
        conventions = CONVENTIONS[conventions]
    dtype, rounding = POLICIES[name]
    multiply = partial(matrix.linear, rounded=conventions.rounded_products)
    return Numerics(
        name,
        dtype,
        multiply,
        routed_experts,
        matrix.linear,
        expanded,
        absorbed,
        rounding,
        conventions=conventions,
    )
