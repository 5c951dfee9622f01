"""Place on a GPU what every token uses, the routed experts staying in memory: `--gpu`.

A placement (weights/placement.py) says which parts go to the card. They are copied once, as stored,
and are matrices of the same formats with CuPy's arrays in them; the caches of layers whose
attention is there lie beside them. The functions of model/ compute on whatever arrays they get; the
operations (operations.py) carry x to where the weights are:

    linear     few tokens by kernels.py, many by cuBLAS on decoded tiles
    norm       brings x, and with it the residual that is added later
    gate       the product where the router's weights are; x comes down along with the logits, and
               the choice is made in the processor's memory
    experts    on the x that came down, by fast/linear.py; the sum goes up where it is added
    absorbed   queries become latent, and contexts values, as stored; the cache in blocks

So x crosses once each way in a layer with routed experts, and not at all in a dense one. The shared
expert is launched before the processor begins with the routed ones: CuPy's calls do not wait.
Everything is on one stream; what waits is the processor, for x, once a layer.

Memory: the pool is limited to the budget. Weights and caches are placed within the budget less a
reserve, caches have room for the whole context at once, and how many rows of a prompt go through
together is chosen so that `scratch` fits what is left. What cannot be kept is refused before
anything is loaded.

Rounding differs from the definition's as sums are made in other orders (bounds: kernels.py).
cuBLAS multiplies in float32; TF32 is not asked for. CuPy is imported in `CudaDevice` alone, and a
`Device` of another kind serves the tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.engines import Conventions
from refmoe.fast.gpu.card import (
    ASIDE,
    BLOCK,
    MOST,
    READS,
    ROWS,
    SCORES,
    SMALL,
    TILE,
    VRAM,
    Card,
    _complete,
    _joined,
)
from refmoe.fast.gpu.device import MODULE, Device
from refmoe.fast.gpu.kernels import FEW
from refmoe.fast.gpu.operations import GpuExperts, engine
from refmoe.files import InputError
from refmoe.model.cache import CacheOptions
from refmoe.model.decoder import Decoder, LayerWeights
from refmoe.model.experts import Experts, MlpWeights, MoeWeights
from refmoe.model.formats.coded import Coded
from refmoe.model.formats.heads import Heads
from refmoe.model.matrix import dequantize
from refmoe.model.mla import AttentionWeights
from refmoe.progress import Progress
from refmoe.weights.placement import CARD_RESERVE, Parts, Share, Tier, on_card

CONTEXT = 4096  # tokens


# --- a placement, carried out


class _Layers(Sequence[LayerWeights]):
    """Layers with some parts on the card; the others are asked for where they are."""

    def __init__(self, inner: Sequence[LayerWeights], parts: Sequence[LayerWeights | None]):
        self.inner, self.parts = inner, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        mine = self.parts[i]
        if mine is None:
            return self.inner[i]
        return mine if _complete(mine) else _joined(mine, self.inner[i])


class _Passing(Sequence[LayerWeights]):
    """Layers that go up when they are asked for. Whoever asks drops each before the next."""

    def __init__(self, inner: Sequence[LayerWeights], card: Card):
        self.inner, self.card = inner, card

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        self.card.forget()
        return self.card.layer(self.inner[i])


def scratch(cfg: Config, rows: int) -> int:
    """Return how many bytes are computed on the card at once, at most, with `rows` of a prompt.

    What a layer holds beside its weights, in float32: x and its sums; queries, rotated and not,
    and contexts, or what SwiGLU makes; a decoded tile with its results; in attention kv_b_proj, and
    for `ROWS` queries the latents, scores and contexts of a block.
    """
    D, H, C = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank
    N, R, V = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    few = min(rows, ROWS)
    widest = max(cfg.intermediate_size, cfg.moe_intermediate_size * (cfg.n_shared_experts or 0))
    x = 5 * rows * D
    heads = rows * ((cfg.q_lora_rank or 0) + 2 * H * (N + R) + 5 * H * R + 3 * H * V)
    block = 5 * max(SCORES, few * H) + 3 * BLOCK * (C + R)
    inside = (H * (N + V) * C if rows > FEW else 0) + few * H * (5 * C + N + V) + block
    swiglu_ = 8 * rows * widest
    tile = max(TILE, D) + rows * max(TILE // min(D, C), 1)
    most = x + max(heads + inside, heads + tile, swiglu_ + tile)
    return 5 * most  # float32, and a quarter for what libraries copy on their way


def rows_within(cfg: Config, nbytes: int) -> int:
    """Return how many rows go through together: the most, up to 512, whose scratch fits; or 0."""
    rows = MOST
    while rows and scratch(cfg, rows) > nbytes:
        rows //= 2
    return rows


@dataclass(frozen=True)
class Request:
    """The options of `--gpu`."""

    vram: int | None = None  # None: 12 GB, or what the card has free
    experts: int = 0
    context: int = CONTEXT
    cache: str = "float32"
    passing: bool = False  # layers are on the card one after another, as a sweep asks for them


class GpuPlan(NamedTuple):
    """A placement: what goes onto the card, and the card, on which nothing is yet."""

    share: Share
    card: "Card"


def _plan_passing(
    cfg: Config, parts: Parts, request: Request, device: Device, budget: int
) -> GpuPlan:
    """Plan for one layer at a time: its caches and scratch grow with the longest prompt."""
    layers: dict[int, int] = {}
    for p in parts.always:
        if p.layer is not None:
            layers[p.layer] = layers.get(p.layer, 0) + p.nbytes + MODULE
    context = min(request.context, cfg.max_position_embeddings)
    layer = max(layers.values()) + _gains(cfg) + 8 * SMALL
    left = budget - layer

    def needed(rows: int) -> int:  # a cache that grows is there twice
        return scratch(cfg, rows) + 3 * parts.cache_bytes(context + rows)

    rows = MOST
    while rows and needed(rows) > left:
        rows //= 2
    if not rows:
        raise InputError(
            f"a budget of {budget / 1e9:.2f} GB: the largest layer takes {layer / 1e9:.2f} GB, and "
            f"computing it for prompts of {context} tokens {needed(1) / 1e9:.2f} GB"
        )
    said = f"on {device.name}: {len(layers)} layers one after another, {rows} rows at a time"
    share = Share(Tier("card", "vram", budget, 1, CARD_RESERVE), (), (), 0, 0, parts.expert)
    return GpuPlan(share, Card(device, budget, context, rows, said=said))


def budget_of(vram: int | None, device: Device) -> int:
    """Return the budget: `--vram`, or 12 GB, or what is free beside libraries, if that is less."""
    free = device.free() - ASIDE
    if vram is not None and vram > free:
        raise InputError(
            f"--vram {vram / 1e9:.2f} GB: {device.name} has {device.total / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB of them free beside what CUDA's libraries take; ask for less"
        )
    return min(VRAM, free) if vram is None else vram


def plan_gpu(cfg: Config, parts: Parts, request: Request, device: Device) -> GpuPlan:
    """Plan what lies on the card; `InputError` if the budget cannot be kept. Nothing is loaded."""
    budget = budget_of(request.vram, device)
    if request.passing:
        return _plan_passing(cfg, parts, request, device, budget)
    number = 2 if request.cache == "bf16" else 4
    context = min(request.context, cfg.max_position_embeddings)
    share = on_card(parts, budget, context, number, request.experts)
    cache = parts.cache_bytes(context, number)
    if not share.layers("attention"):
        least = min(p.nbytes for p in parts.always if p.kind == "attention") + cache + CARD_RESERVE
        raise InputError(
            f"a budget of {budget / 1e9:.2f} GB on the card holds no layer: attention, its cache "
            f"for {context} tokens and {CARD_RESERVE / 1e9:.2f} GB for what is computed need "
            f"{least / 1e9:.2f} GB"
        )
    if request.experts > share.experts:
        raise InputError(
            f"--gpu-experts {request.experts}: beside what every token uses there is room for "
            f"{share.experts}, of {parts.expert / 1e6:.1f} MB each"
        )
    left = budget - share.nbytes - beside(cfg, share)
    rows = rows_within(cfg, left)
    if not rows:
        raise InputError(
            f"{share.nbytes / 1e9:.2f} GB of weights and caches leave {left / 1e9:.2f} GB of the "
            f"card's {budget / 1e9:.2f}, and {scratch(cfg, 1) / 1e9:.2f} GB are needed to compute"
        )
    return GpuPlan(
        share, Card(device, budget, context, rows, request.cache, _describe(parts, share, device))
    )


def beside(cfg: Config, share: Share) -> int:
    """Return how many bytes the share takes at most beyond what it says.

    These are gains in float32, the pool's steps of 512 bytes for each array, and small arrays that
    stay from step to step.
    """
    gains = _gains(cfg) * (len(share.layers("attention")) + 1)
    return MODULE * (len(share.parts) + len(share.caches) + share.experts) + gains + 8 * SMALL


def _gains(cfg: Config) -> int:
    """Return the bytes of a layer's gains in float32."""
    return 4 * (2 * cfg.hidden_size + (cfg.q_lora_rank or 0) + cfg.kv_lora_rank)


