"""Compute the seams of Numerics on a GPU."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refmoe.config import Config
from refmoe.engines import Conventions
from refmoe.fast.engine import engine as cpu_engine
from refmoe.fast.gpu.card import BLOCK, ROWS, SCORES, Card, _rounds
from refmoe.fast.gpu.device import Array
from refmoe.fast.gpu.kernels import FEW
from refmoe.model import mla
from refmoe.model.cache import LatentCache
from refmoe.model.experts import Experts, MlpWeights, swiglu
from refmoe.model.formats.heads import Heads
from refmoe.model.matrix import Matrix, dequantize, widen_bf16
from refmoe.model.numerics import NonFinite, Numerics
from refmoe.model.rope import softmax_scale
from refmoe.model.router import Routing


@dataclass(frozen=True)
class GpuExperts:
    """A layer's routed experts in the processor's memory, and what of the layer is on the GPU."""

    inner: Experts
    own: Mapping[int, MlpWeights] = field(default_factory=dict)  # experts that are on the GPU too
    shared: MlpWeights | None = None  # the shared expert, if it is on the GPU
    up: bool = False  # the routed sum is added to the shared expert's on the GPU

    @property
    def streamed(self) -> bool:
        return self.inner.streamed

    def __call__(self, e: int) -> MlpWeights:
        return self.inner(e)

    def batches(self, chosen: Sequence[int], x: np.ndarray) -> Iterator[dict[int, MlpWeights]]:
        return self.inner.batches(chosen, x)


@dataclass(frozen=True, kw_only=True)
class GpuNumerics(Numerics):
    """Numerics whose tensors may be on the GPU; watchers see them in the processor's memory.

    A point looks for NaN and infinity only in the processor's memory: on the GPU that would be a
    wait at each. Sums and products hand them on, 0 times infinity included, so that they are found
    where x comes down.
    """

    card: Card

    def point(self, name: str, x: Array) -> Array:
        """Show x, and check it where it is in the processor's memory. Logits come down here."""
        if name == "lm_head":
            x = self.card.bring(x, None)
        return self.tap(name, x) if self.card.has(x) else super().point(name, x)

    def tap(self, name: str, x: Array) -> Array:
        """Show x in the processor's memory, and return the answer in x's own."""
        if not self.watches(name):
            return x
        return self.card.bring(super().tap(name, self.card.bring(x, None)), x)


