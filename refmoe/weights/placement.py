"""Say what a model is made of, in bytes, and which part of it lives in which memory.

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

A tier keeps its `reserve` free. The result is plain data: `run/plan` predicts times from it, and
`fast/gpu` puts on a card what it says.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.model.formats.registry import supported_methods, unknown_method
from refmoe.weights.checkpoint import (
    DTYPES,
    Checkpoint,
    count_numbers,
    expected,
    format_of_part,
    tensor_class,
)
from refmoe.weights.dense import CLASSES

KINDS = ("vram", "ram", "pmem", "disk")  # fastest first
CARD_RESERVE = 1 << 28  # bytes of a card for what is computed there
TILE = 1 << 26  # bytes of lm_head at once, where it is streamed
Q8_BLOCK = 32, 34  # numbers of a block of 8-bit weights, and its bytes


class Part(NamedTuple):
    """The weights of one module that every token uses."""

    name: str  # of the module, as self_attn of a layer
    kind: str  # attention, router, shared experts, dense mlp, embedding, head
    layer: int | None
    nbytes: int
    read: int  # bytes of it that one token reads: one row of the embedding, else all
    numbers: int


@dataclass(frozen=True)
class Parts:
    """The parts that a model is made of, in bytes and numbers.

    A layer's norms count with its attention, and the last norm with the head.
    """

    always: tuple[Part, ...]
    expert: int  # bytes of the largest routed expert
    expert_numbers: int
    moe_layers: tuple[int, ...]
    experts: int  # E, of a layer
    chosen: int  # K, of a layer and token
    layers: int
    latent: int  # numbers in the cache of a layer and token

    @classmethod
    def of(cls, cfg: Config, dense: str = "exact") -> "Parts":
        """Return the parts of the checkpoint that a config calls for, plain weights in bf16.

        dense  exact, or q8: 8-bit weights for what every token uses. Raises `InputError` for a
        quantisation whose sizes are not known.
        """
        if (method := unknown_method(cfg.quantization)) is not None:
            raise InputError(
                f"quant_method = {method!r}: the sizes of its weights are "
                f"not known; known: {supported_methods()}"
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
        """How many routed experts there are in all layers."""
        return self.experts * len(self.moe_layers)

    @property
    def always_numbers(self) -> int:
        """How many numbers every token uses, without its row of the embedding."""
        return sum(p.numbers for p in self.always if p.kind != "embedding")

    @property
    def routed_numbers(self) -> int:
        """How many numbers the routed experts have that one token uses."""
        return self.chosen * len(self.moe_layers) * self.expert_numbers

    @property
    def always_bytes(self) -> int:
        """The bytes that every token reads, its row of the embedding included."""
        return sum(p.read for p in self.always)

    @property
    def routed_bytes(self) -> int:
        """The bytes of the routed experts that one token uses."""
        return self.chosen * len(self.moe_layers) * self.expert

    @property
    def total_bytes(self) -> int:
        """The bytes of all weights."""
        return sum(p.nbytes for p in self.always) + self.all_experts * self.expert

    def with_bits(self, always: float, routed: float) -> "Parts":
        """Return parts with so many bits a number, as another format has them."""

        def one(p: Part) -> Part:
            nbytes = round(p.numbers * always / 8)
            return p._replace(nbytes=nbytes, read=nbytes * p.read // p.nbytes)

        expert = round(self.expert_numbers * routed / 8)
        return replace(self, always=tuple(map(one, self.always)), expert=expert)

    def cache_bytes(self, context: int, number: int = 4) -> int:
        """Return the bytes of one layer's cache: `number` bytes each, 4 in float32, 2 in bf16."""
        return context * self.latent * number


def count_parts(checkpoint: Checkpoint, dense: str = "exact") -> Parts:
    """Return the parts of a checkpoint, from its tensors. Raises `InputError` if some are missing.

    dense  exact, or q8: 8-bit weights for what every token uses
    """
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
    """Adds tensors up to `Parts`."""

    cfg: Config
    dense: str
    sizes: dict[tuple[str, str, int | None], list[int]] = field(default_factory=dict)
    experts: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def add(self, name: str, shape: tuple[int, ...], dtype: str, nbytes: int) -> None:
        """Add a tensor to the part that it belongs to."""
        kind = tensor_class(name, self.cfg)
        if kind == "other":
            return
        numbers = count_numbers(self.cfg, name, dtype, shape)
        if self.dense == "q8" and kind in CLASSES and "layernorm" not in name:
            form = format_of_part(self.cfg, name, dtype)
            if form is None or (form.eight_bits and numbers):
                nbytes = _in_8_bits(name, shape, dtype, nbytes)
            elif form.eight_bits:  # scales go with the codes that are replaced
                nbytes = 0
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
        """Return the parts of the tensors added."""
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
    """Return the name of the module that a kind of weights is in."""
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
    """Return a tensor's bytes as `dense_q8` holds it: in blocks, if it has whole groups."""
    group, block = Q8_BLOCK
    alone = dtype == "I32" or not name.endswith(".weight") or shape[-1] % group
    return nbytes if alone else prod(shape) // group * block


