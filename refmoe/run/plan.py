"""What lives where, whether it fits, and how fast it will be: from sizes and bandwidths alone.

Decoding one token, bytes as `weights/placement.py` places them,

    t = Σ bytes / (bandwidth · e)  +  exchanges · t_x  +  hand-overs · t_h               [seconds]

over the tiers, nothing overlapped. An exchange is a sum over machines that hold a layer together
(two a layer); a hand-over is a layer that a card begins and memory ends. Several machines read at
the same time if they split each layer (`tensor`), in turn if each has layers of its own
(`pipeline`). Bandwidths are those of data sheets; a measured one counts as 0.8 of such. The
bandwidth of a machine with two sockets counts with a factor s below 1.

A prompt of P tokens touches 1 − (1 − K/E)^P of the experts of a layer (a uniform router),

    t = Σ max(bytes touched / (bandwidth · e),  2 · P · numbers / (flops · c))

over the tiers, computed where the weights lie (what lies on disk: by the cores). A sweep reads
every byte once, from the disk if there is one, and then computes: the sum.

e, s, t_x and t_h are fitted to public reports, `reports.toml` (sources in the table), by least
squares of log(reported / predicted) on a grid; c likewise on those with a prompt's rate. The range
is the prediction times exp(±3σ), σ the residual's deviation, but at least ± 25 % and at most
hi/lo = 2; that of a prompt, which rests on few reports, always hi/lo = 2. `validate` judges each
report by constants that were fitted without any report of its source. What that cannot show: the
form of the law was chosen with the same reports in view, and half of them leave something unsaid
that had to be assumed (the table says what). No report of a K2 streamed from disk says its hit
rate, so a disk is taken to do as well as memory, e of its rate.

That experts are asked for evenly is an assumption: the real router has favourites, so a cache of
the most used ones does better; `--hit-rate` says how much.
"""

import importlib.resources
import math
import mmap
import os
import platform
import re
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.config import Config
from refmoe.files import InputError, as_bytes
from refmoe.weights.members import MEMBERS, published
from refmoe.weights.placement import (
    CARD_RESERVE,
    KINDS,
    Parts,
    Placement,
    Share,
    Tier,
    place,
    smallest,
    traffic,
)

MEASURED = 0.8  # of a data sheet's bandwidth, what reading reaches at best
WIDEST = math.log(2) / 2
NARROWEST = math.log(1.25)
CORE_GFLOPS = 96.0  # two fused multiply-adds of 8 lanes at 3 GHz
CARD_FLOPS_PER_BYTE = 35.0  # of a card that does not say: an RTX 3060 has 35, a PRO 6000 70
SPLITS = ("tensor", "pipeline")
NUMBER = {"float32": 4, "bf16": 2}
RAM, DISK, VRAM = 50e9, 3.5e9, 360e9  # bytes a second where flags give none


# --- sizes and rates


def rate(text: str, what: str = "a bandwidth") -> float:
    """Bytes a second: 50GB/s. Raises `InputError`."""
    try:
        return as_bytes(re.sub(r"/s\s*$", "", text), what)
    except InputError:
        raise InputError(f"{what} = {text!r}, expected bytes a second like 50GB/s") from None


def count(text: str, what: str = "a number of tokens") -> int:
    """Tokens: 8k is 8,192, 1M 1,048,576. Raises `InputError`."""
    m = re.fullmatch(r"\s*([0-9]+)\s*([kKM]?)\s*", text)
    if m is None or int(m[1]) < 1:
        raise InputError(f"{what} = {text!r}, expected a number like 8192 or 8k")
    return int(m[1]) << {"": 0, "k": 10, "M": 20}[m[2].replace("K", "k")]


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
                as_bytes(t.text("capacity"), f"{t.where}: capacity"),
                rate(t.text("bandwidth"), f"{t.where}: bandwidth"),
                t.flag("measured", False),
                t.whole("count", 1),
                t.flag("together", True),
                as_bytes(reserve, f"{t.where}: reserve") if reserve != "0.0B" else 0.0,
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
    return (importlib.resources.files("refmoe.run") / name).read_text("utf-8")


