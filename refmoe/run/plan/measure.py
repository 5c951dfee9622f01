"""Choose the hardware to plan for: a preset, what flags say, or this machine as it is measured."""

import mmap
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.files import InputError, cache_home
from refmoe.run.plan.hardware import (
    DISK,
    MEASURED,
    PMEM,
    RAM,
    VRAM,
    Hardware,
    Machine,
    Memory,
    check_count,
    check_rate,
    check_size,
    parse_hardware,
    read_data,
)
from refmoe.weights.placement import CARD_RESERVE, KINDS

PRESETS = ("rtx3060-optane768", "epyc9b45-4xpro6000", "2x-m3-ultra", "laptop-64gb-nvme", "this")


def load_preset(name: str, model: Path | None = None) -> Hardware:
    """Return a machine by its name; `this` is measured, with `model`'s file to read from the disk.

    Raises `InputError` for a name that is not one of `PRESETS`.
    """
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}; known: {', '.join(PRESETS)}")
    if name == "this":
        return measure_this_machine(model)
    return parse_hardware(read_data(f"hardware/{name}.toml"), name)


class Flags(NamedTuple):
    """The hardware as flags of the command line describe it; None for flags that are not given.

    Sizes are in bytes, bandwidths and `disk` in bytes a second.
    """

    ram: float | None = None
    ram_bandwidth: float | None = None
    disk: float | None = None
    vram: float | None = None
    vram_bandwidth: float | None = None
    pmem: float | None = None
    pmem_bandwidth: float | None = None
    cores: int | None = None


def check_flags(flags: Flags) -> None:
    """Raise `InputError`, which names the flag, for a number that no machine has."""
    for name, value in flags._asdict().items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            if name == "cores":
                check_count(flag, value)
            elif name == "disk" or name.endswith("bandwidth"):
                check_rate(flag, value)
            else:
                check_size(flag, value)


def with_flags(hardware: Hardware | None, flags: Flags) -> Hardware:
    """Return the hardware with the tiers that flags name put in or changed, in each machine.

    Without hardware the flags alone describe one machine. Raises `InputError` for absurd numbers,
    and for the bandwidth of a memory that is not there.
    """
    check_flags(flags)
    notes = list(hardware.notes) if hardware else []
    sizes = {"ram": flags.ram, "vram": flags.vram, "pmem": flags.pmem, "disk": None}
    rates = {
        "ram": flags.ram_bandwidth,
        "vram": flags.vram_bandwidth,
        "pmem": flags.pmem_bandwidth,
        "disk": flags.disk,
    }
    usual = {"ram": RAM, "vram": VRAM, "pmem": PMEM, "disk": DISK}

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


def measure_this_machine(model: Path | None = None) -> Hardware:
    """Measure this machine, now: free memory and its rate, the disk's rate, the cores' flops.

    `model` is a checkpoint whose largest file the disk's rate is measured with.
    """
    from refmoe.run.bench.base import Stream  # Numba, which planning for others does not need

    memory, notes = _free_memory(), []
    stream = Stream()
    ram = max(stream.measure() for _ in range(5)) * 1e9
    tiers = [Memory("RAM", "ram", memory, ram, measured=True)]
    disk, how = _measure_disk(model)
    notes.append(how)
    if disk is not None:
        tiers.append(Memory("disk", "disk", 1e15, disk, measured=True))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    a = np.ones((1024, 1024), np.float32)
    best = max(2 * 1024**3 / _time(lambda: a @ a) for _ in range(20)) / 1e9  # GFLOP/s
    notes.insert(0, f"memory: {ram / 1e9:.1f} GB/s; products: {best:.0f} GFLOP/s")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores / 2:
        notes.append(f"others are at work here (load {load:.1f}): rates alone would be higher")
    notes.append("a card is not looked for: --vram SIZE --vram-bandwidth RATE")
    machine = Machine(tuple(tiers), cores, core_gflops=best / cores / MEASURED)
    return Hardware(f"this ({platform.node() or 'here'})", (machine,), notes=tuple(notes))


def _time(run: Callable[[], Any]) -> float:
    """Return the seconds that one call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _free_memory() -> float:
    """Return the bytes that this process may have: free or easily freed, and within its cgroup.

    Raises `InputError` where the system does not say.
    """
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


PROBE = 1 << 28  # bytes of the disk that are read: a second of a slow one
BLOCK = 1 << 23  # bytes of one read: large enough that starting it costs nothing


def _measure_disk(model: Path | None) -> tuple[float | None, str]:
    """Measure the disk: bytes a second (None: not possible here), and a note that says how.

    What is read is the model's largest file, or a file of 256 MB that is written for it.
    """
    if not hasattr(os, "preadv"):
        return None, "disk: not measured on this system; give --disk RATE"
    files = [model] if model and model.is_file() else list(model.glob("*")) if model else []
    large = [f for f in files if f.is_file() and f.stat().st_size >= PROBE]
    if large:
        return _read_rate(max(large, key=lambda f: f.stat().st_size))
    folder = cache_home() if cache_home().is_dir() else Path(tempfile.gettempdir())
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
    """Read a file, past the page cache where the system allows it → bytes a second, and a note.

    Blocks of 8 MiB are read, four at a time.
    """
    handle, direct = _open_past_cache(file)
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


def _open_past_cache(file: Path) -> tuple[int, bool]:
    """Open a file → a descriptor, and whether it reads past the page cache."""
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
