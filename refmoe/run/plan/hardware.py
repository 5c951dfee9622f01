"""Describe hardware: its memories, cards and disks, the machines they are in, and TOML for both."""

import importlib.resources
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from refmoe.files import SIZE_LIMIT, InputError, parse_size
from refmoe.run.plan.units import NUMBER_BYTES, parse_rate
from refmoe.weights.placement import CARD_RESERVE, KINDS, Tier

MEASURED = 0.8  # share of a data sheet's bandwidth that reading reaches at best
CORE_GFLOPS = 96.0  # of one core: two fused multiply-adds of 8 lanes at 3 GHz
CARD_FLOPS_PER_BYTE = 35.0  # of a card that does not say: an RTX 3060 has 35, a PRO 6000 70
SPLITS = ("tensor", "pipeline")  # each layer split between machines, or layers dealt to them
RAM, DISK, VRAM, PMEM = 50e9, 3.5e9, 360e9, 39e9  # bytes a second where flags give none

# What a description may say. Beyond these limits it is a slip (a unit left out), and the formulas
# would divide by nothing.
LEAST_SIZE = 1e6  # bytes
LEAST_RATE = 1e6  # bytes a second
MOST_RATE = 1e18  # bytes a second
MOST_COUNT = 1_000_000  # cores, sockets, cards, machines
MOST_GFLOPS = 1e9  # of one core


class Memory(NamedTuple):
    """One tier of one machine, as somebody described it."""

    name: str
    kind: str  # one of KINDS
    capacity: float  # bytes, of each piece
    bandwidth: float  # bytes a second, of each piece
    measured: bool = False  # the bandwidth was measured; False: it is a data sheet's
    pieces: int = 1  # cards
    together: bool = True  # several cards read at the same time
    reserve: float = 0.0  # bytes of each piece that are kept free
    tflops: float | None = None  # 10¹² products and sums a second, of each piece


@dataclass(frozen=True)
class Machine:
    """A machine: its memories and its processor's cores."""

    tiers: tuple[Memory, ...]
    cores: int
    sockets: int = 1
    core_gflops: float = CORE_GFLOPS  # 10⁹ products and sums a second, of each core
    count: int = 1  # machines like this


@dataclass(frozen=True)
class Hardware:
    """One or several machines, and how they are used."""

    name: str
    machines: tuple[Machine, ...]
    split: str = "pipeline"  # one of SPLITS
    dense: str = "exact"  # or q8: 8-bit weights for what every token uses
    cache: str = "float32"  # one of NUMBER_BYTES
    context: int = 8192  # tokens
    card_experts: int | None = None  # the most that a card takes; None: as many as fit
    notes: tuple[str, ...] = ()

    @property
    def boxes(self) -> int:
        """How many machines there are."""
        return sum(m.count for m in self.machines)

    @property
    def two_sockets(self) -> bool:
        """Whether some machine has more than one socket."""
        return any(m.sockets > 1 for m in self.machines)

    def tiers(self) -> list[Tier]:
        """Return the memories of all machines added up kind by kind, fastest kind first.

        Bandwidths are a data sheet's: a measured one is divided by `MEASURED`.
        """
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
        """Return the flops a second that compute with weights in a tier of this kind.

        They are the cards' for vram and the cores' for all others.
        """
        if kind != "vram":
            each = [m.count * m.cores * m.core_gflops * 1e9 for m in self.machines]
            return sum(each) if self.split == "tensor" else sum(each) / self.boxes
        cards = [(t, m.count) for m in self.machines for t in m.tiers if t.kind == "vram"]
        return self._joined(cards, _flops)

    def _joined(self, each: Sequence[tuple[Memory, int]], of: Callable[[Memory], float]) -> float:
        """Join the rates of machines: at the same time, as fast as the slowest; or in turn."""
        if self.split == "tensor":
            return sum(n for _, n in each) * min(of(t) for t, _ in each)
        whole = sum(n * t.pieces * t.capacity for t, n in each)
        return whole / sum(n * t.pieces * t.capacity / of(t) for t, n in each)


def _bandwidth(t: Memory) -> float:
    return t.bandwidth * (t.pieces if t.together else 1) / (MEASURED if t.measured else 1)


def _flops(t: Memory) -> float:
    one = CARD_FLOPS_PER_BYTE * t.bandwidth if t.tflops is None else t.tflops * 1e12
    return one * (t.pieces if t.together else 1)


# --- limits


def check_hardware(hardware: Hardware) -> None:
    """Raise `InputError` for numbers that no machine has, as a size whose unit was left out."""
    if not any(m.tiers for m in hardware.machines):
        raise InputError(
            f"{hardware.name}: no memory is described; give --ram SIZE, --preset NAME or --hardware"
        )
    for m in hardware.machines:
        for what, number in (("cores", m.cores), ("sockets", m.sockets), ("count", m.count)):
            check_count(f"{hardware.name}: {what}", number)
        check_range(f"{hardware.name}: core_gflops", m.core_gflops, 1e-3, MOST_GFLOPS)
        for t in m.tiers:
            where = f"{hardware.name}: {t.name}"
            check_size(f"{where}: capacity", t.capacity)
            check_range(f"{where}: bandwidth", t.bandwidth, LEAST_RATE, 1e3 * MOST_RATE)
            check_range(f"{where}: reserve", t.reserve, 0, SIZE_LIMIT)
            check_count(f"{where}: count", t.pieces)
            if t.tflops is not None:
                check_range(f"{where}: tflops", t.tflops, 1e-3, 1e9)