PRESETS = ("rtx3060-optane768", "epyc9b45-4xpro6000", "2x-m3-ultra", "laptop-64gb-nvme", "this")


def preset(name: str, model: Path | None = None) -> Hardware:
    """A machine by name; `this` is measured. Raises `InputError`."""
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}; known: {', '.join(PRESETS)}")
    if name == "this":
        return this(model)
    return read_hardware(_data(f"hardware/{name}.toml"), name)


class Flags(NamedTuple):
    """What the command line says of the hardware; None where it does not."""

    ram: float | None = None
    ram_bandwidth: float | None = None
    disk: float | None = None  # bytes a second
    vram: float | None = None
    vram_bandwidth: float | None = None
    pmem: float | None = None
    pmem_bandwidth: float | None = None
    cores: int | None = None


def with_flags(hardware: Hardware | None, flags: Flags) -> Hardware:
    """The hardware with the tiers that flags name put in or changed, in each machine."""
    notes = list(hardware.notes) if hardware else []
    sizes = {"ram": flags.ram, "vram": flags.vram, "pmem": flags.pmem, "disk": None}
    rates = {
        "ram": flags.ram_bandwidth,
        "vram": flags.vram_bandwidth,
        "pmem": flags.pmem_bandwidth,
        "disk": flags.disk,
    }
    usual = {"ram": RAM, "vram": VRAM, "pmem": 39e9, "disk": DISK}

    def changed(machine: Machine) -> Machine:
        tiers = {t.kind: t for t in machine.tiers}
        for kind in KINDS:
            capacity, bandwidth = sizes[kind], rates[kind]
            if capacity is None and bandwidth is None:
                continue
            old = tiers.get(kind)
            if old is None and capacity is None and kind != "disk":
                raise InputError(f"--{kind}-bandwidth: there is no {kind}; give --{kind} SIZE")
            if old is None:
                reserve = CARD_RESERVE if kind == "vram" else 0
                old = Memory(kind.upper(), kind, 1e15, usual[kind], reserve=reserve)
                old = old._replace(name="disk") if kind == "disk" else old
                if bandwidth is None:
                    notes.append(f"{kind}: {usual[kind] / 1e9:g} GB/s assumed")
            elif capacity is not None:
                old = old._replace(pieces=1, reserve=old.reserve if kind == "vram" else 0)
            if bandwidth is not None:
                old = old._replace(bandwidth=bandwidth, measured=False)
            if capacity is not None:
                old = old._replace(capacity=capacity)
            tiers[kind] = old
        cores = flags.cores or machine.cores
        return replace(machine, tiers=tuple(tiers.values()), cores=cores)

    base = hardware or Hardware("flags", (Machine((), os.cpu_count() or 1),))
    machines = tuple(changed(m) for m in base.machines)
    return replace(base, machines=machines, notes=tuple(dict.fromkeys(notes)))


# --- measuring this machine