def smallest_budget(parts: Parts) -> int:
    """Return the bytes of memory with which one token can be computed, without the caches.

    They hold a layer's choice of experts; and, of what streams by (each layer's dense weights, each
    tile of the head), two of the largest, one in use and one on its way, beside those that are so
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
    """A memory that weights may live in."""

    name: str
    kind: str  # one of KINDS
    capacity: float  # bytes
    bandwidth: float  # bytes a second
    reserve: float = 0  # bytes that are kept free

    @property
    def room(self) -> int:
        """The bytes that may be filled."""
        return max(0, int(self.capacity - self.reserve))


@dataclass(frozen=True)
class Share:
    """The part of a model that one tier holds."""

    tier: Tier
    parts: tuple[Part, ...]
    caches: tuple[int, ...]  # the layers whose caches are here
    cache: int  # bytes of each cache
    experts: int  # of all layers together, dealt evenly; the most used ones if those are known
    expert: int  # bytes of each expert

    @property
    def nbytes(self) -> int:
        """The bytes of all this."""
        weights = sum(p.nbytes for p in self.parts)
        return weights + len(self.caches) * self.cache + self.experts * self.expert

    def layers(self, kind: str) -> tuple[int, ...]:
        """Return the layers whose part of this kind is here."""
        return tuple(p.layer for p in self.parts if p.kind == kind and p.layer is not None)

    def has(self, name: str) -> bool:
        """Return whether this module's weights are here."""
        return any(p.name == name for p in self.parts)


@dataclass(frozen=True)
class Placement:
    """A model divided among tiers."""

    shares: tuple[Share, ...]
    homeless: int  # bytes that have no place
    needed: int  # bytes of memory that a stream from disk would need in addition

    @property
    def fits(self) -> bool:
        """Whether everything has a place, and what streams has room to."""
        return not self.homeless and not self.needed

    def on(self, kind: str) -> Share | None:
        """Return the share of the first tier of a kind, or None if there is no such tier."""
        return next((s for s in self.shares if s.tier.kind == kind), None)


def place(
    parts: Parts,
    tiers: Sequence[Tier],
    context: int,
    number: int = 4,
    card_experts: int | None = None,
) -> Placement:
    """Fill the tiers, fastest first.

    context       tokens that the caches have room for, `number` bytes a number
    card_experts  the most routed experts that a card takes; None: as many as fit
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
                needed = max(0, smallest_budget(parts) - room)
                room -= smallest_budget(parts)
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
        needed = smallest_budget(parts)
    homeless = sum(p.nbytes for p in weights) + len(caches) * cache + experts * parts.expert
    return Placement(tuple(shares), homeless, needed)


def on_card(
    parts: Parts, vram: float, context: int, number: int = 4, card_experts: int | None = None
) -> Share:
    """Return what a card of `vram` bytes holds, as `place` decides with memory enough behind it."""
    tiers = Tier("card", "vram", vram, 1, CARD_RESERVE), Tier("memory", "ram", 1e18, 1)
    share = place(parts, tiers, context, number, card_experts).on("vram")
    assert share is not None
    return share


_ORDER = ("attention", "head", "shared experts", "dense mlp", "router", "embedding")


def _fitting(room: int, size: int) -> int:
    """Return how many things of a size fit into so much room; of nothing, any number."""
    return max(0, room) // size if size else 1 << 62


def bytes_per_token(
    parts: Parts, placement: Placement, depth: int, hit_rate: float | None = None, number: int = 4
) -> Iterator[tuple[Share, int]]:
    """Yield each share with the bytes that one token reads there, `depth` tokens in the caches.

    hit_rate  the share of the chosen experts that is not read from disk. None: the router is taken
              to be uniform, so that a tier is asked for as large a share of the choice as it holds
              of all experts
    number    bytes of a number in the caches
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
