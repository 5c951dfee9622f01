"""Read bytes of files into given places, by a few threads: large reads, the urgent ones first.

    ticket = reader.read(places, URGENT)     returns at once
    ticket.wait()                            seconds stalled; `InputError` where a file is not whole

A read goes past the page cache (O_DIRECT, F_NOCACHE on macOS) or through it, whichever is quicker
for this file on this machine: `choose_way` measures it, for neither always is. What the cache would
keep is kept in the arena anyway, so that going past it saves a copy; but not every file system
allows it.
"""

import errno
import heapq
import mmap
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refmoe.files import InputError

PAGE = 4096  # bytes: direct reads begin, end and land at whole ones
PIECE = 4 << 20  # bytes of one read
THREADS = 4  # that read: enough to keep a disk's queue filled
URGENT, SOON, MAYBE = range(3)  # needed now; needed next; guessed
SAMPLE = 48 << 20  # bytes that are read to choose a way
WAYS = ("direct", "cached")  # past the page cache, or through it
TRIES = 2  # of each way, of which the better counts


class Extent(NamedTuple):
    """A range of a file in whole pages, of which the last may lie beyond the file's end."""

    file: Path
    start: int
    nbytes: int
    needed: int  # bytes of these that are in the file and wanted


class CalledOff(Exception):
    """A read was cancelled before it began."""


class Ticket:
    """Reads under way, as one thing to wait for."""

    def __init__(self, pieces: int):
        self.left = pieces
        self.error: BaseException | None = None
        self.event = threading.Event()
        if not pieces:
            self.event.set()

    @property
    def done(self) -> bool:
        """Whether all reads have ended, well or not."""
        return self.event.is_set()

    def wait(self) -> float:
        """Wait until all is there, and return the seconds that took. Raises what went wrong."""
        began = time.perf_counter()
        self.event.wait()
        if self.error is not None:
            raise self.error
        return time.perf_counter() - began


class Reader:
    """Threads that read files one way. Close it, or leave it to the end of the process."""

    def __init__(self, way: str = "cached", threads: int = THREADS):
        if way not in WAYS:
            raise InputError(f"reads {way!r}; known: {', '.join(WAYS)}")
        self.way, self.bytes_read = way, 0
        self._queue: list[tuple[int, int, Ticket, Extent, np.ndarray]] = []
        self._count = 0
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._wanted = threading.Condition(self._lock)
        self._open = True
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def read(self, what: Sequence[tuple[Extent, np.ndarray]], urgency: int = URGENT) -> Ticket:
        """Begin to read each extent into its place, uint8 [nbytes]."""
        pieces = [
            (Extent(e.file, e.start + at, len(to), max(0, min(len(to), e.needed - at))), to)
            for e, whole in what
            for at in range(0, e.nbytes, PIECE)
            for to in (whole[at : at + PIECE],)
        ]
        ticket = Ticket(len(pieces))
        with self._lock:
            for extent, to in pieces:
                self._count += 1
                heapq.heappush(self._queue, (urgency, self._count, ticket, extent, to))
            self._wanted.notify_all()
        return ticket

    def hurry(self, ticket: Ticket) -> None:
        """Make reads urgent that were guessed, or for later."""
        with self._lock:
            if not ticket.done:
                self._queue = [(URGENT if q[2] is ticket else q[0], *q[1:]) for q in self._queue]
                heapq.heapify(self._queue)

    def cancel(self, ticket: Ticket) -> int:
        """Cancel the reads that have not begun, and return their bytes.

        The ticket is done once no thread is at it, with `CalledOff` as its error.
        """
        with self._lock:
            mine = [q for q in self._queue if q[2] is ticket]
            if not mine:
                return 0
            self._queue = [q for q in self._queue if q[2] is not ticket]
            heapq.heapify(self._queue)
            ticket.error = ticket.error or CalledOff("a read that was called off")
            ticket.left -= len(mine)
            if not ticket.left:
                ticket.event.set()
            return sum(extent.needed for _, _, _, extent, _ in mine)

    def close(self) -> None:
        """End the threads and close the files; what is queued is not read."""
        with self._lock:
            self._open = False
            self._queue.clear()
            self._wanted.notify_all()
        for thread in self._threads:
            thread.join()
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def _work(self) -> None:
        while True:
            with self._lock:
                while self._open and not self._queue:
                    self._wanted.wait()
                if not self._open:
                    return
                _, _, ticket, extent, to = heapq.heappop(self._queue)
                failed = ticket.error is not None
            error: BaseException | None = None
            if not failed:
                try:
                    self._fill(extent, to)
                except BaseException as e:  # whoever waits for it raises it
                    error = e
            with self._lock:
                ticket.left -= 1
                ticket.error = ticket.error or error
                self.bytes_read += 0 if failed or error else extent.needed
                if not ticket.left:
                    ticket.event.set()

    def _fill(self, extent: Extent, to: np.ndarray) -> None:
        if not extent.needed:
            return
        try:
            fd = self._file(extent.file)
            if self.way == "cached" and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, extent.start, extent.nbytes, os.POSIX_FADV_WILLNEED)
            got = 0
            while got < extent.needed:
                count = _read_at(fd, to[got:], extent.start + got)
                if not count:
                    size = os.fstat(fd).st_size
                    raise InputError(
                        f"{extent.file}: ends at {size} bytes, {extent.start + extent.needed} were "
                        "there when it was opened; is it being copied or replaced?"
                    )
                got += count
        except OSError as e:
            raise InputError(
                f"{extent.file}: cannot be read at {extent.start} ({e.strerror or e}); it was "
                "there when the checkpoint was opened. Nothing is lost: put it back and go on"
            ) from None

    def _file(self, file: Path) -> int:
        with self._lock:
            fd = self._files.get(file)
            if fd is None:
                fd = self._files[file] = open_for_reading(file, self.way)
            return fd