class GpuOperations:
    """The operations of a layer on two memories: each computes where its weights are."""

    def __init__(self, card: Card, base: Numerics):
        self.card, self.base = card, base
        self.rounded = base.conventions.rounded_products
        self.launched: tuple[Array, MlpWeights, Array] | None = None  # x, shared expert, its output

    def linear(self, x: Array, m: Matrix) -> Array:
        """Return y = x Wᵀ, where W is."""
        x = self.card.bring(x, m)
        return self.card.linear(x, m, self.rounded) if self.card.has(x) else self.base.linear(x, m)

    def norm(self, x: Array, gain: Matrix, eps: float) -> Array:
        """Return the RMSNorm of x, where the gain is."""
        return self.base.norm(self.card.bring(x, gain), gain, eps)

    def rotate(self, x: Array, cos: np.ndarray, sin: np.ndarray) -> Array:
        """Rotate x where it is. Angles go up as [T, R/2], once for queries and key."""
        if self.card.has(x):
            rows = (a.reshape(len(a), -1) for a in (cos, sin))
            cos, sin = (self.card.send(a).reshape(cos.shape) for a in rows)
        return self.base.rotate(x, cos, sin)

    def add(self, x: Array, y: Array) -> Array:
        """Return x + y in the memory of x, or in that of y if x has crossed to it already."""
        x = self.card.beside(x, y)
        return x + self.card.bring(y, x)

    def swiglu(self, x: Array, w: MlpWeights, nx: Numerics) -> Array:
        """Compute an MLP where its weights are, unless it was launched already (`experts`)."""
        known, self.launched = self.launched, None
        if known is not None and known[0] is x and known[1] is w:
            return known[2]
        return self.base.swiglu(self.card.bring(x, w.gate_proj), w, nx)

    def gate(self, x: Array, m: Matrix) -> np.ndarray:
        """Return logits in the processor's memory, where the choice is made; x comes along."""
        card = self.card
        if not card.has(x):
            if not card.has(m):
                return self.base.gate(x, m)
            return card.fetch(card.linear(card.send(x), m))[0]
        if card.has(m):
            host, logits = card.fetch(x, card.linear(x, m))
        else:
            (host,) = card.fetch(x)
            logits = self.base.gate(host, m)
        card.keep(x, host)
        return logits

    def experts(self, x: Array, routing: Routing, experts: Experts, nx: Numerics) -> Array:
        """Return the routed sum. Meanwhile the GPU works on the shared expert, launched before."""
        card = self.card
        here = experts if isinstance(experts, GpuExperts) else GpuExperts(experts)
        if here.shared is not None:
            shared = self.swiglu(x, here.shared, nx.within("shared_experts."))
            self.launched = x, here.shared, shared
        host = card.bring(x, None)
        if nx.stop_at_nonfinite and card.has(x) and not np.isfinite(host).all():
            row = int(np.argwhere(~np.isfinite(host))[0][0])
            raise NonFinite(
                f"{nx.path('#input')}: what came from the card is not finite, in row {row}; it "
                "began there, since x last came down. Without --gpu the point is named"
            )
        own, rest = self._own(x, routing, here, nx)
        y: Array = None if rest is None else self.base.experts(host, rest, here.inner, nx)
        if card.has(x) and here.up:
            y = None if y is None else card.send(y)
        elif own is not None:
            (own,) = card.fetch(own)
        if y is None:
            return own
        return y if own is None else y + own

    def _own(
        self, x: Array, routing: Routing, here: GpuExperts, nx: Numerics
    ) -> tuple[Array | None, Routing | None]:
        """Launch a single token's experts that are on the card → their sum, and who is left."""
        chosen = routing.experts[0].tolist() if len(routing.experts) == 1 else []
        mine = [k for k, e in enumerate(chosen) if e in here.own]
        inside = (".gate_proj", ".up_proj", ".act", ".down_proj", "#rows")
        watched = nx.watch is not None and any(
            nx.watches(f"experts.{chosen[k]}{name}") for k in mine for name in inside
        )
        if not mine or watched:
            return None, routing
        x = x if self.card.has(x) else self.card.send(x)
        total: Array = None
        for k in mine:
            part = swiglu(x, here.own[chosen[k]], nx) * float(routing.weights[0, k])
            total = part if total is None else total + part
        others = [k for k in range(len(chosen)) if k not in mine]
        if not others:
            return total, None
        rest = routing._replace(
            experts=routing.experts[:, others], weights=routing.weights[:, others]
        )
        return total, rest

    def expanded(self, *args: Any) -> Array:
        return self._attention(args, self.base.expanded)

    def absorbed(self, *args: Any) -> Array:
        return self._attention(args, self.base.absorbed)

    def _attention(self, args: tuple[Any, ...], on_host: Callable[..., Array]) -> Array:
        """Attend, on the card always over the latent: no memory grows with context times prompt."""
        q_nope, q_pe, kv_b_proj, cache, cfg, nx = args
        if not self.card.has(q_nope):
            return on_host(*args)
        if on_host is self.base.expanded and nx.watches("kv_b_proj"):
            return mla.expanded(*args)
        inside = ("#q_latent", "#scores", "#probs", "#context_latent")
        if any(nx.watches(name) for name in inside) or _rounds(kv_b_proj, self.rounded):
            return mla.absorbed(*args)
        T, S = len(q_nope), cache.length
        if T <= FEW:
            return self._latent_attention(q_nope, q_pe, kv_b_proj, cache, S, cfg, nx)
        xp = self.card.device.xp
        w = self._by_heads(kv_b_proj, cfg)
        context = xp.empty((T, cfg.num_attention_heads, cfg.v_head_dim), np.float32)
        for start in range(0, T, ROWS):
            rows = slice(start, min(start + ROWS, T))
            seen = S - T + rows.stop  # by the last of them
            context[rows] = self._latent_attention(
                q_nope[rows], q_pe[rows], w, cache, seen, cfg, nx
            )
        return context

    def _by_heads(self, m: Any, cfg: Config) -> Array:
        """Return kv_b_proj in float32: [H, N+V, C]."""
        known = self.card.view(m)
        w = dequantize(m) if known is None else self.card.decoded(known, 0, known.shape[0])
        return w.reshape(cfg.num_attention_heads, -1, cfg.kv_lora_rank)

    def _latent_attention(
        self,
        q_nope: Array,
        q_pe: Array,
        m: Any,
        cache: LatentCache,
        seen: int,
        cfg: Config,
        nx: Numerics,
    ) -> Array:
        """Attend for queries, the last of which sees `seen` positions; m stored or [H, N+V, C]."""
        card = self.card
        N, V, H = cfg.qk_nope_head_dim, cfg.v_head_dim, cfg.num_attention_heads
        scale = nx.dtype(softmax_scale(cfg))
        if isinstance(m, Heads):
            k_b, v_b = card.view(m.k_b), card.view(m.v_b)
            if k_b is not None and v_b is not None and k_b.whole and v_b.whole:
                C = k_b.shape[0] // H
                q_latent = card.by_head(q_nope, k_b, 0, C, C)
                return card.by_head(self.attend(q_latent, q_pe, cache, seen, scale), v_b, 0, V, V)
        elif not card.is_array(m):
            known = card.view(m)
            if known is not None and known.whole:
                q_latent = card.latent(q_nope, known, N + V)
                context = self.attend(q_latent, q_pe, cache, seen, scale)
                return card.by_head(context, known, N, V, N + V)
        if not card.is_array(m) or m.ndim == 2:
            m = self._by_heads(m, cfg)
        q_latent = (q_nope.transpose(1, 0, 2) @ m[:, :N]).transpose(1, 0, 2)  # [T, H, C]
        context = self.attend(q_latent, q_pe, cache, seen, scale)
        return (context.transpose(1, 0, 2) @ m[:, N:].transpose(0, 2, 1)).transpose(1, 0, 2)

    def attend(
        self, q_latent: Array, q_pe: Array, cache: LatentCache, seen: int, scale: np.floating
    ) -> Array:
        """Return softmax(scale · (q_latent·c_kv + q_pe·k_pe)) c_kv, causal: [T, H, C] → [T, H, C].

        Over blocks of positions: the largest score, the sum and the context so far are brought to
        the new largest (Milakov and Gimelshein, arXiv:1805.02867). All see the first block.
        """
        xp = self.card.device.xp
        T, H, C = q_latent.shape
        q = xp.ascontiguousarray(q_latent).reshape(T * H, C)
        p = xp.ascontiguousarray(q_pe).reshape(T * H, -1)
        c_kv, k_pe = cache.stored
        step = max(1, min(BLOCK, SCORES // (T * H)))
        last = xp.repeat(xp.arange(seen - T, seen), H)[:, None]
        most: Array = None
        for start in range(0, seen, step):
            stop = min(start + step, seen)
            latent, key = (
                widen_bf16(a[start:stop]) if cache.bf16 else a[start:stop] for a in (c_kv, k_pe)
            )
            s = (q @ latent.T + p @ key.T) * scale  # [T·H, block]
            if stop > seen - T + 1:
                s = xp.where(xp.arange(start, stop) <= last, s, np.float32(-np.inf))
            top = s.max(axis=1, keepdims=True)
            if most is None:
                e = xp.exp(s - top)
                most, total, context = top, e.sum(axis=1, keepdims=True), e @ latent
                continue
            new = xp.maximum(most, top)
            e, kept = xp.exp(s - new), xp.exp(most - new)
            total = total * kept + e.sum(axis=1, keepdims=True)
            context = context * kept + e @ latent
            most = new
        return (context / total).reshape(T, H, C)


def engine(card: Card, conventions: Conventions | str = "refmoe", fast: bool = False) -> Numerics:
    """Return the processor's engine in float32, computing on the card what lies there."""
    base = cpu_engine("float32", conventions, fast)
    own = GpuOperations(card, base)
    quick = replace(
        base,
        linear=own.linear,
        gate=own.gate,
        norm=own.norm,
        rotate=own.rotate,
        add=own.add,
        swiglu=own.swiglu,
        experts=own.experts,
        expanded=own.expanded,
        absorbed=own.absorbed,
    )
    return GpuNumerics(**vars(quick), card=card)
