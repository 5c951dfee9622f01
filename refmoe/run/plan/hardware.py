"""Describe hardware: memories, processors, cards, disks."""

import importlib.resources
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from refmoe.files import InputError, parse_size
from refmoe.run.plan.units import NUMBER, rate
from refmoe.weights.placement import (
    CARD_RESERVE,
    KINDS,
    Tier,
)

MEASURED = 0.8  # of a data sheet's bandwidth, what reading reaches at best
WIDEST = math.log(2) / 2
NARROWEST = math.log(1.25)
CORE_GFLOPS = 96.0  # two fused multiply-adds of 8 lanes at 3 GHz
CARD_FLOPS_PER_BYTE = 35.0  # of a card that does not say: an RTX 3060 has 35, a PRO 6000 70
SPLITS = ("tensor", "pipeline")
RAM, DISK, VRAM = 50e9, 3.5e9, 360e9  # bytes a second where flags give none


# --- hardware


class Memory(NamedTuple):
    """One tier of one machine, as described."""

    name: str
    kind: str
    capacity: float  # bytes, of each
    bandwidth: float  # bytes a second, of each
    measured: bool = False
    pieces: int = 1  # cards
    together: bool = True  # several cards read at the same time
    reserve: float = 0.0  # of each
    tflops: float | None = None  # of each


@dataclass(frozen=True)
class Machine:
    tiers: tuple[Memory, ...]
    cores: int
    sockets: int = 1
    core_gflops: float = CORE_GFLOPS
    count: int = 1  # machines like this


@dataclass(frozen=True)
class Hardware:
    name: str
    machines: tuple[Machine, ...]
    split: str = "pipeline"
    dense: str = "exact"
    cache: str = "float32"
    context: int = 8192
    card_experts: int | None = None  # the most that a card takes; None: as many as fit
    notes: tuple[str, ...] = ()

    @property
    def boxes(self) -> int:
        return sum(m.count for m in self.machines)

    @property
    def two_sockets(self) -> bool:
        return any(m.sockets > 1 for m in self.machines)

    def tiers(self) -> list[Tier]:
        """What all machines have, kind by kind, in data sheets' bandwidth."""
        out: list[Tier] = []
        for kind in KINDS:
            each = [(t, m.count) for m in self.machines for t in m.tiers if t.kind == kind]
            if not each:
                continue
            capacity = sum(n * t.pieces * t.capacity for t, n in each)
            reserve = sum(n * t.pieces * t.reserve for t, n in each)
            name = " + ".join(f"{n} x {t.name}" if n > 1 else t.name for t, n in each)
            name = f"{name} ({kind})" if any(t.name == name for t in out) else name
            out.append(Tier(name, kind, capacity, self._joined(each, _bandwidth), reserve))
        return out

    def flops(self, kind: str) -> float:
        """Of the cards for vram, else of the cores."""
        if kind != "vram":
            each = [m.count * m.cores * m.core_gflops * 1e9 for m in self.machines]
            return sum(each) if self.split == "tensor" else sum(each) / self.boxes
        cards = [(t, m.count) for m in self.machines for t in m.tiers if t.kind == "vram"]
        return self._joined(cards, _flops)

    def _joined(self, each: Sequence[tuple[Memory, int]], of: Callable[[Memory], float]) -> float:
        """Rates of machines that work at the same time, as fast as the slowest; or in turn."""
        if self.split == "tensor":
            return sum(n for _, n in each) * min(of(t) for t, _ in each)
        whole = sum(n * t.pieces * t.capacity for t, n in each)
        return whole / sum(n * t.pieces * t.capacity / of(t) for t, n in each)


def _bandwidth(t: Memory) -> float:
    return t.bandwidth * (t.pieces if t.together else 1) / (MEASURED if t.measured else 1)


def _flops(t: Memory) -> float:
    one = CARD_FLOPS_PER_BYTE * t.bandwidth if t.tflops is None else t.tflops * 1e12
    return one * (t.pieces if t.together else 1)