def check_size(what: str, nbytes: float) -> None:
    """Raise `InputError` unless it is a size that a memory can have."""
    check_range(what, nbytes, LEAST_SIZE, SIZE_LIMIT, "1MB or more; write the unit, like 64GB")


def check_rate(what: str, rate: float) -> None:
    """Raise `InputError` unless it is a rate, in bytes a second, that a memory can have."""
    check_range(what, rate, LEAST_RATE, MOST_RATE, "1MB/s or more; write the unit, like 50GB/s")


def check_count(what: str, number: float) -> None:
    """Raise `InputError` unless there can be so many cores, sockets, cards or machines."""
    check_range(what, number, 1, MOST_COUNT)


def check_range(what: str, value: float, least: float, most: float, expected: str = "") -> None:
    """Raise `InputError` unless least <= value <= most; nan is outside every range."""
    if not least <= value <= most:
        raise InputError(f"{what} = {value:g}, expected {expected or f'{least:g} to {most:g}'}")


# --- TOML


class Table:
    """A TOML table of which each key is taken once; a key that nobody took is an error.

    Every method raises `InputError`, which says where the table is and what was expected.
    """

    def __init__(self, raw: Any, where: str):
        if not isinstance(raw, dict):
            raise InputError(f"{where}: {raw!r}, expected a table")
        self.raw, self.where = dict(raw), where

    def text(self, key: str, default: str | None = None, among: Sequence[str] = ()) -> str:
        """Take a text, one of `among` if those are given."""
        value = self._take(key, default)
        if not isinstance(value, str) or (among and value not in among):
            raise InputError(
                f"{self.where}: {key} = {value!r}, expected "
                f"{'one of ' + ', '.join(among) if among else 'a text'}"
            )
        return value

    def number(self, key: str, default: float, most: float = 1e18) -> float:
        """Take a number from 0 to `most`."""
        value = self._take(key, default)
        right = isinstance(value, int | float) and not isinstance(value, bool)
        if not right or not 0 <= value <= most:
            raise InputError(f"{self.where}: {key} = {value!r}, expected a number from 0")
        return float(value)

    def whole(self, key: str, default: int, least: int = 1) -> int:
        """Take a whole number from `least` to a million."""
        value = self._take(key, default)
        if type(value) is not int or not least <= value <= MOST_COUNT:
            raise InputError(
                f"{self.where}: {key} = {value!r}, expected a whole number from {least}"
            )
        return value

    def pair(self, key: str) -> tuple[float, float]:
        """Take two numbers above 0."""
        value = self._take(key, None)
        numbers = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
        if not numbers or len(value) != 2 or not all(0 < v < math.inf for v in value):
            raise InputError(f"{self.where}: {key} = {value!r}, expected two numbers above 0")
        return float(value[0]), float(value[1])

    def flag(self, key: str, default: bool) -> bool:
        """Take true or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {key} = {value!r}, expected true or false")
        return value

    def tables(self, key: str) -> list["Table"]:
        """Take a list of at least one table."""
        value = self._take(key, None)
        if not isinstance(value, list) or not value:
            raise InputError(f"{self.where}: {key}: expected at least one table")
        return [Table(v, f"{self.where}: {key} {i + 1}") for i, v in enumerate(value)]

    def finish(self, known: str) -> None:
        """Raise `InputError` if a key is left that nobody took; `known` names those there are."""
        if self.raw:
            raise InputError(f"{self.where}: {next(iter(self.raw))!r} is not known here; {known}")

    def _take(self, key: str, default: Any) -> Any:
        value = self.raw.pop(key, default)
        if value is None:
            raise InputError(f"{self.where}: {key} is missing")
        return value


def parse_hardware(text: str, where: str) -> Hardware:
    """Return the hardware that a TOML text describes; `where` is its name in messages.

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
    table = Table(raw, where)
    found = Hardware(
        Path(where).stem,
        tuple(parse_machine(m) for m in table.tables("machine")),
        table.text("split", "pipeline", SPLITS),
        table.text("dense", "exact", ("exact", "q8")),
        table.text("cache", "float32", tuple(NUMBER_BYTES)),
        table.whole("context", 8192),
        table.whole("card_experts", 0, 0) if "card_experts" in raw else None,
    )
    table.finish("known: split, dense, cache, context, card_experts, machine")
    return found


def parse_machine(m: Table) -> Machine:
    """Return the machine that a TOML table describes. Raises `InputError`."""
    tiers = []
    for t in m.tables("tiers"):
        kind = t.text("kind", among=KINDS)
        default = f"{CARD_RESERVE}B" if kind == "vram" else "0.0B"
        reserve = t.text("reserve", default)
        tier = Memory(
            t.text("name", kind),
            kind,
            parse_size(t.text("capacity"), f"{t.where}: capacity"),
            parse_rate(t.text("bandwidth"), f"{t.where}: bandwidth"),
            t.flag("measured", False),
            t.whole("count", 1),
            t.flag("together", True),
            parse_size(reserve, f"{t.where}: reserve") if reserve != "0.0B" else 0.0,
            t.number("tflops", 0) or None,
        )
        check_size(f"{t.where}: capacity", tier.capacity)
        check_rate(f"{t.where}: bandwidth", tier.bandwidth)
        tiers.append(tier)
        t.finish(
            "known: name, kind, capacity, bandwidth, measured, count, together, reserve, tflops"
        )
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
    m.finish("known: tiers, cores, sockets, core_gflops, count")
    return out


def read_data(name: str) -> str:
    """Return the text of a file that lies beside this module in the package."""
    return (importlib.resources.files("refmoe.run.plan") / name).read_text("utf-8")
