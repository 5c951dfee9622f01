"""Predict the time of a token, a prompt and a sweep."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.run.plan.hardware import NARROWEST, WIDEST, Hardware
from refmoe.run.plan.units import NUMBER
from refmoe.weights.placement import (
    Parts,
    Placement,
    Share,
    Tier,
    place,
    traffic,
)
from refmoe.weights.synthetic.members import MEMBERS, published

# --- the model


def model_config(config: Path | None = None, member: str | None = None) -> Config:
    """Of a config.json, or of a member as it was published; by default K2-Thinking."""
    if config is not None:
        return Config.load(config)
    name = member or "k2-thinking"
    if name not in MEMBERS:
        raise InputError(f"no member {name!r}; known: {', '.join(MEMBERS)}")
    return Config.from_dict(published(name))


# --- time


class Constants(NamedTuple):
    """What is fitted. `deviation` is of log(reported / predicted)."""

    efficiency: float  # of a data sheet's bandwidth
    socket: float  # of the bandwidth of two sockets, what they have together
    exchange: float  # seconds, between machines
    handover: float  # seconds, from card to memory and back
    compute: float  # of a data sheet's flops
    deviation: float

    @property
    def half_width(self) -> float:
        """Of the range, in log."""
        return min(max(3 * self.deviation, NARROWEST), WIDEST)

    def range(self, tok_s: float) -> tuple[float, float]:
        return tok_s * math.exp(-self.half_width), tok_s * math.exp(self.half_width)


class Work(NamedTuple):
    """Of one token, before anything is fitted."""

    seconds: dict[str, float]  # of each tier, at a data sheet's bandwidth
    divided: frozenset[str]  # tiers whose bandwidth is that of two sockets
    exchanges: int
    handovers: int

    def times(self, c: Constants) -> dict[str, float]:
        """Seconds of a token by tier, link and hand-over."""
        out = {
            name: s / c.efficiency / (c.socket if name in self.divided else 1)
            for name, s in self.seconds.items()
        }
        if self.exchanges:
            out["link"] = self.exchanges * c.exchange
        if self.handovers:
            out["hand-over"] = self.handovers * c.handover
        return out

    def total(self, c: Constants) -> float:
        return sum(self.times(c).values())


@dataclass(frozen=True)
class Case:
    """A model on hardware, placed."""

    parts: Parts
    hardware: Hardware
    placement: Placement
    context: int
    number: int  # bytes of a number in the caches
    hit_rate: float | None = None

    @classmethod
    def of(
        cls,
        parts: Parts,
        hardware: Hardware,
        context: int | None = None,
        number: int | None = None,
        hit_rate: float | None = None,
        card_experts: int | None = None,
    ) -> "Case":
        context = context or hardware.context
        number = number or NUMBER[hardware.cache]
        card_experts = hardware.card_experts if card_experts is None else card_experts
        tiers = hardware.tiers()
        if hit_rate is not None and not any(t.kind == "disk" for t in tiers):
            raise InputError("a hit rate needs a disk that a miss is read from; give one")
        if card_experts is not None and card_experts < 0:
            raise InputError(f"{card_experts} experts on the card, expected a number from 0")
        placement = place(parts, tiers, context, number, card_experts)
        return cls(parts, hardware, placement, context, number, hit_rate)

    def traffic(self) -> Iterator[tuple[Share, int]]:
        """Bytes a token, with the caches half full."""
        depth = self.context // 2
        return traffic(self.parts, self.placement, depth, self.hit_rate, self.number)

    def work(self) -> Work:
        hw = self.hardware
        seconds = {s.tier.name: n / s.tier.bandwidth for s, n in self.traffic()}
        divided = {
            s.tier.name
            for s in self.placement.shares
            if s.tier.kind in ("ram", "pmem") and hw.two_sockets
        }
        tensor = 2 * self.parts.layers if hw.split == "tensor" else 1
        exchanges = tensor if hw.boxes > 1 else 0
        return Work(seconds, frozenset(divided), exchanges, self._handovers())

    def _handovers(self) -> int:
        """Layers that are partly on a card."""
        card = self.placement.on("vram")
        if card is None:
            return 0
        here = [p for p in card.parts if p.layer is not None]
        begun = {p.layer for p in here}
        sizes = {i: 0 for i in begun}
        for p in here:
            sizes[p.layer] += 1
        whole = {i: sum(p.layer == i for p in self.parts.always) for i in begun}
        missing = card.experts < self.parts.all_experts
        moe = set(self.parts.moe_layers)
        return sum(sizes[i] < whole[i] or (missing and i in moe) for i in begun)

    def prompt(self, tokens: int, c: Constants) -> float:
        """Seconds of a prompt."""
        pairs = zip(self._reading(tokens, c), self._computing(tokens, c), strict=True)
        return sum(map(max, pairs))

    def sweep(self, tokens: int, c: Constants) -> float:
        """Seconds in which so many tokens go through, each byte read once."""
        disk = next((s.tier for s in self.placement.shares if s.tier.kind == "disk"), None)
        return sum(self._reading(tokens, c, disk)) + sum(self._computing(tokens, c))

    def _reading(self, tokens: int, c: Constants, disk: Tier | None = None) -> Iterator[float]:
        """Seconds of each tier: the weights that a prompt touches, once."""
        touched = 1 - (1 - self.parts.chosen / self.parts.experts) ** tokens
        for s in self.placement.shares:
            weights = sum(min(p.nbytes, tokens * p.read) for p in s.parts)
            two = disk is None and s.tier.kind in ("ram", "pmem") and self.hardware.two_sockets
            bandwidth = (disk or s.tier).bandwidth * c.efficiency * (c.socket if two else 1)
            yield (weights + touched * s.experts * s.expert) / bandwidth

    def _computing(self, tokens: int, c: Constants) -> Iterator[float]:
        """Seconds of each tier's weights."""
        for s in self.placement.shares:
            numbers = float(sum(p.numbers for p in s.parts if p.kind != "embedding"))
            numbers += self.parts.routed_numbers * s.experts / max(1, self.parts.all_experts)
            flops = 2 * tokens * numbers
            yield flops / (self.hardware.flops(s.tier.kind) * c.compute) if flops else 0.0