def _describe(parts: Parts, share: Share, device: Device) -> str:
    """Return in words what is on the card."""
    kinds = ("attention", "shared experts", "dense mlp", "router")
    of = {kind: sum(p.kind == kind for p in parts.always) for kind in kinds}
    held = [
        f"{kind} of {len(share.layers(kind))} of {of[kind]} layers" for kind in kinds if of[kind]
    ]
    held.append("the head" if share.has("lm_head") else "not the head")
    if share.experts:
        held.append(f"{share.experts} of {parts.all_experts} routed experts")
    return f"on {device.name}, {share.nbytes / 1e9:.2f} GB: {', '.join(held)}"


def facts(card: Card) -> dict[str, Any]:
    """Return what `--json` says of the card."""
    return {
        "device": card.device.name,
        "placement": card.said,
        "context": card.room,
        "rows": card.rows,
        "budget": card.budget,
        "vram_peak": card.device.peak(),
    }


def most_used_experts(use: np.ndarray | None, parts: Parts, count: int) -> dict[int, list[int]]:
    """Return layer → experts: the most used ones or, if nothing is known, as many in each layer."""
    moe = parts.moe_layers
    if use is None or not use.any():
        use = np.zeros((max(moe, default=-1) + 1, parts.experts), np.float32)
        use[list(moe)] = np.arange(parts.experts, 0, -1)
    order = np.argsort(-use, axis=None, kind="stable")
    found: dict[int, list[int]] = {}
    for at in order.tolist():
        layer, e = divmod(at, use.shape[1])
        if count and layer in moe:
            found.setdefault(layer, []).append(e)
            count -= 1
    return found