def open_for_reading(file: Path, way: str) -> int:
    """Open a file for reading one of the `WAYS`, and return its descriptor.

    Raises OSError where the system or the file system has no such reads.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if way == "cached":
        return os.open(file, flags)
    if sys.platform == "darwin":
        import fcntl  # not on every system

        fd = os.open(file, flags)
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        return fd
    direct = getattr(os, "O_DIRECT", None)
    if direct is None:
        raise OSError(errno.EINVAL, "no direct reads on this system")
    return os.open(file, flags | direct)


def _read_at(fd: int, to: np.ndarray, at: int) -> int:
    """Read into `to` from a position of the file on, and return the bytes that came."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [to.data], at)
    with _one:  # a system with one place per descriptor
        os.lseek(fd, at, os.SEEK_SET)
        raw = os.read(fd, len(to))
    to[: len(raw)] = np.frombuffer(raw, np.uint8)
    return len(raw)


_one = threading.Lock()


def allocate(nbytes: int) -> np.ndarray:
    """Return memory that begins at a page and takes none until it is written: uint8 [nbytes]."""
    size = max(PAGE, -(-nbytes // PAGE) * PAGE)
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, nbytes)


def in_memory(file: Path) -> bool:
    """Return whether a file lies in memory already: tmpfs, or a DAX mount of persistent memory."""
    best, found = -1, False
    try:
        where = file.resolve().as_posix()
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, _, rest = line.partition(" - ")
            place = mount.split()[4]
            kind, _, options = rest.split(" ", 2)
            inside = where == place or where.startswith(place.rstrip("/") + "/")
            if inside and len(place) >= best:
                wide = f"{mount.split()[5]},{options.rpartition(' ')[2]}".split(",")
                dax = any(o in ("dax", "dax=always") for o in wide)
                best, found = len(place), kind in ("tmpfs", "ramfs") or dax
    except (OSError, ValueError, IndexError):
        return False
    return found


def forget(file: Path, start: int = 0, nbytes: int = 0) -> None:
    """Ask the system to drop these bytes of a file from its cache, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def measure_rate(file: Path, way: str, start: int, nbytes: int, threads: int = THREADS) -> float:
    """Return the bytes a second at which `nbytes` of a file, not cached, are read this way."""
    forget(file, start, nbytes)
    reader = Reader(way, threads)
    try:
        places: list[tuple[Extent, np.ndarray]] = []
        memory = allocate(min(nbytes, SAMPLE))
        for at in range(0, nbytes, PIECE):
            count = min(PIECE, nbytes - at)
            place = at % len(memory)
            if place + count > len(memory):
                place = 0
            extent = Extent(file, start + at, count, count)
            places.append((extent, memory[place : place + count]))
        memory[:] = 0  # its pages are there
        return nbytes / max(reader.read(places).wait(), 1e-9)
    finally:
        reader.close()


def choose_way(file: Path) -> tuple[str, dict[str, float]]:
    """Return the quicker way for a file, and bytes a second of each way that works.

    Direct reads count as quicker up to a quarter below the others: they spare the processor a copy.
    """
    pages = file.stat().st_size // PAGE
    part = pages // (len(WAYS) * TRIES)  # each trial has its own, none of them read before
    each = min(SAMPLE // PAGE, part)
    rates = dict.fromkeys(WAYS, 0.0)
    for n in range(TRIES * len(WAYS)):
        way = WAYS[n % len(WAYS)]
        try:
            found = measure_rate(file, way, n * part * PAGE, each * PAGE) if each else 0.0
            if way in rates:
                rates[way] = max(rates[way], found)
        except (OSError, InputError):  # direct reads are refused by some file systems
            rates.pop(way, None)
    direct, cached = rates.get("direct", 0.0), rates.get("cached", 0.0)
    return "direct" if direct and direct >= 0.75 * cached else "cached", rates


def high_water() -> int:
    """Return the bytes of the most memory that this process ever had resident."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # a process's own rusage begins at its parent's size on Linux

    most: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)
