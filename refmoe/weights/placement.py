"""What a model is made of, in bytes, and which part of it lives in which memory.

    always    read for every token: attention, shared experts or dense MLP, router, head
    routed    K of E experts in each MoE layer
    cache     kv_lora_rank + qk_rope_head_dim numbers a token and layer (`model/cache.py`)

K2: 10.55 billion numbers always, 21.14 of 1,014.7 billion routed, 576 in the cache of a layer.

`place` fills the tiers in the order of their speed. All bytes that are read for every token are
worth the same there, so what is filled first is a matter of what belongs together:

    card        the attention of a layer with its cache, layer by layer; the head; the shared
                experts or dense MLP, layer by layer; routers; then routed experts
    memory      the caches of the other layers; what is left, in the same order; then as many
                routed experts as there is room for
    disk        holds the checkpoint: whatever is nowhere else is read from there, and the
                embedding, of which a token reads one row; without a disk that is in memory

A tier keeps its `reserve` free. The result is plain data: `run/plan.py` predicts from it, and what
computes on a card obeys it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import numpy as np

from refmoe.config import Config, OtherScheme
from refmoe.files import InputError
from refmoe.weights.checkpoint import DTYPES, Checkpoint, expected, tensor_class
from refmoe.weights.dense import CLASSES

KINDS = ("vram", "ram", "pmem", "disk")  # fastest first
CARD_RESERVE = 1 << 28  # bytes of a card for what is computed there
TILE = 1 << 26  # bytes of lm_head at once, where it is streamed
Q8_BLOCK = 32, 34  # numbers, bytes


class Part(NamedTuple):
    """Weights that every token uses."""

    name: str  # the module's
    kind: str  # attention, router, shared experts, dense mlp, embedding, head
    layer: int | None
    nbytes: int
    read: int  # bytes of it that one token reads: one row of the embedding, else all
    numbers: int


@dataclass(frozen=True)
class Parts:
    """What a model is made of. A layer's norms count with its attention, the last with the head."""

    always: tuple[Part, ...]
    expert: int  # bytes of the largest routed expert
    expert_numbers: int
    moe_layers: tuple[int, ...]
    experts: int  # E, of a layer
    chosen: int  # K, of a layer and token
    layers: int
    latent: int  # numbers in the cache, of a layer and token

    @classmethod
    def of(cls, cfg: Config, dense: str = "exact") -> "Parts":
        """From the config alone: the checkpoint it calls for, plain weights in bf16.

        Raises `InputError` for a quantisation whose sizes are not known.
        """
        if isinstance(cfg.quantization, OtherScheme):
            raise InputError(
                f"quant_method = {cfg.quantization.quant_method!r}: the sizes of its weights are "
                "not known; known: compressed-tensors pack-quantized (INT4), fp8, and none"
            )
        few = replace(cfg, n_routed_experts=1)  # they are all alike, and 23,040 in K2
        build = _Build(cfg, dense)
        for name, shape, dtypes in expected(few):
            if ".mlp.gate." in name:
                shape = (cfg.n_routed_experts, *shape[1:])
            dtype = dtypes[0]
            if dtype == "BF16" and name.endswith("e_score_correction_bias"):
                dtype = "F32"
            build.add(name, shape, dtype, prod(shape) * np.dtype(DTYPES[dtype]).itemsize)
        return build.parts()

    @property
    def all_experts(self) -> int:
        return self.experts * len(self.moe_layers)

    @property
    def always_numbers(self) -> int:
        """Read for every token, the embedding's row apart."""
        return sum(p.numbers for p in self.always if p.kind != "embedding")

    @property
    def routed_numbers(self) -> int:
        """Of the experts that one token uses."""
        return self.chosen * len(self.moe_layers) * self.expert_numbers

    @property
    def always_bytes(self) -> int:
        return sum(p.read for p in self.always)

    @property
    def routed_bytes(self) -> int:
        return self.chosen * len(self.moe_layers) * self.expert

    @property
    def total_bytes(self) -> int:
        return sum(p.nbytes for p in self.always) + self.all_experts * self.expert

    def with_bits(self, always: float, routed: float) -> "Parts":
        """The same numbers in so many bits each, as other formats have them."""

        def one(p: Part) -> Part:
            nbytes = round(p.numbers * always / 8)
            return p._replace(nbytes=nbytes, read=nbytes * p.read // p.nbytes)

        expert = round(self.expert_numbers * routed / 8)
        return replace(self, always=tuple(map(one, self.always)), expert=expert)

    def cache_bytes(self, context: int, number: int = 4) -> int:
        """Of one layer: `number` bytes each, 4 in float32 and 2 in bf16."""
        return context * self.latent * number


def parts_of(checkpoint: Checkpoint, dense: str = "exact") -> Parts:
    """From the tensors of a folder or a GGUF; `InputError` if some are missing."""
    if checkpoint.missing:
        raise InputError(
            f"{checkpoint.path}: {len(checkpoint.missing)} tensors are missing, first "
            f"{checkpoint.missing[0]}; to plan without them: --config"
        )
    build = _Build(checkpoint.cfg, dense)
    for name, t in checkpoint.tensors.items():
        build.add(name, t.shape, t.dtype, t.nbytes)
    return build.parts()


@dataclass
class _Build:
    """Adds tensors up to parts."""

    cfg: Config
    dense: str
    sizes: dict[tuple[str, str, int | None], list[int]] = field(default_factory=dict)
    experts: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def add(self, name: str, shape: tuple[int, ...], dtype: str, nbytes: int) -> None:
        kind = tensor_class(name, self.cfg)
        if kind == "other":
            return
        scale = name.endswith((".weight_scale", ".weight_shape", ".weight_scale_inv"))
        numbers = 0 if scale else prod(shape) * (8 if name.endswith(".weight_packed") else 1)
        if self.dense == "q8" and kind in CLASSES and "layernorm" not in name:
            nbytes = _in_8_bits(name, shape, dtype, nbytes)
        at = re.match(r"model\.layers\.(\d+)\.", name)
        layer = int(at[1]) if at else None
        if kind == "routed experts":
            e = re.search(r"\.experts\.(\d+)\.", name)
            assert layer is not None
            assert e is not None
            total = self.experts.setdefault((layer, int(e[1])), [0, 0])
        else:
            if kind == "norms":
                kind = "head" if layer is None else "attention"
            total = self.sizes.setdefault((_module(kind, layer), kind, layer), [0, 0])
        total[0] += nbytes
        total[1] += numbers

    def parts(self) -> Parts:
        cfg = self.cfg
        always = [
            Part(name, kind, layer, nbytes, self._read(kind, nbytes), numbers)
            for (name, kind, layer), (nbytes, numbers) in self.sizes.items()
        ]
        expert, numbers = max(self.experts.values(), default=[0, 0])
        return Parts(
            always=tuple(always),
            expert=expert,
            expert_numbers=numbers,
            moe_layers=tuple(i for i in range(cfg.num_hidden_layers) if cfg.is_moe(i)),
            experts=cfg.n_routed_experts,
            chosen=cfg.num_experts_per_tok,
            layers=cfg.num_hidden_layers,
            latent=cfg.kv_lora_rank + cfg.qk_rope_head_dim,
        )

    def _read(self, kind: str, nbytes: int) -> int:
        return nbytes // self.cfg.vocab_size if kind == "embedding" else nbytes


def _module(kind: str, layer: int | None) -> str:
    if layer is None:
        return "model.embed_tokens" if kind == "embedding" else "lm_head"
    last = {
        "attention": "self_attn",
        "router": "mlp.gate",
        "shared experts": "mlp.shared_experts",
        "dense mlp": "mlp",
    }
    return f"model.layers.{layer}.{last[kind]}"


def _in_8_bits(name: str, shape: tuple[int, ...], dtype: str, nbytes: int) -> int:
    """As `dense.dense_q8` has it: in blocks, but where INT4 or without whole groups."""
    if name.endswith("_inv"):
        return 0
    group, block = Q8_BLOCK
    alone = dtype == "I32" or not name.endswith(".weight") or shape[-1] % group
    return nbytes if alone else prod(shape) // group * block


def smallest(parts: Parts) -> int:
    """Bytes of memory with which one token can be computed, the cache apart.

    A layer's choice of experts; and of what streams by, each layer's dense weights and each tile of
    the head, room for two of the largest, one in use and one on its way, beside those that are so
    much larger that it is cheaper to let them stay.
    """
    layers: dict[int, int] = {}
    items = []
    for p in parts.always:
        if p.layer is not None:
            layers[p.layer] = layers.get(p.layer, 0) + p.nbytes
        elif p.kind == "head":
            items += [TILE] * (p.nbytes // TILE) + [p.nbytes % TILE]
    items = sorted([*items, *layers.values(), 0, 0], reverse=True)
    dense = min(sum(items[:stay]) + 2 * items[stay] for stay in range(len(items)))
    return parts.chosen * parts.expert + dense


class Tier(NamedTuple):
    """A memory: bytes, and bytes a second."""

    name: str
    kind: str
    capacity: float
    bandwidth: float
    reserve: float = 0

    @property
    def room(self) -> int:
        return max(0, int(self.capacity - self.reserve))


@dataclass(frozen=True)
class Share:
    """What one tier holds."""

    tier: Tier
    parts: tuple[Part, ...]
    caches: tuple[int, ...]  # layers
    cache: int  # bytes of each
    experts: int  # of all layers together, dealt evenly; the most used ones where it is known
    expert: int  # bytes of each

    @property
    def nbytes(self) -> int:
        weights = sum(p.nbytes for p in self.parts)
        return weights + len(self.caches) * self.cache + self.experts * self.expert

    def layers(self, kind: str) -> tuple[int, ...]:
        """The layers whose part of this kind is here."""
        return tuple(p.layer for p in self.parts if p.kind == kind and p.layer is not None)

    def has(self, name: str) -> bool:
        """Whether this module's weights are here."""
        return any(p.name == name for p in self.parts)


@dataclass(frozen=True)
class Placement:
    """Where everything lives. `homeless`: bytes that have no place. `needed`: of memory that is
    missing for a stream from disk."""

    shares: tuple[Share, ...]
    homeless: int
    needed: int

    @property
    def fits(self) -> bool:
        return not self.homeless and not self.needed

    def on(self, kind: str) -> Share | None:
        """The share of the first tier of a kind."""
        return next((s for s in self.shares if s.tier.kind == kind), None)


def place(
    parts: Parts,
    tiers: Sequence[Tier],
    context: int,
    number: int = 4,
    card_experts: int | None = None,
) -> Placement:
    """The tiers filled, fastest first.

    context       tokens that the caches have room for, `number` bytes a number
    card_experts  the most routed experts a card takes; default: as many as fit
    """
    cache = parts.cache_bytes(context, number)
    weights = [p for kind in _ORDER for p in parts.always if p.kind == kind]
    caches, experts = list(range(parts.layers)), parts.all_experts
    memory = [t for t in tiers if t.kind in ("ram", "pmem")]
    streamed = any(t.kind == "disk" for t in tiers)
    shares, needed = [], 0
    for tier in sorted(tiers, key=lambda t: KINDS.index(t.kind)):
        room = tier.room
        mine: list[Part] = []
        held: list[int] = []
        count = 0
        if tier.kind == "vram":
            for p in list(weights):
                with_cache = p.kind == "attention"
                size = p.nbytes + (cache if with_cache else 0)
                if size > room or (p.kind == "embedding" and (memory or streamed)):
                    continue
                room -= size
                mine.append(p)
                weights.remove(p)
                if with_cache and p.layer is not None:
                    held.append(p.layer)
                    caches.remove(p.layer)
            most = experts if card_experts is None else min(experts, card_experts)
            count = 0 if weights and not memory else min(most, _fitting(room, parts.expert))
        elif tier.kind in ("ram", "pmem"):
            fitting = min(len(caches), _fitting(room, cache))
            held, caches = caches[:fitting], caches[fitting:]
            room -= fitting * cache
            stay = [p for p in weights if not streamed or p.kind != "embedding"]
            least = sum(p.nbytes for p in stay) + parts.chosen * parts.expert
            if streamed and tier is memory[-1] and least > room:  # dense weights stream, too
                needed = max(0, smallest(parts) - room)
                room -= smallest(parts)
                count = min(experts, parts.chosen)
            for p in stay:
                if p.nbytes <= room:
                    room -= p.nbytes
                    mine.append(p)
                    weights.remove(p)
            count = count or min(experts, _fitting(room, parts.expert))
        else:
            mine, weights = weights, []
            count = experts
        experts -= count
        shares.append(Share(tier, tuple(mine), tuple(held), cache, count, parts.expert))
    if streamed and not memory:
        needed = smallest(parts)
    homeless = sum(p.nbytes for p in weights) + len(caches) * cache + experts * parts.expert
    return Placement(tuple(shares), homeless, needed)


def on_card(
    parts: Parts, vram: float, context: int, number: int = 4, card_experts: int | None = None
) -> Share:
    """What a card of so many bytes holds, as `place` decides, with memory enough behind it."""
    tiers = Tier("card", "vram", vram, 1, CARD_RESERVE), Tier("memory", "ram", 1e18, 1)
    share = place(parts, tiers, context, number, card_experts).on("vram")
    assert share is not None
    return share


_ORDER = ("attention", "head", "shared experts", "dense mlp", "router", "embedding")


def _fitting(room: int, size: int) -> int:
    return max(0, room) // size if size else 1 << 62


def traffic(
    parts: Parts, placement: Placement, depth: int, hit_rate: float | None = None, number: int = 4
) -> Iterator[tuple[Share, int]]:
    """Bytes that one token reads from each tier, with `depth` tokens in the caches.

    Without a hit rate the router is taken to be uniform: a tier is asked for as large a share of
    the choice as it holds of all experts. `hit_rate` is the share that is not read from disk.
    """
    above = sum(s.experts for s in placement.shares if s.tier.kind != "disk")
    chosen = parts.chosen * len(parts.moe_layers)
    for s in placement.shares:
        part = s.experts / parts.all_experts if parts.all_experts else 0.0
        if hit_rate is not None and s.experts:
            disk = s.tier.kind == "disk"
            part = 1 - hit_rate if disk else hit_rate * s.experts / above
        caches = len(s.caches) * parts.cache_bytes(depth, number)
        routed = part * chosen * parts.expert
        yield s, sum(p.read for p in s.parts) + caches + round(routed)