def upload(
    decoder: Decoder,
    found: GpuPlan,
    own: Mapping[int, Sequence[int]],
    conventions: Conventions | str,
) -> Decoder:
    """Return the decoder with its share on the card: weights go up once, layer by layer."""
    share, card = found
    options = CacheOptions(card.cache == "bf16", card.room, card.rows)
    if not share.parts:
        layers = _Passing(decoder.layers, card)
        nx = engine(card, conventions)
        return replace(decoder, nx=nx, layers=layers, cache_options=options)
    names = {p.name for p in share.parts}
    parts: list[LayerWeights | None] = []
    experts: list[Experts] = []
    kinds = {p.layer: set[str]() for p in share.parts}
    for p in share.parts:
        kinds[p.layer].add(p.kind)
    if isinstance(decoder.layers, list):  # mapped; asking a store would read them
        for i in range(len(decoder.layers)):
            _check_formats(decoder.layers[i] if i in kinds else None)
        _check_formats(decoder.lm_head if "lm_head" in names else None)
    size = share.nbytes - len(share.caches) * share.cache
    with Progress(size, name="to the card") as bar:
        for i in range(decoder.cfg.num_hidden_layers):
            here = frozenset(kinds.get(i, set()))
            held = [p for p in share.parts if p.layer == i]
            if here:
                card.reserve(sum(p.nbytes + MODULE for p in held) + _gains(decoder.cfg))
            mine = _part(decoder.layers[i], here, card) if here else None
            parts.append(mine)
            bar.advance(sum(p.nbytes for p in held))
            there: dict[int, MlpWeights] = {}
            for e in own.get(i, ()):
                card.reserve(share.expert + MODULE)
                there[e] = card.mlp(decoder.experts[i](e))
                bar.advance(share.expert)
            shared = _shared(mine) if "shared experts" in here else None
            up = shared is not None or not decoder.cfg.n_shared_experts
            up = up and "attention" in here
            experts.append(GpuExperts(decoder.experts[i], there, shared, up))
        card.end_reserve()
        head = "lm_head" in names
        norm = card.vector(decoder.norm) if head else decoder.norm
        lm_head = card.matrix(decoder.lm_head) if head else decoder.lm_head
        card.device.wait()
    return replace(
        decoder,
        nx=engine(card, conventions),
        layers=_Layers(decoder.layers, parts),
        experts=experts,
        norm=norm,
        lm_head=lm_head,
        cache_options=options,
    )


def _shared(w: LayerWeights | None) -> MlpWeights | None:
    """Return the shared expert of a layer on the card."""
    return w.mlp.shared_experts if w is not None and isinstance(w.mlp, MoeWeights) else None


def _check_formats(w: Any) -> None:
    """Raise `InputError` for K-quants before anything goes up."""
    if isinstance(w, Coded):
        raise InputError(f"--gpu has no kernel for {w.name}{READS}")
    if isinstance(w, LayerWeights | AttentionWeights | MoeWeights | MlpWeights | Heads):
        for part in w:
            _check_formats(part)


def _part(w: LayerWeights, kinds: frozenset[str], card: Card) -> LayerWeights:
    """Return a layer of the parts that are on the card, with `...` for the others."""
    there = card.layer(w, kinds)
    missing: Any = ...
    attention = "attention" in kinds
    inside: Any
    if isinstance(there.mlp, MoeWeights):
        gate, shared = there.mlp
        bias = np.array(dequantize(gate.e_score_correction_bias))  # the choice is made in memory
        gate = gate._replace(e_score_correction_bias=bias)
        of_all = "shared experts" in kinds or shared is None
        inside = MoeWeights(gate if "router" in kinds else missing, shared if of_all else missing)
    else:
        inside = there.mlp if "dense mlp" in kinds else missing
    return LayerWeights(
        there.input_layernorm if attention else missing,
        there.self_attn if attention else missing,
        there.post_attention_layernorm if attention else missing,
        inside,
    )
