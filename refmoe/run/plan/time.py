"""Predict the time of a token, a prompt and a sweep."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from refmoe.config import Config
from refmoe.files import InputError
from refmoe.run.plan.hardware import Hardware, check_hardware, check_range
from refmoe.run.plan.units import NUMBER_BYTES
from refmoe.weights.checkpoint import read_config
from refmoe.weights.placement import Parts, Placement, Share, Tier, bytes_per_token, place
from refmoe.weights.synthetic.members import MEMBERS, published

WIDEST = math.log(2) / 2  # half the width of a range in log: hi/lo is never above 2
NARROWEST = math.log(1.25)  # nor is a range ever narrower than ±25 %
MOST_CONTEXT = 1 << 31  # tokens


def model_config(config: Path | None = None, member: str | None = None) -> Config:
    """Read a config.json, or return the one that a member was published with.

    Without either it is K2-Thinking's. Raises `InputError` for an unknown member.
    """
    if config is not None:
        return read_config(config)
    name = member or "k2-thinking"
    if name not in MEMBERS:
        raise InputError(f"no member {name!r}; known: {', '.join(MEMBERS)}")
    return Config.from_dict(published(name))


# --- time


class Constants(NamedTuple):
    """The constants of the time law, which `validate.fit` fits to public reports."""

    efficiency: float  # of a data sheet's bandwidth
    socket: float  # of the bandwidth of two sockets, what they have together
    exchange: float  # seconds, between machines
    handover: float  # seconds, from card to memory and back
    compute: float  # of a data sheet's flops
    deviation: float  # of log(reported / predicted) over the reports

    @property
    def half_width(self) -> float:
        """Half the width of a prediction's range, in log: 3 deviations, within limits."""
        return min(max(3 * self.deviation, NARROWEST), WIDEST)

    def range(self, tok_s: float) -> tuple[float, float]:
        """Return the range of a predicted rate: its lower and its upper end."""
        return tok_s * math.exp(-self.half_width), tok_s * math.exp(self.half_width)


class TokenWork(NamedTuple):
    """The work of decoding one token, before any fitted constant enters."""

    seconds: dict[str, float]  # tier → seconds at a data sheet's bandwidth
    divided: frozenset[str]  # tiers whose bandwidth is that of two sockets
    exchanges: int
    handovers: int

    def times(self, c: Constants) -> dict[str, float]:
        """Return the seconds of a token by tier, `link` and `hand-over`."""
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
        """Return the seconds of a token."""
        return sum(self.times(c).values())


@dataclass(frozen=True)
class Placed:
    """A model placed on hardware: `Placed.of` places it, the other methods predict times."""

    parts: Parts
    hardware: Hardware
    placement: Placement
    context: int  # tokens that the caches have room for
    number: int  # bytes of a number in the caches
    hit_rate: float | None = None  # share of the chosen experts that is not read from disk

    @classmethod
    def of(
        cls,
        parts: Parts,
        hardware: Hardware,
        context: int | None = None,
        number: int | None = None,
        hit_rate: float | None = None,
        card_experts: int | None = None,
    ) -> "Placed":
        """Place a model's parts; what is None is as the hardware's description says.

        Raises `InputError` for hardware that cannot be, and for options that do not fit it.
        """
        context = hardware.context if context is None else context
        number = NUMBER_BYTES[hardware.cache] if number is None else number
        card_experts = hardware.card_experts if card_experts is None else card_experts
        check_hardware(hardware)
        check_range("context", context, 1, MOST_CONTEXT)
        tiers = hardware.tiers()
        if hit_rate is not None:
            check_range("hit rate", hit_rate, 0, 1)
            if not any(t.kind == "disk" for t in tiers):
                raise InputError("a hit rate needs a disk that a miss is read from; give one")
        if card_experts is not None and card_experts < 0:
            raise InputError(f"{card_experts} experts on the card, expected a number from 0")
        placement = place(parts, tiers, context, number, card_experts)
        return cls(parts, hardware, placement, context, number, hit_rate)

    def bytes_per_token(self) -> Iterator[tuple[Share, int]]:
        """Yield each tier's share and the bytes that a token reads there, caches half full."""
        depth = self.context // 2
        return bytes_per_token(self.parts, self.placement, depth, self.hit_rate, self.number)

    def work(self) -> TokenWork:
        """Return what decoding one token takes."""
        hw = self.hardware
        seconds = {s.tier.name: n / s.tier.bandwidth for s, n in self.bytes_per_token()}
        divided = {
            s.tier.name
            for s in self.placement.shares
            if s.tier.kind in ("ram", "pmem") and hw.two_sockets
        }
        tensor = 2 * self.parts.layers if hw.split == "tensor" else 1
        exchanges = tensor if hw.boxes > 1 else 0
        return TokenWork(seconds, frozenset(divided), exchanges, self._handovers())

    def _handovers(self) -> int:
        """Count the layers that are partly on a card: each hands its rows over once."""
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
        """Return the seconds that a prompt of so many tokens takes."""
        pairs = zip(self._reading(tokens, c), self._computing(tokens, c), strict=True)
        return sum(map(max, pairs))

    def sweep(self, tokens: int, c: Constants) -> float:
        """Return the seconds of a sweep of so many tokens: each byte is read once, from the
        disk if there is one, and then everything is computed."""
        disk = next((s.tier for s in self.placement.shares if s.tier.kind == "disk"), None)
        return sum(self._reading(tokens, c, disk)) + sum(self._computing(tokens, c))

    def _reading(self, tokens: int, c: Constants, disk: Tier | None = None) -> Iterator[float]:
        """Yield for each tier the seconds of reading what a prompt touches of it, once.

        `disk`: everything is read from there instead.
        """
        touched = 1 - (1 - self.parts.chosen / self.parts.experts) ** tokens
        for s in self.placement.shares:
            weights = sum(min(p.nbytes, tokens * p.read) for p in s.parts)
            two = disk is None and s.tier.kind in ("ram", "pmem") and self.hardware.two_sockets
            bandwidth = (disk or s.tier).bandwidth * c.efficiency * (c.socket if two else 1)
            yield (weights + touched * s.experts * s.expert) / bandwidth

    def _computing(self, tokens: int, c: Constants) -> Iterator[float]:
        """Yield for each tier the seconds of a prompt's products with the weights in it."""
        for s in self.placement.shares:
            numbers = float(sum(p.numbers for p in s.parts if p.kind != "embedding"))
            numbers += self.parts.routed_numbers * s.experts / max(1, self.parts.all_experts)
            flops = 2 * tokens * numbers
            yield flops / (self.hardware.flops(s.tier.kind) * c.compute) if flops else 0.0