def this(model: Path | None = None) -> Hardware:
    """This machine, here and now: memory and its rate, the disk's rate, the cores' flops."""
    from refmoe.run.bench import Stream  # Numba: half a second that no other plan needs

    memory, notes = _memory(), []
    stream = Stream()
    ram = max(stream.measure() for _ in range(5)) * 1e9
    tiers = [Memory("RAM", "ram", memory, ram, measured=True)]
    disk, how = _disk(model)
    notes.append(how)
    if disk is not None:
        tiers.append(Memory("disk", "disk", 1e15, disk, measured=True))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    a = np.ones((1024, 1024), np.float32)
    best = max(2 * 1024**3 / _seconds(lambda: a @ a) for _ in range(20)) / 1e9
    notes.insert(0, f"memory: {ram / 1e9:.1f} GB/s; products: {best:.0f} GFLOP/s")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores / 2:
        notes.append(f"others are at work here (load {load:.1f}): rates alone would be higher")
    notes.append("a card is not looked for: --vram SIZE --vram-bandwidth RATE")
    machine = Machine(tuple(tiers), cores, core_gflops=best / cores / MEASURED)
    return Hardware(f"this ({platform.node() or 'here'})", (machine,), notes=tuple(notes))


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _memory() -> float:
    """Bytes that this process may have: what is free or can be freed, within its group's limit."""
    try:
        total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        raise InputError("this system does not say how much memory it has; give --ram") from None
    if Path("/proc/meminfo").is_file():
        free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        total = min(total, 1024.0 * int(free[1])) if free else total
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, float(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return total


PROBE = 1 << 28  # bytes that are read of the disk
BLOCK = 1 << 23


def _disk(model: Path | None) -> tuple[float | None, str]:
    """Bytes a second, and how it was found: the model's own file, or one of 256 MB."""
    if not hasattr(os, "preadv"):
        return None, "disk: not measured on this system; give --disk RATE"
    files = [model] if model and model.is_file() else list(model.glob("*")) if model else []
    large = [f for f in files if f.is_file() and f.stat().st_size >= PROBE]
    if large:
        return _read_rate(max(large, key=lambda f: f.stat().st_size))
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) if Path(base).is_dir() else Path(tempfile.gettempdir())
    if shutil.disk_usage(folder).free < 8 * PROBE:
        return None, f"disk: not measured, {folder} is nearly full; give --disk RATE"
    block = np.random.default_rng(0).bytes(BLOCK)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="refmoe-plan-") as f:
            for _ in range(PROBE // BLOCK):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
            return _read_rate(Path(f.name), "a file of 256 MB")
    except OSError as e:
        return None, f"disk: not measured ({e}); give --disk RATE"


def _read_rate(file: Path, name: str | None = None) -> tuple[float, str]:
    """Past the page cache where the system allows it: blocks of 8 MiB, four at a time."""
    handle, direct = _opened(file)
    total = min(file.stat().st_size, 4 * PROBE) // BLOCK * BLOCK

    def read(start: int) -> int:
        with mmap.mmap(-1, BLOCK) as block:  # aligned, as O_DIRECT wants it
            return os.preadv(handle, [block], start)

    try:
        with ThreadPoolExecutor(4) as pool:
            began = time.perf_counter()
            done = sum(pool.map(read, range(0, total, BLOCK)))
            seconds = time.perf_counter() - began
    finally:
        os.close(handle)
    way = "past the page cache" if direct else "through the page cache, which may flatter it"
    return done / seconds, f"disk: {done / seconds / 1e9:.2f} GB/s, {name or file.name} {way}"


def _opened(file: Path) -> tuple[int, bool]:
    """A handle, and whether it reads past the page cache."""
    if direct := getattr(os, "O_DIRECT", 0):
        try:
            handle = os.open(file, os.O_RDONLY | direct)
        except OSError:  # not every file system has it
            pass
        else:
            try:
                with mmap.mmap(-1, 4096) as block:
                    os.preadv(handle, [block], 0)
                return handle, True
            except OSError:
                os.close(handle)
    handle = os.open(file, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    return handle, False


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


# --- reports, and what is fitted to them


class Report(NamedTuple):
    system: str
    source: str
    assumed: str
    decode: float
    prefill: float | None
    batch: int
    case: Case


def reports(text: str | None = None) -> tuple[list[Report], list[dict[str, Any]]]:
    """The table: rows that are judged, and those excluded with the reason."""
    where = "reports.toml"
    table = tomllib.loads(_data(where) if text is None else text)
    exact = Parts.of(model_config())
    rows = []
    for i, raw in enumerate(table["report"]):
        t = _Table(raw, f"{where}: report {i + 1}")
        parts = exact.with_bits(*t.pair("bits"))
        machines = tuple(_machine(m) for m in t.tables("machine"))
        hardware = Hardware("", machines, t.text("split", "pipeline", SPLITS))
        share = t.number("experts_on_cards", -1.0) if "experts_on_cards" in raw else None
        cards = None if share is None else round(share * parts.all_experts)
        case = Case.of(parts, hardware, 4096, 2, None, cards)
        prefill = t.number("prefill", 0.0) or None
        decode, batch = t.number("decode", 0.0), t.whole("batch", 512)
        names = t.text("system"), t.text("source"), t.text("assumed", "")
        rows.append(Report(*names, decode, prefill, batch, case))
        t.done("see the head of the file")
    excluded = [{"reported": None, **row} for row in table.get("excluded", [])]
    return rows, excluded


GRID = (
    np.arange(0.30, 1.001, 0.025),  # efficiency
    np.arange(0.5, 1.01, 0.1),  # socket
    np.arange(0, 301, 20) * 1e-6,  # exchange
    np.arange(0, 501, 25) * 1e-6,  # handover
)
COMPUTE = np.arange(0.2, 1.001, 0.025)


def fit(rows: Sequence[Report]) -> Constants:
    """The constants with the least squares of log(reported / predicted) over these rows."""
    e, s, x, h = (a.reshape(-1) for a in np.meshgrid(*GRID, indexing="ij"))
    total = np.zeros(len(e))
    for row in rows:
        w = row.case.work()
        plain = sum(t for name, t in w.seconds.items() if name not in w.divided)
        divided = sum(t for name, t in w.seconds.items() if name in w.divided)
        t = (plain + divided / s) / e + w.exchanges * x + w.handovers * h
        total += np.log(row.decode * t) ** 2
    best = int(total.argmin())
    deviation = math.sqrt(total[best] / max(1, len(rows) - len(GRID)))
    found = Constants(
        float(e[best]), float(s[best]), float(x[best]), float(h[best]), 0.5, deviation
    )
    prompts = [row for row in rows if row.prefill]
    if not prompts:
        return found

    def error(c: float) -> float:
        with_c = found._replace(compute=c)
        return sum(
            math.log(row.prefill * row.case.prompt(row.batch, with_c) / row.batch) ** 2
            for row in prompts
            if row.prefill
        )

    return found._replace(compute=float(min(COMPUTE, key=error)))


@cache
def fitted() -> Constants:
    """To all reports."""
    return fit(reports()[0])


def validate(text: str | None = None) -> dict[str, Any]:
    """Each report against constants fitted without any report of its source."""
    rows, excluded = reports(text)
    out: list[dict[str, Any]] = []
    prompts: list[dict[str, Any]] = []
    for row in rows:
        c = fit([other for other in rows if other.source != row.source])
        lo, hi = c.range(1 / row.case.work().total(c))
        out.append(_judged(row, row.decode, lo, hi))
        if row.prefill:
            lo, hi = c._replace(deviation=1.0).range(row.batch / row.case.prompt(row.batch, c))
            prompts.append({**_judged(row, row.prefill, lo, hi), "tokens": row.batch})
    c = fit(rows)
    return {
        "rows": out,
        "excluded": excluded,
        "inside": sum(r["inside"] for r in out),
        "total": len(out),
        "prefill": prompts,
        "constants": c._asdict(),
    }


def _judged(row: Report, reported: float, lo: float, hi: float) -> dict[str, Any]:
    inside = lo <= reported <= hi
    judged = {"reported": reported, "lo": lo, "hi": hi, "inside": inside}
    return {"system": row.system, "source": row.source, **judged, "assumed": row.assumed or None}


# --- the plan


def plan(
    case: Case,
    eighths: Parts | None = None,
    prompt: int = 512,
    sweep: int = 10_000,
    constants: Constants | None = None,
) -> dict[str, Any]:
    """The document; rates are None where it does not fit.

    eighths  the same model with 8-bit dense weights, if it has others
    prompt   tokens of the prompt whose rate is told; `sweep` likewise
    """
    fits = case.placement.fits
    c = constants or fitted()
    times = case.work().times(c)
    total = sum(times.values())
    lo, hi = c.range(1 / total)
    wide = c._replace(deviation=1.0)  # prompts: few reports
    tokens = case.traffic()
    cache = case.parts.cache_bytes(case.context, case.number) * case.parts.layers
    binds = max(times, key=lambda name: times[name])
    advice, factor = best_change(case, c, eighths)
    return {
        "fits": fits,
        "tiers": [
            {
                "name": s.tier.name,
                "kind": s.tier.kind,
                "holds": holdings(s, case.parts),
                "bytes": s.nbytes,
                "room": s.tier.room,
                "bytes_per_token": nbytes,
                "seconds_per_token": times[s.tier.name],
            }
            for s, nbytes in tokens
        ],
        "decode_tok_s": [lo, hi] if fits else None,
        "prefill_tok_s": list(wide.range(prompt / case.prompt(prompt, c))) if fits else None,
        "prefill_tokens": prompt,
        "binds": binds if fits else None,
        "advice": advice,
        "advice_factor": factor,
        "overhead_s": {k: v for k, v in times.items() if k in ("link", "hand-over")},
        "cache_bytes": cache,
        "context": case.context,
        "sweep_tokens": sweep,
        "sweep_s": list(wide.range(case.sweep(sweep, c))) if fits else None,
        "smallest_budget": smallest(case.parts) + cache,
        "missing_bytes": case.placement.homeless + case.placement.needed,
        "notes": list(case.hardware.notes),
        "hardware": case.hardware.name,
    }


def holdings(s: Share, parts: Parts) -> list[str]:
    """What a tier holds, in words."""
    out = []
    for kind in ("attention", "shared experts", "dense mlp", "router"):
        here, whole = len(s.layers(kind)), sum(p.kind == kind for p in parts.always)
        if here == whole == 1:
            out.append(f"{kind} of layer {s.layers(kind)[0]}")
        elif here:
            out.append(f"{kind} of {'all' if here == whole else f'{here} of'} {whole} layers")
    out += [p.kind for p in s.parts if p.layer is None]
    if s.caches:
        alone = len(s.caches) == parts.layers
        out.append(f"cache of {'all' if alone else f'{len(s.caches)} of'} {parts.layers} layers")
    if s.experts:
        share = s.experts / parts.all_experts
        out.append(f"{s.experts:,} of {parts.all_experts:,} routed experts ({share:.0%})")
    return out


def best_change(case: Case, c: Constants, eighths: Parts | None = None) -> tuple[str, float]:
    """The one change of a handful that makes decoding fastest, and how many times faster."""
    now = 1 / case.work().total(c)
    if not case.placement.fits:
        lacking = _gb(case.placement.homeless + case.placement.needed)
        else_ = "" if case.placement.on("disk") else ", or a disk to stream from"
        return f"{lacking} more memory{else_}: it does not fit", 1.0
    options = []
    for what, other in _changes(case, eighths):
        factor = 1 / other.work().total(c) / now
        if other.placement.fits:
            options.append((factor, what))
    if not options or max(options)[0] <= 1.005:
        return "nothing that was tried helps", 1.0
    factor, what = max(options)
    lo, hi = c.range(now * factor)
    return (
        f"{what}: {lo:.3g} to {hi:.3g} tok/s, {factor:,.{1 if factor < 10 else 0}f} times as fast",
        factor,
    )


def _changes(case: Case, eighths: Parts | None) -> Iterator[tuple[str, Case]]:
    hw, parts = case.hardware, case.parts
    again = partial(Case.of, context=case.context, number=case.number, hit_rate=case.hit_rate)
    kinds = {t.kind: t for m in hw.machines for t in m.tiers}

    def with_tier(kind: str, change: Callable[[Memory], Memory]) -> Hardware:
        machines = []
        for m in hw.machines:
            tiers = tuple(change(t) if t.kind == kind else t for t in m.tiers)
            machines.append(replace(m, tiers=tiers))
        return replace(hw, machines=tuple(machines))

    for kind, t in kinds.items():
        twice = with_tier(kind, lambda t: t._replace(bandwidth=2 * t.bandwidth))
        text = f"{t.name} of twice the bandwidth ({2 * t.bandwidth / 1e9:.0f} GB/s)"
        yield text, again(parts, twice)
    below = sum(s.nbytes for s in case.placement.shares if s.tier.kind in ("pmem", "disk"))
    if below and "ram" in kinds:
        more = below / hw.boxes + 1e9
        larger = with_tier("ram", lambda t: t._replace(capacity=t.capacity + more))
        text = f"+{more / 1e9:,.0f} GB of {kinds['ram'].name}, so that it holds every expert"
        yield text, replace(again(parts, larger), hit_rate=None)
    if eighths is not None and eighths.always_bytes < parts.always_bytes:
        yield "--dense q8", again(eighths, hw)
    if "vram" not in kinds:
        card = Memory("card", "vram", 24e9, 936e9, reserve=CARD_RESERVE)
        machines = tuple(replace(m, tiers=(card, *m.tiers)) for m in hw.machines)
        text = "a card of 24 GB and 936 GB/s for what every token uses"
        yield text, again(parts, replace(hw, machines=machines))
    if hw.boxes > 1 and hw.split == "pipeline":
        yield "every layer split between the machines", again(parts, replace(hw, split="tensor"))


def lines(document: dict[str, Any]) -> list[str]:
    """For people."""
    d = document
    fits = "yes" if d["fits"] else f"no, {_gb(d['missing_bytes'])} are missing"
    if d["fits"] and any(t["kind"] == "disk" and t["holds"] != ["embedding"] for t in d["tiers"]):
        fits += ", streaming from disk"
    out = [f"{d['model']} on {d['hardware']}", f"fits: {fits}", ""]
    for t in d["tiers"]:
        room = f" of {_gb(t['room'])}" if t["kind"] != "disk" else ""
        cost = f"{_gb(t['bytes_per_token'])} a token, {1e3 * t['seconds_per_token']:.1f} ms"
        out.append(f"{t['name']} ({t['kind']}): {_gb(t['bytes'])}{room}; {cost}")
        out += [f"    {what}" for what in t["holds"]]
    for name, seconds in d["overhead_s"].items():
        out.append(f"{name}: {1e3 * seconds:.1f} ms a token")
    out.append("")
    if d["fits"]:
        out += [
            f"decode     {_span(d['decode_tok_s'])} tok/s, bound by {d['binds']}",
            f"prefill    {_span(d['prefill_tok_s'])} tok/s, a prompt of {d['prefill_tokens']:,}",
            f"sweep      {_span(d['sweep_s'])} s for {d['sweep_tokens']:,} tokens",
        ]
    out += [
        f"cache      {_gb(d['cache_bytes'])} for {d['context']:,} tokens",
        f"smallest   {_gb(d['smallest_budget'])} of memory, the rest from disk",
        f"helps most {d['advice']}",
    ]
    return out + [f"note: {note}" for note in d["notes"]]


def table(document: dict[str, Any]) -> list[str]:
    """The validation, for people."""
    out = []
    for what, rows in (("decode", document["rows"]), ("prefill", document["prefill"])):
        out.append(f"{what:<8}{'tok/s':>8}{'lo':>8}{'hi':>8}")
        for r in rows:
            figures = f"{r['reported']:>8.4g}{r['lo']:>8.3g}{r['hi']:>8.3g}"
            mark = "inside" if r["inside"] else "OUTSIDE"
            out.append(f"{mark:<8}{figures}  {r['system']}  [{r['source']}]")
        out.append("")
    out.append("excluded")
    for r in document["excluded"]:
        figure = "-" if r["reported"] is None else f"{r['reported']:g}"
        out.append(f"{figure:>16}  {r['system']}  [{r['source']}]: {r['reason']}")
    c = document["constants"]
    out += [
        "",
        f"{document['inside']} of {document['total']} decode figures inside, "
        "each by constants fitted without its source",
        f"all together: {c['efficiency']:.3f} of the bandwidth, two sockets {c['socket']:.1f}, "
        f"{1e6 * c['exchange']:.0f} µs an exchange, {1e6 * c['handover']:.0f} µs a hand-over, "
        f"{c['compute']:.2f} of the flops; deviation {c['deviation']:.0%}",
    ]
    return out


def _gb(nbytes: float) -> str:
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:,.1f} GB"
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:,.1f} kB"


def _span(ends: Sequence[float]) -> str:
    return " to ".join(f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in ends)