class _Table:
    """A TOML table whose every key is asked for; what nobody asked for is an error."""

    def __init__(self, raw: Any, where: str):
        if not isinstance(raw, dict):
            raise InputError(f"{where}: {raw!r}, expected a table")
        self.raw, self.where = dict(raw), where

    def text(self, key: str, default: str | None = None, among: Sequence[str] = ()) -> str:
        value = self._take(key, default)
        if not isinstance(value, str) or (among and value not in among):
            raise InputError(
                f"{self.where}: {key} = {value!r}, expected "
                f"{'one of ' + ', '.join(among) if among else 'a text'}"
            )
        return value

    def number(self, key: str, default: float, most: float = 1e18) -> float:
        value = self._take(key, default)
        right = isinstance(value, int | float) and not isinstance(value, bool)
        if not right or not 0 <= value <= most:
            raise InputError(f"{self.where}: {key} = {value!r}, expected a number from 0")
        return float(value)

    def whole(self, key: str, default: int, least: int = 1) -> int:
        value = self._take(key, default)
        if type(value) is not int or not least <= value <= 1_000_000:
            raise InputError(
                f"{self.where}: {key} = {value!r}, expected a whole number from {least}"
            )
        return value

    def pair(self, key: str) -> tuple[float, float]:
        value = self._take(key, None)
        if not isinstance(value, list) or len(value) != 2 or not all(v > 0 for v in value):
            raise InputError(f"{self.where}: {key} = {value!r}, expected two numbers above 0")
        return float(value[0]), float(value[1])

    def flag(self, key: str, default: bool) -> bool:
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {key} = {value!r}, expected true or false")
        return value

    def tables(self, key: str) -> list["_Table"]:
        value = self._take(key, None)
        if not isinstance(value, list) or not value:
            raise InputError(f"{self.where}: {key}: expected at least one table")
        return [_Table(v, f"{self.where}: {key} {i + 1}") for i, v in enumerate(value)]

    def done(self, known: str) -> None:
        if self.raw:
            raise InputError(f"{self.where}: {next(iter(self.raw))!r} is not known here; {known}")

    def _take(self, key: str, default: Any) -> Any:
        value = self.raw.pop(key, default)
        if value is None:
            raise InputError(f"{self.where}: {key} is missing")
        return value


def read_hardware(text: str, where: str) -> Hardware:
    """A description in TOML.

        split = "tensor"                      # or "pipeline": several machines
        [[machine]]
        cores = 12                            # also: sockets, core_gflops, count
        tiers = [
            { name = "RTX 3060", kind = "vram", capacity = "12GB", bandwidth = "360GB/s" },
            { name = "DDR4", kind = "ram", capacity = "192GB", bandwidth = "128GB/s" },
        ]

    A tier may also have measured, count, together, reserve and tflops; the file dense, cache,
    context and card_experts. Raises `InputError`, which says what was expected.
    """
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise InputError(f"{where}: not TOML ({e})") from None
    table = _Table(raw, where)
    found = Hardware(
        Path(where).stem,
        tuple(_machine(m) for m in table.tables("machine")),
        table.text("split", "pipeline", SPLITS),
        table.text("dense", "exact", ("exact", "q8")),
        table.text("cache", "float32", tuple(NUMBER)),
        table.whole("context", 8192),
        table.whole("card_experts", 0, 0) if "card_experts" in raw else None,
    )
    table.done("known: split, dense, cache, context, card_experts, machine")
    return found


def _machine(m: _Table) -> Machine:
    tiers = []
    for t in m.tables("tiers"):
        kind = t.text("kind", among=KINDS)
        default = f"{CARD_RESERVE}B" if kind == "vram" else "0.0B"
        reserve = t.text("reserve", default)
        tiers.append(
            Memory(
                t.text("name", kind),
                kind,
                parse_size(t.text("capacity"), f"{t.where}: capacity"),
                rate(t.text("bandwidth"), f"{t.where}: bandwidth"),
                t.flag("measured", False),
                t.whole("count", 1),
                t.flag("together", True),
                parse_size(reserve, f"{t.where}: reserve") if reserve != "0.0B" else 0.0,
                t.number("tflops", 0) or None,
            )
        )
        t.done("known: name, kind, capacity, bandwidth, measured, count, together, reserve, tflops")
    if len({t.kind for t in tiers}) < len(tiers):
        raise InputError(f"{m.where}: two tiers of one kind; give one with a count")
    out = Machine(
        tuple(tiers),
        m.whole("cores", 8),
        m.whole("sockets", 1),
        m.number("core_gflops", CORE_GFLOPS),
        m.whole("count", 1),
    )
    if out.core_gflops <= 0:
        raise InputError(f"{m.where}: core_gflops = 0, expected a number above 0")
    m.done("known: tiers, cores, sockets, core_gflops, count")
    return out


def _data(name: str) -> str:
    return (importlib.resources.files("refmoe.run.plan") / name).read_text("utf-8")
